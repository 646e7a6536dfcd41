"""Options are the fields of a settings class."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_type_hints

import pytest

from genstream.cli.__main__ import main
from genstream.cli.settings import parse_settings
from genstream.cli.trainers import TRAINERS


@dataclass(frozen=True, kw_only=True)
class ExampleSettings:
    """Settings of an example."""

    steps: int
    learning_rate: float = 1e-3
    device: str | None = None
    data: Path | None = None
    shuffle: bool = True
    loss: Literal["l1", "l2"] = "l1"
    sizes: tuple[int, ...] = (64, 128)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


def parse(*texts: str) -> tuple[ExampleSettings, Path]:
    return parse_settings("genstream train example", ExampleSettings, ["--output", "runs", *texts])


def test_options():
    settings, output = parse(
        *("--steps", "7", "--learning-rate", "0.5", "--device", "cpu", "--data", "x"),
        *("--shuffle", "false", "--loss", "l2", "--sizes", "[32]"),
    )
    assert output == Path("runs")
    assert settings == ExampleSettings(
        steps=7, learning_rate=0.5, device="cpu", data=Path("x"), shuffle=False, loss="l2", sizes=(32,)
    )


def test_this_folder_has_the_name_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "inner").mkdir()
    for here, text in ((tmp_path, "."), (tmp_path / "inner", "..")):
        monkeypatch.chdir(here)
        _, output = parse_settings(
            "genstream train example", ExampleSettings, ["--steps", "8", "--output", text]
        )
        assert output == tmp_path


def test_config_gives_way_to_options(tmp_path: Path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"steps": 3, "data": "folder", "sizes": [1, 2], "device": "cuda"}))
    settings, _ = parse("--config", str(config), "--steps", "9", "--device", "none")
    assert settings == ExampleSettings(steps=9, data=Path("folder"), sizes=(1, 2), device=None)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "needs --steps"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--step", "3"], "unrecognized arguments: --step 3"),
        (["--steps", "3", "--sizes", "32"], "--sizes: must be a json list .* each a whole number, got 32"),
        (["--steps", "3", "--sizes", "null"], "--sizes: must be a json list .*, got null"),
        (["--steps", "3", "--sizes", "[1.5]"], "--sizes: must be a whole number, got 1.5"),
        (["--steps", "3", "--sizes", "[true]"], "--sizes: must be a whole number, got true"),
        (["--steps", "3", "--sizes", "[1"], "--sizes: must be a json list"),
        (["--steps", "3", "--shuffle", "1"], "--shuffle: must be true or false, got 1"),
        (["--steps", "3", "--shuffle", "no"], "--shuffle: must be true or false, got 'no'"),
    ],
)
def test_wrong_options(texts: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        parse(*texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"stepz": 3}', "no setting 'stepz'; allowed: steps"),
        ("[1]", "object"),
        ("{", "valid"),
        ('{"steps": "3"}', 'steps in config .* must be a whole number, got "3"'),
        ('{"shuffle": "no"}', 'shuffle in config .* must be true or false, got "no"'),
        ('{"sizes": 32}', "sizes in config .* must be a json list .*, got 32"),
        ('{"loss": "l3"}', "loss in config .* must be 'l1' or 'l2', got \"l3\""),
        ('{"data": null, "steps": null}', "steps in config .* must be a whole number, got null"),
    ],
)
def test_wrong_config(tmp_path: Path, content: str, message: str):
    config = tmp_path / "config.json"
    config.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse("--config", str(config))


def test_config_must_be_there(tmp_path: Path):
    with pytest.raises(ValueError, match=r"config must be a json file, got '.*nothing\.json'"):
        parse("--config", str(tmp_path / "nothing.json"))


def test_part_must_exist(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "nothing"]) == 2
    assert "student" in capsys.readouterr().err


USED_WITH = {
    "context_noise": {"forcing": "teacher"},
    "sid_alpha": {"objective": "sid"},
    "smoothness": {"objective": "gan"},
    "perceptual_weight": {"perceptual_model": "folder"},
}
"""Without these another rule refuses the setting before its value counts."""


@pytest.mark.parametrize("command", TRAINERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1.0])
def test_no_trainer_takes_numbers_that_it_would_fail_at(command, value):
    kind, _ = TRAINERS[command].load()
    hints = get_type_hints(kind)
    names = [name for name, hint in hints.items() if hint in (float, float | None)]
    assert names
    for name in names:
        if (name, value) == ("time_mean", -1.0):
            continue  # of normal numbers
        others = {other: given for other, given in USED_WITH.get(name, {}).items() if other in hints}
        with pytest.raises(ValueError, match=rf"^{name}\b.* {value}$|^least_noise and most_noise .*{value}"):
            kind(**{**others, name: value})


@pytest.mark.parametrize("command", [name for name in TRAINERS if name != "train vae"])
def test_learning_rates_that_no_float_holds_are_refused(command):
    kind, _ = TRAINERS[command].load()
    with pytest.raises(ValueError, match=r"^learning_rate must be above 0 and at most 1, got 1e\+38"):
        kind(learning_rate=1e38)
