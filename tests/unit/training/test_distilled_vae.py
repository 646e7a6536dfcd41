import csv
import json
import shlex
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan
from retraining import retrain
from torch.utils.flop_counter import FlopCounterMode
from transformers import ResNetConfig, ResNetModel

from genstream.cli.settings import parse_settings
from genstream.io.model_folder import find_model
from genstream.training import distilled_vae
from genstream.training.distilled_vae import VAEDistillationSettings, distill_vae
from genstream.training.vae_distillation import DecoderDistillation
from genstream.vae.causal import CausalVideoVAE
from genstream.vae.loading import load_vae
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.turbo import TurboVAED

SETTINGS = VAEDistillationSettings(
    total_steps=3,
    warmup_steps=1,
    size_px=32,
    crop_px=(16, 32),
    clip_latents=(1, 2),
    batch_pixels=2000,
    evaluation_clips=1,
    checkpoint_steps=2,
    evaluate_steps=2,
    widths=(4, 4, 4, 4),
    blocks=(1, 2, 1),
    head_channels=4,
    layers=1,
    precision="fp32",
)
TURBO = replace(SETTINGS, student="turbo", feature_pairs=("decoder.mid_block=decoder.mid_block",))


class Killed(Exception):
    pass


def tiny_folder(path):
    torch.manual_seed(0)
    config = {"latent_channels": 4, "encoder_width": 4, "decoder_widths": (8, 6, 4, 4)}
    statistics = {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}
    TinyVideoVAE(**config, **statistics, first_frame_copies=3).half().save_pretrained(path)
    return str(path)


def causal_folder(path):
    torch.manual_seed(0)
    vae = CausalVideoVAE(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)
    vae.save_pretrained(path)
    return str(path)


def small_folder(path):
    torch.manual_seed(0)
    small = {"block_out_channels": (4, 4, 8), "temporal_levels": (True, True)}
    kernels = {"encoder_temporal_kernels": (1, 3, 3), "decoder_temporal_kernels": (1, 3, 3)}
    CausalVideoVAE(**small, **kernels, layers_per_block=1, norm_num_groups=2).save_pretrained(path)
    return str(path)


def diffusers_folder(path):
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}
    AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, **statistics).save_pretrained(path)
    return str(path)


def test_a_tiny_student_keeps_all_but_the_decoder(tmp_path):
    torch.set_num_threads(1)
    settings = replace(SETTINGS, teacher=tiny_folder(tmp_path / "teacher"))
    distill_vae(settings, tmp_path / "run")
    teacher, student = (load_vae(tmp_path / name) for name in ("teacher", "run/vae"))
    assert list(student.config.decoder_widths) == [4, 4, 4, 4]
    assert list(student.config.decoder_blocks) == [1, 2, 1]
    assert list(student.config.decoder_spatial_strides) == [2, 2, 1]
    assert student.config.decoder_patch_size == 2 * teacher.config.patch_size
    frames = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = student.encode(frames)
        assert torch.equal(latents, teacher.encode(frames))
        assert student.decode(latents).shape == frames.shape
    assert student.spec == replace(teacher.spec, memory_latents=student.spec.memory_latents)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("build", [causal_folder, diffusers_folder])
def test_a_turbo_student_decodes_the_latents_of_any_teacher(tmp_path, build, precision):
    torch.set_num_threads(1)
    settings = replace(TURBO, teacher=build(tmp_path / "teacher"), precision=precision)
    distill_vae(settings, tmp_path / "run")
    teacher, student = (load_vae(tmp_path / name) for name in ("teacher", "run/vae"))
    assert isinstance(student, TurboVAED)
    assert student.spec.exactness == "exact"
    with torch.no_grad():
        latents = teacher.encode(torch.zeros(1, 3, 5, 32, 32))
        assert student.decode(latents).shape == (1, 3, 5, 32, 32)


