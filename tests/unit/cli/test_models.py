"""`genstream models` tells what a folder holds without loading it."""

import json
from pathlib import Path

import pytest

from genstream.cli.__main__ import main


def test_describes_a_folder(model_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["models", str(model_folder)]) == 0
    out = capsys.readouterr().out
    for part in ("tiny: four weights", "64x32 at 16 fps", "transformer 0.00 M", "colours: red, blue"):
        assert part in out


def test_folder_without_a_card(model_folder: Path, capsys: pytest.CaptureFixture[str]):
    (model_folder / "model_card.json").unlink()
    assert main(["models", str(model_folder)]) == 0
    assert "\ntiny\n" in capsys.readouterr().out  # after the installed models


def test_sharded_weights(model_folder: Path, capsys: pytest.CaptureFixture[str]):
    index = {"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}
    (model_folder / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["models", str(model_folder)]) == 2
    assert "more.safetensors' is missing" in capsys.readouterr().err
