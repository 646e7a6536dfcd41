"""Wrong usage ends in one line on stderr, exit code 2 and no file, before torch is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from genstream.cli.__main__ import main

ROOT = Path(__file__).resolve().parents[3]
PROMPT = "a red circle"


def check_error(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("genstream: error: ")
    assert captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["COMMAND"]),
        (["paint"], ["'paint'", "generate"]),
        (["generate"], ["prompt"]),
        (["generate", ""], ["prompt must not be empty"]),
        (["generate", "  "], ["prompt must not be empty"]),
        (["generate", PROMPT, "--seconds", "1e308"], ["seconds must give a number of frames at 16 fps"]),
        (["generate", PROMPT, "--fram", "5"], ["unrecognized arguments: --fram 5"]),
        (["evaluate", "toyworld", "--prom", "5"], ["unrecognized arguments: --prom 5"]),
        (["generate", PROMPT, "--colour", "red"], ["unrecognized arguments: --colour"]),
        (["generate", PROMPT, "--size", "big"], ["--size", "WIDTHxHEIGHT", "'big'"]),
        (
            ["generate", PROMPT, "--seconds", "4", "--frames", "5"],
            ["--frames", "not allowed with", "--seconds"],
        ),
        (["generate", PROMPT, "--seconds", "0"], ["seconds must be a positive number, got 0.0"]),
        (["generate", PROMPT, "--seconds", "nan"], ["seconds must be a positive number, got nan"]),
        (
            ["generate", PROMPT, "--seconds", "0.01"],
            ["seconds must be long enough for one frame at 16 fps, got 0.01"],
        ),
        (["generate", PROMPT, "--frames", "0"], ["num_frames (--frames) must be at least 1", "got 0"]),
        (["generate", PROMPT, "--fps", "0"], ["fps must be a positive number, got 0.0"]),
        (
            ["generate", PROMPT, "--switch", "at four: blue"],
            ["--switch", "4s: a blue square", "'at four: blue'"],
        ),
        (["generate", PROMPT, "--switch", "9s: blue"], ["switch at 9.0s", "seconds 4.0"]),
        (["generate", PROMPT, "--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
        (["generate", PROMPT, "-o", "out.avi"], ["output path", ".webm", "'out.avi'"]),
        (["generate", PROMPT, "-o", "missing/out.mp4"], ["'missing/out.mp4'", "does not exist"]),
        (["generate", PROMPT, "-o", "taken.mp4", "--no-overwrite"], ["'taken.mp4'", "overwriting is off"]),
        (["generate", PROMPT, "-o", "folder.mp4"], ["'folder.mp4' is a folder"]),
        (["generate", PROMPT, "-o", "out.png"], ["'out.png'", "takes 1 frame, got 64", "--frames 1"]),
        (["generate", PROMPT, "--image", "missing.png"], ["'missing.png'", "No such file"]),
        (["generate", PROMPT, "--image", "taken.mp4"], ["'taken.mp4'", "not a whole image"]),
        (["generate", PROMPT, "--image", "small.png"], ["small.png", "8x8", "64x32"]),
    ],
)
def test_usage(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    parts: list[str],
):
    monkeypatch.chdir(tmp_path)
    Path("taken.mp4").write_text("mine")
    Path("folder.mp4").mkdir()
    Image.new("RGB", (8, 8)).save("small.png")
    before = sorted(tmp_path.rglob("*"))
    model = ["--model", str(model_folder)] if arguments[:1] == ["generate"] else []
    check_error(capsys, [*arguments, *model], *parts)
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_model(capsys: pytest.CaptureFixture[str]):
    for name in ("sora", ""):
        check_error(capsys, ["generate", PROMPT, "--model", name], "model must be one of", repr(name))


@pytest.mark.parametrize(
    "damage", ["missing weights", "cut weights", "cut header", "missing part", "cut json"]
)
def test_damaged_model(model_folder: Path, capsys: pytest.CaptureFixture[str], damage: str):
    weights = model_folder / "transformer" / "model.safetensors"
    config = model_folder / "transformer" / "config.json"
    if damage == "missing weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "cut header":
        weights.write_bytes(weights.read_bytes()[:20])
    elif damage == "missing part":
        (model_folder / "scheduler" / "scheduler_config.json").unlink()
        (model_folder / "scheduler").rmdir()
    else:
        config.write_text('{"a": ')
    for command in (["generate", PROMPT, "--model", str(model_folder)], ["models", str(model_folder)]):
        check_error(capsys, command, "scheduler" if damage == "missing part" else "transformer")


def test_debug_shows_where(model_folder: Path):
    with pytest.raises(ValueError, match="must not be empty"):
        main(["generate", "", "--model", str(model_folder), "--debug"])


def test_help_needs_no_torch():
    code = "import sys; from genstream.cli.__main__ import build_parser; build_parser().format_help();"
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