@pytest.mark.parametrize("build", [causal_folder, diffusers_folder])
def test_a_tiny_student_learns_the_encoder_of_another_teacher(tmp_path, build):
    torch.set_num_threads(1)
    settings = replace(SETTINGS, teacher=build(tmp_path / "teacher"), encoder_width=4, total_steps=8)
    settings = replace(settings, learning_rate=0.01, log_steps=1)
    distill_vae(settings, tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert float(rows[-1]["latent"]) < float(rows[0]["latent"])
    judged = next(csv.DictReader((tmp_path / "run" / "evaluation.csv").open()))
    assert {"psnr_db", "teacher_psnr_db", "own_psnr_db"} < judged.keys()
    teacher, student = (load_vae(tmp_path / name) for name in ("teacher", "run/vae"))
    frames = torch.zeros(1, 3, 5, 32, 32)
    with torch.no_grad():
        assert student.encode(frames).shape == teacher.encode(frames).shape
        assert student(frames).shape == frames.shape


def test_perceptual_and_feature_losses_are_logged(tmp_path):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "vision")
    expected = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "vision" / "preprocessor_config.json").write_text(json.dumps(expected))
    settings = replace(SETTINGS, teacher=tiny_folder(tmp_path / "teacher"), total_steps=1)
    losses = {"perceptual_weight": 0.5, "perceptual_model": str(tmp_path / "vision")}
    distill_vae(replace(settings, **losses, feature_pairs=("decoder.7=decoder.7",)), tmp_path / "run")
    (row,) = csv.DictReader((tmp_path / "run" / "log.csv").open())
    parts = float(row["pixel"]) + settings.squared_weight * float(row["squared"])
    parts += 0.5 * float(row["perceptual"]) + float(row["feature"])
    assert float(row["loss"]) == pytest.approx(parts, rel=1e-4)
    assert min(float(row["perceptual"]), float(row["feature"])) > 0


@torch.no_grad()
def test_the_default_student_of_the_embedded_model_has_a_third_of_its_arithmetic_at_most():
    teacher = load_vae(find_model("toyworld") / "vae")
    student = distilled_vae._new_student(VAEDistillationSettings(), teacher)
    operations = []
    for vae in (student, teacher):
        with FlopCounterMode(display=False) as counter:
            vae.decode_chunk(torch.zeros(1, 16, 3, 8, 8), vae.init_state("decode", 1, 128, 128))
        operations.append(counter.get_total_flops())
    assert 3 * operations[0] <= operations[1]


def test_the_record_tells_command_and_results(tmp_path):
    torch.set_num_threads(1)
    settings = replace(SETTINGS, teacher=tiny_folder(tmp_path / "teacher"), total_steps=1)
    (tmp_path / "teacher" / "training").mkdir()
    (tmp_path / "teacher" / "training" / "vae.json").write_text("{}")
    distill_vae(settings, tmp_path / "run")
    folder = tmp_path / "run" / "vae" / "training"
    assert sorted(path.name for path in folder.iterdir()) == [
        "distilled_vae.csv",
        "distilled_vae.json",
        "distilled_vae_evaluation.csv",
        "vae.json",
    ]
    record = json.loads((folder / "distilled_vae.json").read_text())
    words = shlex.split(record["command"])
    assert words[:3] == ["genstream", "distill", "vae"]
    assert parse_settings("genstream distill vae", VAEDistillationSettings, words[3:])[0] == settings
    assert record["results"].keys() == {"psnr_db", "teacher_psnr_db", "speedup"}
    assert record["results"]["speedup"] > 0
    assert replace(settings, videos="clips").origins.videos == "clips"
    retrain(tmp_path / "teacher")
    with pytest.raises(ValueError, match="teacher must hold what the run in"):
        distill_vae(settings, tmp_path / "run")


