"""Unreadable and ill-sized input ends in one clear line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genstream.io.reader import read_image, read_video


def save(path: Path, mode: str = "RGB", colour: object = (200, 10, 30)) -> Path:
    Image.new(mode, (32, 16), colour).save(path)
    return path


@pytest.mark.parametrize(
    ("mode", "colour"), [("RGB", (200, 10, 30)), ("RGBA", (200, 10, 30, 255)), ("L", 77)]
)
def test_read_image(tmp_path: Path, mode: str, colour: object):
    frame = read_image(save(tmp_path / "a.png", mode, colour), height=16, width=32)
    assert frame.shape == (16, 32, 3)
    assert frame.dtype == np.uint8
    assert frame[0, 0].tolist() == [77] * 3 if mode == "L" else [200, 10, 30]


def test_other_size(tmp_path: Path):
    with pytest.raises(ValueError, match="is 32x16, the video is 128x128; resize"):
        read_image(save(tmp_path / "a.png"), height=128, width=128)


def test_transparent(tmp_path: Path):
    with pytest.raises(ValueError, match="transparent"):
        read_image(save(tmp_path / "a.png", "RGBA", (1, 2, 3, 100)), height=16, width=32)


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "cut"])
def test_unreadable_image(tmp_path: Path, kind: str):
    path = tmp_path / "a.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "cut":
        noise = np.random.default_rng(0).integers(0, 255, (16, 32, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(path, height=16, width=32)


@pytest.mark.parametrize("kind", ["missing.mp4", "text.mp4", "empty"])
def test_unreadable_video(tmp_path: Path, kind: str):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=kind):
        list(read_video(tmp_path / kind))
