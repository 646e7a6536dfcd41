"""`genstream models` tells what a folder holds without loading it."""

import json
from pathlib import Path

import pytest

from genstream.cli.__main__ import main
from genstream.streaming.presets import PRESETS


def test_describes_a_folder(model_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["models", str(model_folder)]) == 0
    out = capsys.readouterr().out
    for part in ("tiny: four weights", "64x32 at 16 fps", "transformer 0.00 M", "colours: red, blue"):
        assert part in out


def test_folder_without_a_card(model_folder: Path, capsys: pytest.CaptureFixture[str]):
    (model_folder / "model_card.json").unlink()
    assert main(["models", str(model_folder)]) == 0
    assert "\ntiny\n" in capsys.readouterr().out  # after the installed models


def test_presets_have_a_line_each(capsys: pytest.CaptureFixture[str]):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, preset in PRESETS.items():
        assert [line.split(maxsplit=1) for line in lines if line.startswith(f"  {name} ")] == [
            [name, preset.summary]
        ]


def test_sharded_weights(model_folder: Path, capsys: pytest.CaptureFixture[str]):
    index = {"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}
    (model_folder / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["models", str(model_folder)]) == 2
    assert "more.safetensors' is missing" in capsys.readouterr().err
