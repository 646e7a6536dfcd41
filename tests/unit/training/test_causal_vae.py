import csv
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from retraining import retrain
from torch import nn

from genstream.cli.settings import parse_settings
from genstream.training import causal_vae
from genstream.training.causal_vae import CausalVAETrainee, CausalVAETrainingSettings, train_causal_vae
from genstream.training.loop import LoopSettings, run
from genstream.training.record import Origins
from genstream.training.vae_losses import VAELossWeights, VAEObjective, VisionAlignment
from genstream.training.vae_windows import Caption, ClipSource, WindowSettings
from genstream.vae.causal import CausalVideoVAE
from genstream.vae.loading import load_vae

SETTINGS = CausalVAETrainingSettings(
    total_steps=3,
    warmup_steps=1,
    size_px=32,
    crop_px=(16,),
    clip_latents=(1, 3),
    batch_pixels=2000,
    evaluation_clips=1,
    checkpoint_steps=2,
    evaluate_steps=2,
    block_out_channels=(4, 4, 8, 8),
    layers_per_block=1,
    norm_num_groups=2,
    wavelet_weight=0.1,
    window_frames=4,
    precision="fp32",
)


class Killed(Exception):
    pass


def image_folder(path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.5,
    )
    vae.save_pretrained(path)
    return str(path)


def training_clips(step: int) -> torch.Tensor:
    """Images, short clips and long ones in turn."""
    generator = torch.Generator().manual_seed(step % 3)
    colours = torch.rand((2, 3, 1, 2, 2), generator=generator) * 2 - 1
    return (
        colours.repeat_interleave(8, 3).repeat_interleave(8, 4).expand(-1, -1, (1, 5, 13)[step % 3], -1, -1)
    )


def test_a_run_with_every_loss_makes_the_vae_better(tmp_path):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = CausalVideoVAE(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)
    alignment = VisionAlignment(4, 3, 4, lambda images: nn.functional.avg_pool2d(images, 8))
    weights = VAELossWeights(perceptual=1.0, kl=1e-6, wavelet=0.1, alignment=0.1)
    objective = VAEObjective(vae, weights, lambda a, b: (a - b).square().flatten(1).mean(dim=1), alignment)
    clips = ClipSource(training=training_clips, evaluation=[training_clips(1)])
    trainee = CausalVAETrainee(objective, clips, WindowSettings(window_frames=4))
    loop = LoopSettings(
        total_steps=18, learning_rate=5e-3, warmup_steps=1, log_steps=3, evaluate_steps=9, ema_decay=0.5
    )
    before = trainee.evaluate()["psnr_db"]
    run(loop, trainee, tmp_path)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert float(rows[-1]["reconstruction"]) < float(rows[0]["reconstruction"])
    assert {"perceptual", "kl", "wavelet", "alignment"} < set(rows[0])
    judged = [float(row["psnr_db"]) for row in csv.DictReader((tmp_path / "evaluation.csv").open())]
    assert min(judged) > before + 0.5
    assert len(judged) == 2


