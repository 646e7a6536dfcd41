"""`genstream train causal-vae` and `genstream distill vae`, and what their results are good for."""

import json
import shutil

import numpy as np
import pytest

from genstream.cli.__main__ import main
from genstream.io.metadata import VideoMetadata
from genstream.io.model_folder import find_model
from genstream.io.writer import open_writer
from genstream.vae.loading import load_vae

CAUSAL = {
    "total_steps": 2,
    "size_px": 32,
    "crop_px": [16],
    "clip_latents": [1, 2],
    "batch_pixels": 2000,
    "evaluation_clips": 1,
    "block_out_channels": [4, 4, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "precision": "bf16",
}
DISTILLED = {
    "total_steps": 2,
    "size_px": 64,
    "crop_px": [32],
    "clip_latents": [2],
    "batch_pixels": 2000,
    "evaluation_clips": 1,
    "widths": [16, 8, 8, 8],
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder, with two videos in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    (tmp_path / "causal.json").write_text(json.dumps(CAUSAL))
    (tmp_path / "distilled.json").write_text(json.dumps(DISTILLED))
    metadata = VideoMetadata(prompt="", seed=0, model="")
    for name in ("a.mp4", "b.webm"):
        path = tmp_path / "clips" / name
        with open_writer(path, fps=16, width=48, height=32, metadata=metadata, overwrite=True) as writer:
            writer.write(np.random.default_rng(0).integers(0, 255, (7, 32, 48, 3), np.uint8))
    return tmp_path


def test_train_on_videos_and_distil_what_was_trained(workplace):
    assert main(["train", "causal-vae", "--config", "causal.json", "--videos", "clips"]) == 0
    words = ["distill", "vae", "--teacher", "runs/causal-vae/vae", "--student", "turbo", "--layers", "1"]
    words += ["--config", "distilled.json", "--videos", "clips", "--feature-pairs"]
    assert main([*words, '["decoder.mid_block=decoder.mid_block"]']) == 0
    teacher, student = (load_vae(workplace / "runs" / name / "vae") for name in ("causal-vae", "distill-vae"))
    assert student.spec.latent_channels == teacher.spec.latent_channels
    record = json.loads((workplace / "runs/distill-vae/vae/training/distilled_vae.json").read_text())
    assert record["settings"]["videos"] == "clips"
    assert (workplace / "runs/distill-vae/vae/training/causal_vae.json").is_file()


def test_a_distilled_decoder_stands_in_for_its_teacher(workplace):
    assert main(["distill", "vae", "--teacher", "toyworld", "--config", "distilled.json"]) == 0
    shutil.copytree(find_model("toyworld"), "model")
    shutil.rmtree("model/vae")
    shutil.copytree("runs/distill-vae/vae", "model/vae")
    words = ["generate", "a red circle moving right", "--model", "model", "--frames", "9", "--size", "64x64"]
    assert main([*words, "-o", "out.mp4"]) == 0
    assert (workplace / "out.mp4").stat().st_size > 0


def test_a_video_that_is_no_use_is_skipped_and_told(workplace, caplog):
    (workplace / "clips" / "text.mp4").write_text("not a video")
    assert main(["train", "causal-vae", "--config", "causal.json", "--videos", "clips"]) == 0
    assert "videos skipped" in caplog.text
    assert "text.mp4' cannot be read" in caplog.text
    assert (workplace / "runs" / "causal-vae" / "vae" / "config.json").is_file()


def test_a_folder_without_a_video_that_is_of_use_ends_in_one_line(workplace, capsys):
    (workplace / "other").mkdir()
    (workplace / "other" / "text.mp4").write_text("not a video")
    assert main(["train", "causal-vae", "--config", "causal.json", "--videos", "other"]) == 2
    assert "videos must hold more than evaluation_clips" in capsys.readouterr().err
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["train", "causal-vae", "--latents", "discrete"], "latents"),
        (["train", "causal-vae", "--block-out-channels", "[4, 4]"], "block_out_channels|temporal_levels"),
        (
            ["distill", "vae", "--teacher", "nowhere"],
            "teacher must be a VAE: folder must hold a VAE, in config.json or vae/config.json, got 'nowhere'",
        ),
        (["distill", "vae", "--student", "huge"], "student must be"),
        (["distill"], "needs a part or --recipe"),
    ],
)
def test_bad_input_ends_in_one_line(workplace, capsys, words, error):
    assert main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("genstream: error: ")
    assert any(part in message for part in error.split("|"))
    assert message.count("\n") == 1


def test_help_tells_about_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "vae", "--help"])
    text = capsys.readouterr().out
    for name in ("videos", "total_steps", "widths"):
        assert f"    {name}: " in text
        assert f"--{name.replace('_', '-')} " in text
