"""`transform` end to end, on a pipeline of tiny random weights."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from genstream.cli.__main__ import main
from genstream.cli.pipeline import to_uint8
from genstream.io.metadata import VideoMetadata
from genstream.io.reader import inspect_video, read_video
from genstream.io.writer import open_writer
from genstream.pipelines.causal_video import CausalVideoPipeline

PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def model(build_pipeline, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved pipeline for 32x32 clips."""
    folder = tmp_path_factory.mktemp("model")
    build_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A folder with a video of 26 frames, as a file and as png; outputs go beside it."""
    folder = tmp_path / "in"
    folder.mkdir()
    frames = np.zeros((26, 32, 32, 3), np.uint8)
    for index, frame in enumerate(frames):
        frame[8:20, index : index + 6] = 200
    for name in ("a.mp4", "frames"):
        metadata = VideoMetadata(prompt="a bar", seed=0, model="none")
        with open_writer(
            folder / name, fps=12.5, width=32, height=32, metadata=metadata, overwrite=False
        ) as writer:
            writer.write(frames)
    return folder


@pytest.fixture
def transform(model: str, clip: Path, tmp_path: Path) -> Callable[..., int]:
    """`transform(source, output, ...)`: the exit code of the command."""

    def transform(source: str, output: str, *texts: str) -> int:
        files = [str(clip / source), PROMPT, "-o", str(tmp_path / output)]
        return main(["transform", *files, "--model", model, "--device", "cpu", *texts])

    return transform


@pytest.mark.parametrize(
    ("texts", "frames", "fps"),
    [
        (["a.mp4"], 26, 12.5),
        (["a.mp4", "--frames", "10"], 10, 12.5),
        (["a.mp4", "--frames", "99", "--fps", "20"], 26, 20),
        (["frames", "--strength", "0.9", "--motion-aware"], 26, 16),
    ],
)
def test_lengths(transform: Callable[..., int], tmp_path: Path, texts: list[str], frames: int, fps: float):
    source, *options = texts
    output = tmp_path / "out.mp4"
    assert transform(source, output.name, *options) == 0
    written = inspect_video(output)
    assert (written.frames, written.fps) == (frames, fps)
    assert sorted(os.listdir(tmp_path)) == ["in", "out.mp4"]


def test_frames_are_those_of_the_pipeline(
    transform: Callable[..., int], model: str, clip: Path, tmp_path: Path
):
    assert transform("frames", "out", "--seed", "5", "--strength", "0.9") == 0
    pipe = CausalVideoPipeline.from_pretrained(model)
    chunks = pipe.transform(read_video(clip / "frames"), PROMPT, seed=5, strength=0.9)
    expected = np.concatenate([to_uint8(chunk.frames) for chunk in chunks])
    np.testing.assert_array_equal(np.stack(list(read_video(tmp_path / "out"))), expected)


def test_loras(
    transform: Callable[..., int],
    model: str,
    build_lora: Callable[..., dict[str, torch.Tensor]],
    clip: Path,
    tmp_path: Path,
):
    pipe = CausalVideoPipeline.from_pretrained(model)
    paths = [clip / f"{name}.safetensors" for name in "ab"]
    for seed, path in enumerate(paths):
        save_file(build_lora(pipe.transformer, seed=seed), path)
    assert transform("frames", "out", "--lora", f"{paths[0]}:0.5", "--lora", str(paths[1])) == 0
    pipe.load_lora_weights(paths[0], "a")
    pipe.load_lora_weights(paths[1], "b")
    pipe.set_adapters(["a", "b"], [0.5, 1.0])
    chunks = pipe.transform(read_video(clip / "frames"), PROMPT, seed=0)
    expected = np.concatenate([to_uint8(chunk.frames) for chunk in chunks])
    np.testing.assert_array_equal(np.stack(list(read_video(tmp_path / "out"))), expected)


def test_a_switch_and_the_figures(
    transform: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert transform("frames", "a") == 0
    capsys.readouterr()
    assert transform("frames", "b", "--switch", "1s: a blue square", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["frames"], figures["prompt"]) == (26, f"{PROMPT}; 1s: a blue square")
    first, second = (np.stack(list(read_video(tmp_path / name))) for name in "ab")
    differing = np.flatnonzero((first != second).any(axis=(1, 2, 3)))
    assert differing[0] == 21


@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        (
            ["a.mp4", "--size", "48x32"],
            ["a.mp4' is 32x32, the video is 48x32; resize it", "video of its size"],
        ),
        (["wide.png"], ["wide.png' is 64x32, the video is 32x32", "ask for a video of its size"]),
        (["a.mp4", "--strength", "0"], ["strength must be above 0 and at most 1, got 0"]),
        (["a.mp4", "--strength", "nan"], ["strength must be above 0 and at most 1, got nan"]),
        (["a.mp4", "--frames", "0"], ["num_frames (--frames) must be at least 1, got 0"]),
        (["missing.mp4"], ["missing.mp4' does not exist"]),
        (["a.mp4", "--preset", "rolling-forcing"], ["starts all chunks as noise and cannot follow a video"]),
        (["text.mp4"], ["text.mp4' cannot be read"]),
        (["empty"], ["empty' is a folder without any"]),
        (["a.mp4", "--lora", "none:0.5"], ["--lora: must be a file or folder", "got 'none:0.5', which does"]),
        (["a.mp4", "--lora", __file__], ["LoRA must be a .safetensors file"]),
    ],
)
def test_bad_input(
    transform: Callable[..., int],
    clip: Path,
    capsys: pytest.CaptureFixture[str],
    texts: list[str],
    parts: list[str],
):
    source, *options = texts
    Image.new("RGB", (64, 32)).save(clip / "wide.png")
    (clip / "text.mp4").write_text("no video")
    (clip / "empty").mkdir()
    assert transform(source, "out.mp4", *options) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    for part in parts:
        assert part in error
    assert os.listdir(clip.parent) == ["in"]