def test_a_decoder_learns_to_follow_captions(tmp_path):
    """Black and white clips, told apart by their captions."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    vae = CausalVideoVAE(text_dim=2, latents="deterministic", **small)
    vae.encoder.requires_grad_(requires_grad=False)
    signs = (torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0]))

    def caption(step):
        return Caption(text=signs[step % 2].view(2, 1, 1).expand(-1, -1, 2), mask=torch.ones(2, 1))

    def clips(step):
        return signs[step % 2].view(2, 1, 1, 1, 1).expand(-1, 3, 5, 16, 16)

    trainee = CausalVAETrainee(
        VAEObjective(vae, VAELossWeights()),
        ClipSource(training=clips, evaluation=[clips(0)]),
        WindowSettings(window_frames=4),
        caption,
    )
    loop = LoopSettings(total_steps=8, learning_rate=1e-2, warmup_steps=1, log_steps=8, evaluate_steps=8)
    run(loop, trainee, tmp_path)
    assert vae.decoder.text_attentions[0].to_out.weight.abs().max() > 1e-3
    latents, results = torch.zeros(2, 4, 2, 2, 2), []
    for step in range(2):
        state = vae.init_state("decode", 2, 16, 16)
        vae.condition(state, caption(step).text, caption(step).mask)
        results.append(vae.decode_chunk(latents, state))
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_from_nothing_to_a_normalised_vae(tmp_path):
    torch.set_num_threads(1)
    train_causal_vae(SETTINGS, tmp_path / "run")
    vae = load_vae(tmp_path / "run" / "vae")
    assert isinstance(vae, CausalVideoVAE)
    latents = vae.encode(torch.rand(1, 3, 5, 32, 32) * 2 - 1)
    assert vae.decode(latents).shape == (1, 3, 5, 32, 32)
    # The statistics are those of the toy world, in whose latents there is less than in noise.
    assert vae.config.latents_mean != [0.0] * 4
    assert all(0 < std < 1 for std in vae.config.latents_std)


def test_from_an_image_vae_whose_statistics_stay(tmp_path):
    torch.set_num_threads(1)
    settings = replace(SETTINGS, initial_image_vae=image_folder(tmp_path / "image"), total_steps=1)
    train_causal_vae(replace(settings, learning_rate=1e-9), tmp_path / "run")
    vae, image_vae = (load_vae(tmp_path / name) for name in ("run/vae", "image"))
    assert vae.config.latents_std == [2.0] * 4
    frame = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(frame), image_vae.encode(frame), atol=0.01, rtol=0.01)
    retrain(tmp_path / "image")
    with pytest.raises(ValueError, match="initial_image_vae must hold what the run in"):
        train_causal_vae(replace(settings, learning_rate=1e-9), tmp_path / "run")


def test_what_a_run_is_made_from():
    features = {"perceptual_weight": 1.0, "perceptual_model": "dino"}
    assert SETTINGS.origins == Origins()
    assert replace(SETTINGS, videos="clips", **features).origins.models.keys() == {"perceptual_model"}
    for changes in ({}, features):
        origins = replace(SETTINGS, videos="clips", initial_image_vae="image", **changes).origins
        assert origins.videos == "clips"
        assert origins.models["initial_image_vae"]() == Path("image")


def test_the_record_tells_command_and_results(tmp_path):
    torch.set_num_threads(1)
    settings = replace(SETTINGS, latents="deterministic", kl_weight=0.0, latent_channels=16, total_steps=1)
    train_causal_vae(settings, tmp_path / "run")
    folder = tmp_path / "run" / "vae" / "training"
    names = ["causal_vae.csv", "causal_vae.json", "causal_vae_evaluation.csv"]
    assert sorted(path.name for path in folder.iterdir()) == names
    record = json.loads((folder / "causal_vae.json").read_text())
    words = shlex.split(record["command"])
    assert words[:3] == ["genstream", "train", "causal-vae"]
    assert parse_settings("genstream train causal-vae", CausalVAETrainingSettings, words[3:])[0] == settings
    judged = list(csv.DictReader((folder / "causal_vae_evaluation.csv").open()))
    assert record["results"] == {"psnr_db": float(judged[-1]["psnr_db"])}


def test_a_run_that_was_cut_off_goes_on_as_if_it_was_not(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    train_causal_vae(SETTINGS, tmp_path / "whole")

    class Cut(CausalVAETrainee):
        def loss(self, step):
            if step == 2:
                raise Killed
            return super().loss(step)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(causal_vae, "CausalVAETrainee", Cut)
        train_causal_vae(SETTINGS, tmp_path / "cut")
    train_causal_vae(SETTINGS, tmp_path / "cut")
    whole, continued = (load_vae(tmp_path / name / "vae") for name in ("whole", "cut"))
    assert whole.config.latents_mean == continued.config.latents_mean
    states = whole.state_dict(), continued.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_an_image_vae_of_another_architecture_is_refused(tmp_path):
    settings = replace(SETTINGS, initial_image_vae=image_folder(tmp_path / "image"), latent_channels=16)
    with pytest.raises(ValueError, match="latent_channels must be 4 like initial_image_vae's, got 16"):
        train_causal_vae(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    CausalVideoVAE(block_out_channels=(4, 4, 8, 8), norm_num_groups=2).save_pretrained(tmp_path / "video")
    with pytest.raises(ValueError, match="initial_image_vae must be an AutoencoderKL, got CausalVideoVAE"):
        train_causal_vae(replace(settings, initial_image_vae=str(tmp_path / "video")), tmp_path / "run")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"latents": "deterministic"}, "kl_weight must be 0 for latents 'deterministic', got 1e-06"),
        ({"wavelet_weight": -1.0}, r"wavelet_weight must be at least 0 and finite, got -1\.0"),
        ({"window_frames": 6}, "window_frames must be a multiple of 4 for temporal_levels = .*, got 6"),
        ({"gradient_windows": 0}, "gradient_windows must be at least 1, got 0"),
        (
            {"perceptual_weight": 1.0},
            r"perceptual_model must be given for perceptual_weight = 1\.0, got None",
        ),
    ],
)
def test_bad_settings(wrong, error):
    with pytest.raises(ValueError, match=error):
        replace(SETTINGS, **wrong)
