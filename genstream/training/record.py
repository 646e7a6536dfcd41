"""The record that a trained model carries: what command made it, with which settings, and how it went."""

import json
import shutil
from dataclasses import MISSING, asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RECORD_FOLDER = "training"
SETTINGS_NAME = "settings.json"
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


def claim_run(output: Path, settings: "DataclassInstance") -> None:
    """Make `output` the folder of a run with these settings.

    Raises:
        ValueError: it holds a run with other settings, which would be continued with settings that its
            record does not tell.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / SETTINGS_NAME
    values = json.loads(json.dumps(asdict(settings)))
    if path.is_file():
        before = json.loads(path.read_text())
        for name in sorted(before.keys() | values.keys()):
            old, new = before.get(name), values.get(name)
            if old != new:
                raise ValueError(
                    f"{name} must stay {old!r} in the run that {str(output)!r} holds, got {new!r}"
                )
    path.write_text(json.dumps(values, indent=1) + "\n")


def write_record(model: Path, part: str, settings: "DataclassInstance", logs: dict[str, Path]) -> None:
    """Write `<part>.json` and a csv file for each of `logs` into the model's record.

    Args:
        model: folder of the model.
        part: what was trained, as in `genstream train PART`.
        settings: of the training.
        logs: name and log.csv of every phase.
    """
    folder = model / RECORD_FOLDER
    folder.mkdir(exist_ok=True)
    record = {
        "command": command(part, settings),
        "settings": asdict(settings),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    (folder / f"{part}.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, log in logs.items():
        shutil.copyfile(log, folder / f"{name}.csv")


def command(part: str, settings: "DataclassInstance") -> str:
    """The command line that trains with these settings, into `runs/<part>`."""
    words = ["genstream", "train", part]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != (field.default if field.default_factory is MISSING else field.default_factory()):
            text = value if isinstance(value, str) else json.dumps(value)
            words += [f"--{field.name.replace('_', '-')}", text if " " not in text else f"'{text}'"]
    return " ".join([*words, "--output", f"runs/{part}"])
