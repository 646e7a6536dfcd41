import csv

import pytest
import torch

from genstream.training.loop import LoopSettings, run
from genstream.training.vae_distillation import (
    DecoderDistillation,
    DistillationSettings,
    FeaturePair,
)
from genstream.training.vae_windows import ClipSource
from genstream.vae.causal import CausalVideoVAE
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.turbo import TurboVAED


def causal_teacher() -> CausalVideoVAE:
    torch.manual_seed(0)
    return CausalVideoVAE(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2).eval()


def tiny_teacher() -> TinyVideoVAE:
    torch.manual_seed(0)
    return TinyVideoVAE(
        latent_channels=4, encoder_width=4, decoder_widths=(8, 6, 4, 4), first_frame_copies=3
    ).eval()


def turbo_student(**overrides) -> TurboVAED:
    torch.manual_seed(1)
    config = {
        "latent_channels": 4,
        "decoder_block_out_channels": (4, 4, 8, 8),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
        "decoder_spatio_only": (True, False, False, False),
        "decoder_dw_kernel_size": 3,
    }
    return TurboVAED(**{**config, **overrides})


def training_clips(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step % 2)
    colours = torch.rand((2, 3, 1, 2, 2), generator=generator) * 2 - 1
    return colours.repeat_interleave(8, 3).repeat_interleave(8, 4).expand(-1, -1, 5, -1, -1)


CLIPS = ClipSource(training=training_clips, evaluation=[training_clips(2)[:1]])
MIDDLE = FeaturePair(student="decoder.mid_block", teacher="decoder.mid_block")
LATER = FeaturePair(student="decoder.up_blocks.1", teacher="decoder.up_blocks.0")


def squared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).square().flatten(1).mean(dim=1)


def test_a_run_brings_the_student_closer(tmp_path):
    torch.set_num_threads(1)
    teacher, student = causal_teacher(), turbo_student()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    settings = DistillationSettings(perceptual_weight=1.0, pairs=(MIDDLE,), head_channels=8)
    trainee = DecoderDistillation(settings, student, teacher, CLIPS, squared)
    loop = LoopSettings(total_steps=12, learning_rate=5e-3, warmup_steps=1, log_steps=4, ema_decay=0.5)
    run(loop, trainee, tmp_path)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    for name in ("loss", "pixel", "perceptual", "feature"):
        assert float(rows[-1][name]) < float(rows[0][name])
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(weight.grad is None for weight in teacher.parameters())
    assert len(teacher.decoder.mid_block._forward_hooks) == len(student.decoder.mid_block._forward_hooks) == 0
    trainee.module.student.save_pretrained(tmp_path / "student")
    loaded = TurboVAED.from_pretrained(tmp_path / "student")
    latents = teacher.encode(training_clips(0))
    assert torch.equal(loaded.decode(latents), trainee.module.student.decode(latents))


def test_features_count_at_their_own_size():
    teacher, student = causal_teacher(), turbo_student()
    trainee = DecoderDistillation(
        DistillationSettings(pixel_weight=0.0, pairs=(MIDDLE,), head_channels=8), student, teacher, CLIPS
    )
    loss, parts = trainee.loss(0)
    assert loss.item() == pytest.approx(parts["feature"])
    latents = teacher.encode(training_clips(0))
    outputs = []
    for vae in (student, teacher):
        handle = vae.decoder.mid_block.register_forward_hook(lambda m, i, output: outputs.append(output))
        vae.decode(latents)
        handle.remove()
    expected = (trainee.module.heads[0](outputs[0]) - outputs[1]).square().mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("teacher", "pair"),
    [
        (causal_teacher(), LATER),
        (tiny_teacher(), FeaturePair(student="decoder.mid_block", teacher="decoder.5")),
        # The teacher's layer still has the surplus of the first group, and twice the student's size.
        (tiny_teacher(), FeaturePair(student="decoder.up_blocks.1", teacher="decoder.13")),
    ],
)
def test_layers_of_other_sizes_and_kinds_are_joined(teacher, pair):
    trainee = DecoderDistillation(DistillationSettings(pairs=(pair,)), turbo_student(), teacher, CLIPS)
    loss, parts = trainee.loss(0)
    assert set(parts) == {"pixel", "feature"}
    loss.backward()
    assert all(weight.grad is not None for weight in trainee.module.heads.parameters())


