"""`generate` end to end, on a pipeline of tiny random weights."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from genstream.cli.__main__ import main
from genstream.cli.pipeline import to_uint8
from genstream.io.reader import read_video
from genstream.io.writer import VideoWriter
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.streaming.controls import PromptControl
from genstream.streaming.engine import CacheEngine, NonFiniteError
from genstream.streaming.state import StreamState

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(build_pipeline, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved pipeline for 32x32 clips; its scores mean nothing, its files and numbers of frames do."""
    folder = tmp_path_factory.mktemp("model")
    build_pipeline().save_pretrained(folder)
    return str(folder)


def generate(model: str, *texts: str) -> int:
    return main(["generate", "a red circle moving right", "--model", model, "--device", "cpu", *texts])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("genstream: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("texts", "frames"),
    [([], 64), (["--frames", "21"], 21), (["--seconds", "1"], 16), (["--seconds", "1", "--fps", "7"], 7)],
)
def test_lengths(model: str, tmp_path: Path, texts: list[str], frames: int):
    assert generate(model, "-o", str(tmp_path / "out.mp4"), *texts) == 0
    assert sum(1 for _ in read_video(tmp_path / "out.mp4")) == frames
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_preset(model: str, tmp_path: Path):
    options = ["-o", str(tmp_path / "frames"), "--frames", "45", "--preset", "longlive"]
    assert generate(model, *options, "--switch", "1s: a blue square moving left") == 0
    pipe = CausalVideoPipeline.from_pretrained(model)
    pipe.apply_preset("longlive")
    state = pipe.start(pipe.request("a red circle moving right", num_frames=45))
    state.submit(PromptControl(prompt="a blue square moving left"), not_before=16)
    expected = np.concatenate([to_uint8(chunk.frames) for chunk in pipe.run(state)])
    np.testing.assert_array_equal(np.stack(list(read_video(tmp_path / "frames"))), expected)