def test_a_run_that_was_cut_off_goes_on_as_if_it_was_not(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    settings = replace(SETTINGS, teacher=tiny_folder(tmp_path / "teacher"))
    distill_vae(settings, tmp_path / "whole")

    class Cut(DecoderDistillation):
        def loss(self, step):
            if step == 2:
                raise Killed
            return super().loss(step)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(distilled_vae, "DecoderDistillation", Cut)
        distill_vae(settings, tmp_path / "cut")
    assert not (tmp_path / "cut" / "vae").exists()
    distill_vae(settings, tmp_path / "cut")
    whole, continued = (load_vae(tmp_path / name / "vae").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(value, continued[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("build", "wrong", "error"),
    [
        (
            small_folder,
            {},
            "student must be 'turbo' for this teacher: .* divides by 8, got .*spatial_ratio=4",
        ),
        (causal_folder, {"student": "turbo", "widths": (4, 4)}, "widths must be 4 numbers .* ratio 8, got"),
        (tiny_folder, {"widths": (4, 4)}, "decoder_widths must be 4 numbers"),
        (tiny_folder, {"blocks": (2, 0, 1)}, "decoder_blocks must be 3 numbers above 0, got .2, 0, 1."),
        (
            tiny_folder,
            {"feature_pairs": ("decoder.0=decoder.99",)},
            "layers of TinyVideoVAE, such as decoder.*; got 'decoder.99'",
        ),
        (tiny_folder, {"crop_px": (20,)}, "crop_px must be a positive multiple of 8"),
    ],
)
def test_what_does_not_fit_the_teacher_is_refused_before_the_run_starts(tmp_path, build, wrong, error):
    settings = replace(SETTINGS, teacher=build(tmp_path / "teacher"), **wrong)
    with pytest.raises(ValueError, match=error):
        distill_vae(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_folder_stands_for_its_vae(tmp_path):
    torch.set_num_threads(1)
    tiny_folder(tmp_path / "model" / "vae")
    (tmp_path / "model" / "model_index.json").write_text("{}")
    distill_vae(replace(SETTINGS, teacher=str(tmp_path / "model"), total_steps=1), tmp_path / "run")
    assert (tmp_path / "run" / "vae" / "config.json").is_file()


def test_a_teacher_without_encoder_is_refused(tmp_path):
    widths = {"decoder_block_out_channels": (4, 4), "decoder_layers_per_block": (1, 1, 1)}
    scales = {"decoder_is_dw_conv": (False,) * 3, "spatio_temporal_scaling": (True, False)}
    TurboVAED(latent_channels=4, **widths, **scales).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="teacher must encode its clips, got TurboVAED"):
        distill_vae(replace(SETTINGS, teacher=str(tmp_path / "teacher")), tmp_path / "run")


def test_a_teacher_whose_frames_are_shifted_is_refused(tmp_path):
    small = {"latent_channels": 4, "encoder_width": 4, "decoder_widths": (4, 4, 4, 4)}
    TinyVideoVAE(**small).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"teacher must decode frames at .* got first_frame_copies = 0"):
        distill_vae(replace(SETTINGS, teacher=str(tmp_path / "teacher")), tmp_path / "run")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"student": "huge"}, "student must be 'tiny' or 'turbo', got 'huge'"),
        ({"widths": (2, 2, 2, 2)}, r"widths must be numbers of at least 3, got \[2, 2, 2, 2\]"),
        ({"widths": (0,), "student": "turbo"}, r"widths must be numbers of at least 1, got \[0\]"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"growths": 4}, "growths must be from 0 to 3, got 4"),
        ({"feature_pairs": ("a",)}, "feature_pairs must be like .*, got 'a'"),
        ({"latents_noise": 1.0}, r"latents_noise must be in \[0, 1\), got 1\.0"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        (
            {"perceptual_weight": 1.0},
            r"perceptual_model must be given for perceptual_weight = 1\.0, got None",
        ),
    ],
)
def test_bad_settings(wrong, error):
    with pytest.raises(ValueError, match=error):
        replace(SETTINGS, **wrong)