def test_a_small_decoder_of_another_kind_can_be_the_student():
    teacher = tiny_teacher()
    student = TinyVideoVAE(
        latent_channels=4, encoder_width=4, decoder_widths=(4, 4, 4, 4), first_frame_copies=3
    )
    trainee = DecoderDistillation(DistillationSettings(), student, teacher, CLIPS)
    loss, parts = trainee.loss(0)
    assert set(parts) == {"pixel"}
    assert loss.requires_grad
    assert trainee.evaluate().keys() == {"psnr_db", "teacher_psnr_db"}


def test_students_learn_from_noisy_latents():
    teacher, student, seen = causal_teacher(), turbo_student(), []
    student.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    trainee = DecoderDistillation(DistillationSettings(latents_noise=0.5), student, teacher, CLIPS)
    latents = teacher.encode(training_clips(0))
    torch.manual_seed(0)
    trainee.loss(0)
    torch.manual_seed(0)
    sigma = torch.rand(2, 1, 1, 1, 1) * 0.5
    torch.testing.assert_close(seen[0], latents + sigma * torch.randn_like(latents))


def test_a_frozen_encoder_is_not_trained():
    teacher = tiny_teacher()
    student = TinyVideoVAE(
        latent_channels=4, encoder_width=4, decoder_widths=(4, 4, 4, 4), first_frame_copies=3
    )
    settings = DistillationSettings(latent_weight=2.0)
    _, parts = DecoderDistillation(settings, student, teacher, CLIPS).loss(0)
    frames = training_clips(0)
    expected = (student.encode(frames) - teacher.encode(frames)).square().mean()
    assert parts["latent"] == pytest.approx(expected.item())
    student.encoder.requires_grad_(requires_grad=False)
    _, parts = DecoderDistillation(settings, student, teacher, CLIPS).loss(0)
    assert parts.keys() == {"pixel"}


def test_bad_settings_are_refused():
    teacher = causal_teacher()
    for match, call in {
        r"perceptual must be given for perceptual_weight = 1.0, got None": lambda: DecoderDistillation(
            DistillationSettings(perceptual_weight=1.0), turbo_student(), teacher, CLIPS
        ),
        r"student must have the teacher's latent_channels = 4, got 16": lambda: DecoderDistillation(
            DistillationSettings(), turbo_student(latent_channels=16), teacher, CLIPS
        ),
        r"must join layers of one frame rate": lambda: DecoderDistillation(
            DistillationSettings(
                pairs=(FeaturePair(student="decoder.mid_block", teacher="decoder.up_blocks.1"),)
            ),
            turbo_student(),
            teacher,
            CLIPS,
        ),
        r"pairs must name layers of CausalVideoVAE, such as decoder.*; got 'decoder.nothing'": lambda: (
            DecoderDistillation(
                DistillationSettings(
                    pairs=(FeaturePair(student="decoder.mid_block", teacher="decoder.nothing"),)
                ),
                turbo_student(),
                teacher,
                CLIPS,
            )
        ),
        r"latents_noise must be in \[0, 1\), got 1": lambda: DistillationSettings(latents_noise=1),
        r"feature_weight must be at least 0 and finite, got -1": lambda: DistillationSettings(
            feature_weight=-1
        ),
        r"nothing else reaches the decoder": lambda: DistillationSettings(pixel_weight=0, latent_weight=1),
        r"head_channels must be at least 1, got 0": lambda: DistillationSettings(head_channels=0),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
