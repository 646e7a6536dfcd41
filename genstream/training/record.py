"""The record that a trained model carries: what command made it, with which settings, and how it went."""

import json
import os
import shlex
import shutil
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from genstream.io.model_folder import read_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RECORD_FOLDER = "training"
SETTINGS_NAME = "settings.json"
LOCK_NAME = ".lock"
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


def claim_run(output: Path, settings: "DataclassInstance") -> None:
    """Make `output` the folder of a run with these settings; one that has saved nothing yet may change them.

    Raises:
        ValueError: it holds a run with other settings, which would be continued with settings that its
            record does not tell.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / SETTINGS_NAME
    values = json.loads(json.dumps(asdict(settings)))
    if path.is_file() and _has_saved(output):
        before = read_json(path)
        if not isinstance(before, dict):
            raise ValueError(f"{str(path)!r} must hold the settings of a run, got {type(before).__name__}")
        for name in sorted(before.keys() | values.keys()):
            old, new = before.get(name), values.get(name)
            if old != new:
                raise ValueError(
                    f"{name} must stay {old!r} in the run that {str(output)!r} holds, got {new!r}"
                )
        return
    written = path.with_name(f"{path.name}.{os.getpid()}.partial")
    written.write_text(json.dumps(values, indent=1) + "\n")
    written.replace(path)


def _has_saved(output: Path) -> bool:
    """Whether a run's folder holds what its settings made: logs, checkpoints, sampled paths."""
    for path in output.rglob("*"):
        parts = path.relative_to(output).parts
        if path.is_file() and parts[0] not in (SETTINGS_NAME, LOCK_NAME) and "partial" not in str(parts):
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of a training command.

    Attributes:
        name: of its files in the record.
        part: what was trained, as in `genstream train PART`.
        verb: "distill" for `genstream distill PART`.
        run: its folder.
        settings: its settings.
        logs: name in the record and log.csv of every phase.
        steps: steps behind the weights, fewer than in the settings if the run was cut short.
        results: figures of what came out.
    """

    name: str
    part: str
    run: Path
    settings: "DataclassInstance"
    logs: dict[str, Path]
    steps: int
    verb: Literal["train", "distill"] = "train"
    results: dict[str, float] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command line that trains like this, into the folder of that name in `runs`."""
        words = ["genstream", self.verb, self.part]
        for setting in fields(self.settings):
            value = getattr(self.settings, setting.name)
            factory = setting.default_factory
            if value != (setting.default if factory is MISSING else factory()):
                text = value if isinstance(value, str) else json.dumps(value)
                words += [f"--{setting.name.replace('_', '-')}", shlex.quote(text)]
        return " ".join([*words, "--output", f"runs/{self.run.name}"])


def write_record(model: Path, training: Training) -> None:
    """Write a json file and a csv file for each log into the record of the model in folder `model`."""
    folder = model / RECORD_FOLDER
    folder.mkdir(exist_ok=True)
    record = {
        "command": training.command,
        "steps": training.steps,
        "settings": asdict(training.settings),
        "versions": {name: version(name) for name in _PACKAGES},
        "results": training.results,
    }
    (folder / f"{training.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, log in training.logs.items():
        shutil.copyfile(log, folder / f"{name}.csv")