def test_chunk_window_sinks_and_guidance(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--frames", "69", "--chunk", "2", "--window", "0", "--sink", "6", "--guidance-scale", "2.5"]
    assert generate(model, "-o", str(tmp_path / "frames"), *options) == 0
    pipe = CausalVideoPipeline.from_pretrained(model)
    given = {"chunk_frames": 2, "window_frames": 0, "sink_frames": 6, "guidance_scale": 2.5}
    settings = replace(pipe.settings, **given)
    chunks = pipe.stream("a red circle moving right", num_frames=69, settings=settings)
    expected = np.concatenate([to_uint8(chunk.frames) for chunk in chunks])
    np.testing.assert_array_equal(np.stack(list(read_video(tmp_path / "frames"))), expected)
    assert generate(model, "-o", str(tmp_path / "out.mp4"), "--window", "-1") == 2
    assert "window_frames (--window) must be at least 0, got -1" in error_of(capsys)
    assert generate(model, "-o", str(tmp_path / "out.mp4"), "--chunk", "0") == 2
    assert "chunk_frames (--chunk) must be at least 1, got 0" in error_of(capsys)


def test_a_lora_in_the_folder_is_told(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "lora").mkdir()
    assert generate(str(tmp_path / "model"), "-o", str(tmp_path / "out.mp4"), "--frames", "9") == 0
    told = f"the model holds a LoRA that is not in use: --lora {tmp_path / 'model' / 'lora'}"
    assert told in capsys.readouterr().err


def test_a_preset_that_the_model_cannot_run(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert generate(model, "-o", str(tmp_path / "out.mp4"), "--preset", "motionstream") == 2
    assert "'motionstream' is for image-to-video models" in error_of(capsys)
    assert not list(tmp_path.iterdir())


def test_half_precision_says_nothing_false(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("diffusers.pipelines.pipeline_utils"), "handle", records.append)
    assert generate(model, "-o", str(tmp_path / "out.mp4"), "--frames", "9", "--dtype", "float16") == 0
    assert [record for record in records if "cannot run with `cpu`" in record.getMessage()] == []


def test_eight_bit_weights(model: str, tmp_path: Path):
    assert generate(model, "-o", str(tmp_path / "out.mp4"), "--frames", "9", "--quantize", "int8") == 0
    assert sum(1 for _ in read_video(tmp_path / "out.mp4")) == 9


def test_options_of_memory_that_cannot_be(model: str, tmp_path: Path, capsys, monkeypatch):
    output = ("-o", str(tmp_path / "out.mp4"), "--frames", "9")
    assert generate(model, *output, "--offload", "group") == 2
    assert "offload (--offload) must be none on cpu, got group" in error_of(capsys)
    monkeypatch.setattr("genstream.pipelines.quantization.is_torchao_available", lambda: False)
    assert generate(model, *output, "--quantize", "fp8") == 2
    assert "fp8 weights need torchao: pip install 'genstream[quantization]'" in error_of(capsys)
    assert not list(tmp_path.iterdir())


def test_frames_are_those_of_the_pipeline(model: str, tmp_path: Path):
    assert generate(model, "-o", str(tmp_path / "frames"), "--frames", "21", "--seed", "5") == 0
    pipe = CausalVideoPipeline.from_pretrained(model)
    chunks = pipe.stream("a red circle moving right", num_frames=21, seed=5)
    expected = np.concatenate([to_uint8(chunk.frames) for chunk in chunks])
    np.testing.assert_array_equal(np.stack(list(read_video(tmp_path / "frames"))), expected)


def test_json(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert generate(model, "-o", str(tmp_path / "out.webm"), "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["frames"], figures["seconds"], figures["fps"], figures["seed"]) == (64, 4, 16, 0)
    assert 0 < figures["time_to_first_frame_s"] < figures["start_to_first_frame_s"]
    assert figures["chunk_latency_p50_s"] <= figures["chunk_latency_p95_s"]
    assert figures["real_time_factor"] == pytest.approx(figures["frame_rate"] / 16)


def test_seconds_that_are_no_whole_frames_are_told(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert generate(model, "-o", str(tmp_path / "out.mp4"), "--seconds", "1.03") == 0
    assert "note: 1.03 s at 16 fps become 16 frames, 1 s" in capsys.readouterr().err
    assert generate(model, "-o", str(tmp_path / "out.png"), "--seconds", "0.0625") == 0
    captured = capsys.readouterr()
    assert "note" not in captured.err
    assert "out.png: 1 frame, 32x32" in captured.out


def test_switch_changes_what_follows(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, texts in (("a", []), ("b", ["--switch", "1s: a blue circle moving left"])):
        assert generate(model, "-o", str(tmp_path / name), "--seconds", "3", "--json", *texts) == 0
    captured = capsys.readouterr()
    plain, switched = (json.loads(line)["switch_frames"] for line in captured.out.splitlines())
    first, second = (np.stack(list(read_video(tmp_path / name))) for name in "ab")
    differing = np.flatnonzero((first != second).any(axis=(1, 2, 3)))
    assert differing[0] == 21  # chunks of 3 latent frames: 9 frames, then 12 each
    assert (plain, switched) == ([], [21])
    assert "note: switch at 1s begins at frame 21, 1.312 s, where the next chunk starts" in captured.err
    assert "had no effect" not in captured.err


def test_switch_after_the_last_chunk_began(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        generate(model, "-o", str(tmp_path / "a"), "--seconds", "2", "--switch", "1.9s: a blue circle") == 2
    )
    assert "switch at 1.9s comes too late: the last chunk starts at 1.3125s" in error_of(capsys)
    assert os.listdir(tmp_path) == []


def test_two_switches_in_one_chunk(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    switches = ["--switch", "0.1s: a blue circle", "--switch", "0.2s: a red square"]
    assert generate(model, "-o", str(tmp_path / "a"), *switches) == 2
    assert "switch at 0.2s falls into the same chunk" in error_of(capsys)
    assert os.listdir(tmp_path) == []


def test_unknown_words(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = ["-o", str(tmp_path / "a.png"), "--frames", "1", "--model", model]
    assert main(["generate", "a red elephant", *output]) == 0
    captured = capsys.readouterr()
    assert "warning: the model never saw 'elephant'" in captured.err
    assert "circle" in captured.err
    assert main(["generate", "a red circle", *output]) == 0
    assert "warning" not in capsys.readouterr().err


def test_image(model: str, tmp_path: Path):
    Image.new("RGB", (32, 32), (200, 0, 0)).save(tmp_path / "start.png")
    assert (
        generate(model, "-o", str(tmp_path / "a"), "--image", str(tmp_path / "start.png"), "--frames", "5")
        == 0
    )
    assert sum(1 for _ in read_video(tmp_path / "a")) == 5


@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        (["--frames", "64"], ["num_frames (--frames) must be 1 + 4k, got 64", "61 and 65"]),
        (["--size", "40x32"], ["width (--size) must be a positive multiple of 16, got 40"]),
        (["--device", "cuda:99"], ["device", "'cuda:99'", "cpu"]),
        (["--switch", f"1s: {'red ' * 30}"], ["at most 12 tokens"]),
        (["--seed", "-1"], ["seed"]),
    ],
)
def test_bad_request(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], texts: list[str], parts: list[str]
):
    assert generate(model, "-o", str(tmp_path / "out.mp4"), *texts) == 2
    error = error_of(capsys)
    for part in parts:
        assert part in error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "out of memory: use a smaller",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: use a smaller --size"),
        (NonFiniteError("latents of chunk 1 (from latent frame 3) are not finite"), "not finite"),
    ],
)
def test_failure_in_the_middle(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    said: str,
):
    generate_chunk = CacheEngine.generate

    def fail_in_the_second_chunk(engine: CacheEngine, state: StreamState) -> torch.Tensor:
        if state.chunk_index == 1:
            raise failure
        return generate_chunk(engine, state)

    monkeypatch.setattr(CacheEngine, "generate", fail_in_the_second_chunk)
    assert generate(model, "-o", str(tmp_path / "out.mp4"), "--frames", "33") == 2
    error = error_of(capsys)
    assert said in error
    assert "out.partial.mp4" in error
    assert os.listdir(tmp_path) == ["out.partial.mp4"]
    assert sum(1 for _ in read_video(tmp_path / "out.partial.mp4")) == 9


def test_a_run_gives_the_model_that_it_made(model: str, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(Path(model).resolve())
    videos = [tmp_path / "model.png", tmp_path / "run.png"]
    for place, video in zip((model, str(tmp_path / "run")), videos, strict=True):
        assert generate(place, "-o", str(video), "--frames", "1") == 0
    (own,), (made,) = map(read_video, videos)
    assert np.array_equal(own, made)


def test_long_prompt(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "red " * 30, "--model", model, "-o", str(tmp_path / "out.mp4")]) == 2
    assert "prompt must have at most 12 tokens, got 31" in error_of(capsys)


def test_a_prompt_in_another_encoding(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "\udcff red", "--model", model, "-o", str(tmp_path / "out.mp4")]) == 2
    assert r"prompt must be text that UTF-8 holds, got '\udcff red'" in error_of(capsys)
    assert os.listdir(tmp_path) == []


def running(model: str, output: Path) -> subprocess.Popen[str]:
    """A long `generate` in a process of its own that has already written some frames."""
    command = [sys.executable, "-m", "genstream.cli", "generate", "a red circle", "--seconds", "3600"]
    process = subprocess.Popen(
        [*command, "--model", model, "-o", str(output), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "frames, " in line:
            return process
    raise AssertionError("ended before the first chunk")


def test_ctrl_c(model: str, tmp_path: Path):
    process = running(model, tmp_path / "out.mp4")
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 130
    figures = json.loads(out)
    assert figures["interrupted"]
    assert os.listdir(tmp_path) == ["out.mp4"]
    # The signal may fall between the writing and the counting of a chunk.
    assert sum(1 for _ in read_video(tmp_path / "out.mp4")) - figures["frames"] in (0, 12)


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_a_second_ctrl_c_does_not_stop_the_end_of_the_file(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
):
    finish, write = VideoWriter.finish, VideoWriter.write

    def write_two(writer: VideoWriter, frames: NDArray[np.uint8]) -> None:
        if writer.frames_written:
            os.kill(os.getpid(), signal.SIGINT)
        write(writer, frames)

    def finish_late(writer: VideoWriter) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        return finish(writer)

    monkeypatch.setattr(VideoWriter, "write", write_two)
    monkeypatch.setattr(VideoWriter, "finish", finish_late)
    output = tmp_path / f"out.{suffix}"
    before = signal.getsignal(signal.SIGINT)
    assert main(["generate", "a red circle", "--model", model, "-o", str(output)]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "interrupted: " in capsys.readouterr().out
    assert os.listdir(tmp_path) == [output.name]
    assert sum(1 for _ in read_video(output)) == 9  # the first chunk


def test_a_size_that_the_model_was_not_made_at(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["generate", "a red circle", "--model", model, "--frames", "1", "-o", str(tmp_path / "out.png")]
    assert main(command) == 0
    assert "warning" not in capsys.readouterr().err
    assert main([*command, "--size", "48x32"]) == 0
    said = "warning: the model was made at 32x32 pixels: a video of 48x32 may come out empty or torn"
    assert said in capsys.readouterr().err


def test_kill(model: str, tmp_path: Path):
    process = running(model, tmp_path / "out.mp4")
    # The first chunk is shorter than a fragment of the file.
    while b"moof" not in (tmp_path / "out.partial.mp4").read_bytes():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert os.listdir(tmp_path) == ["out.partial.mp4"]
    assert sum(1 for _ in read_video(tmp_path / "out.partial.mp4")) >= 1
