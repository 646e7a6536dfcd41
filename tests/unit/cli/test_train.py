"""The two training commands, one after the other, make a model that the other commands take."""

import json
import logging

from genstream.cli.__main__ import main

VAE = {
    "joint_steps": 2,
    "decoder_steps": 2,
    "clips": 4,
    "size_px": 64,
    "latent_channels": 12,
    "encoder_width": 12,
    "decoder_widths": [6, 5, 4, 4],
    "precision": "fp32",
}
STUDENT = {
    "total_steps": 2,
    "batch_size": 2,
    "clips": 4,
    "clip_chunks": 6,
    "chunk_frames": 1,
    "window_chunks": 1,
    "width": 48,
    "layers": 1,
    "ffn_width": 48,
    "text_width": 16,
    "text_layers": 1,
    "precision": "fp32",
}


def test_from_nothing_to_a_video(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vae.json").write_text(json.dumps(VAE))
    (tmp_path / "student.json").write_text(json.dumps(STUDENT))
    with caplog.at_level(logging.INFO, logger="genstream"):
        assert main(["train", "vae", "--config", "vae.json", "--output", "runs/vae"]) == 0
        student = ["train", "student", "--config", "student.json", "--vae", "runs/vae/vae"]
        assert main([*student, "--output", "runs/student"]) == 0
    assert "step 2/2  loss" in caplog.text
    generate = ["generate", "a red circle moving right", "--model", "runs/student/model", "--frames", "5"]
    assert main([*generate, "--size", "64x64", "-o", "out.mp4"]) == 0
    assert (tmp_path / "out.mp4").stat().st_size > 0
    record = sorted(path.name for path in (tmp_path / "runs/student/model/training").iterdir())
    assert record == [
        "student.csv",
        "student.json",
        "vae.json",
        "vae_decoder.csv",
        "vae_joint.csv",
    ]
