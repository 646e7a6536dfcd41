"""The record that a trained model carries: what command made it, with which settings, and how it went."""

import json
import logging
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock, Timeout

from genstream.io.checkpoint import sha256
from genstream.io.digest import folder_digest, videos_digest
from genstream.io.model_folder import INDEX_NAME, read_json, read_object
from genstream.io.partial import write_whole
from genstream.io.reader import video_files
from genstream.training.processes import once, process

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

RECORD_FOLDER = "training"
_SETTINGS_NAME = "settings.json"
_ORIGINS_NAME = "origins.json"
_MODELS_NAME, _PROMPTS_NAME = "models.json", "prompts.sha256"
"""Where earlier versions kept the digests of models and prompts."""
_LOCK_NAME = ".lock"
_SAVES_NOTHING = (_SETTINGS_NAME, _ORIGINS_NAME, _MODELS_NAME, _PROMPTS_NAME, _LOCK_NAME)
_CHECKPOINTS = ("checkpoints/step_*", "*/checkpoints/step_*")
"""Places in a run; those of a run with phases lie in their folders."""
_SHOWN_SETTINGS = 3
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate")
_CONFIGS = (INDEX_NAME, "config.json")
"""One of them is in the folder of every model."""


@dataclass(frozen=True, kw_only=True)
class Origins:
    """What a run is made from.

    Attributes:
        models: by the setting that gives each, what finds its folder, or raises ValueError if there is none.
        prompts: text file.
        videos: folder.
        beside_videos: suffixes of files beside the videos that are read too, such as ".txt".
    """

    models: Mapping[str, Callable[[], Path]] = field(default_factory=dict)
    prompts: str | None = None
    videos: str | None = None
    beside_videos: tuple[str, ...] = ()

    def digests(self) -> dict[str, str]:
        """Of all that is still there, by the setting that gives it; the record of a model may change."""
        digests = {}
        for name, find in self.models.items():
            try:
                folder = find()
            except ValueError:
                continue
            if any((folder / config).is_file() for config in _CONFIGS):
                digests[name] = folder_digest(folder, without=RECORD_FOLDER)
        if self.prompts is not None and (file := Path(self.prompts)).is_file():
            digests["prompts"] = sha256(file)
        if self.videos is not None and (files := video_files(self.videos, self.beside_videos)):
            digests["videos"] = videos_digest(Path(self.videos), files)
        return digests


@contextmanager
def claimed_run(output: Path, settings: "DataclassInstance", origins: Origins) -> Iterator[None]:
    """Make `output` the folder of a run with these settings, and keep other commands away meanwhile.

    A run that has saved nothing yet may change its settings and origins. It is kept until its result is
    written: what another command would change before that, no record would tell.

    Args:
        output: the folder.
        settings: of the run.
        origins: what must stay as it is, like the settings.

    Raises:
        ValueError: another command is at the run, or it has other settings or origins and would be continued
            with ones that its record does not tell.
    """
    with _alone(output):
        once(lambda: _claim(output, settings, origins))
        yield


def is_finished(result: Path, name: str, settings: "DataclassInstance", steps: int, origins: Origins) -> bool:
    """Whether the record `name` of a run's result tells these settings and so many steps; the log says so.

    Raises:
        ValueError: it does, but something that the run was made from is another one by now. What is gone is
            not: finished runs may be kept without what they were made from.
    """
    path = result / RECORD_FOLDER / f"{name}.json"
    if not path.is_file():
        return False
    record = read_object(path)
    if record.get("settings") != _as_json(settings) or record.get("steps") != steps:
        return False
    before = record.get("origins", record.get("models", {}))  # as earlier versions called them

    def check() -> None:
        _check_same(result.parent, settings, before, origins.digests())
        logger.info("finished before: %s", result)

    once(check)
    return True


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other commands away from the run; the lock is gone with the process, however that ends."""
    if not process().is_main_process:
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"output must be a folder, got {str(output)!r}: {error.strerror}") from error
    lock = FileLock(output / _LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"output must be a run at which no other process is, got {str(output)!r}") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _claim(output: Path, settings: "DataclassInstance", origins: Origins) -> None:
    path, values, has_saved = output / _SETTINGS_NAME, _as_json(settings), _has_saved(output)
    if has_saved and path.is_file():
        _check_settings(output, values)
    elif saved := next((path for place in _CHECKPOINTS for path in output.glob(place)), None):
        raise ValueError(
            f"output must be a new folder or a run with its {_SETTINGS_NAME}, got {str(output)!r}, where "
            f"nothing tells how {str(saved)!r} was made: give another output"
        )
    else:
        write_whole(path, json.dumps(values, indent=1) + "\n")
    before, now = _origins_of(output) if has_saved else {}, origins.digests()
    _check_same(output, settings, before, now)
    write_whole(output / _ORIGINS_NAME, json.dumps({**before, **now}, indent=1) + "\n")


def _check_settings(run: Path, values: Mapping[str, object]) -> None:
    """Whether a run has these settings."""
    path = run / _SETTINGS_NAME
    before = read_json(path)
    if not isinstance(before, dict):
        raise ValueError(f"{str(path)!r} must hold the settings of a run, got {type(before).__name__}")
    if others := sorted(name for name in before.keys() - values.keys() if before[name] is not None):
        raise ValueError(
            f"output must be a new folder or a run of this command, got {str(run)!r}, a run of another "
            f"command or version, with settings that this one has not: {', '.join(others[:_SHOWN_SETTINGS])}"
        )
    for name in sorted(before.keys() | values.keys()):
        old, new = before.get(name), values.get(name)
        if old != new:
            raise ValueError(f"{name} must stay {old!r} in the run that {str(run)!r} holds, got {new!r}")


def _origins_of(run: Path) -> dict[str, str]:
    """Digests of what a run is made from; earlier versions have kept none, or fewer."""
    path = run / _ORIGINS_NAME
    if path.is_file():
        return read_object(path)
    models, prompts = run / _MODELS_NAME, run / _PROMPTS_NAME
    digests = read_object(models) if models.is_file() else {}
    return {**digests, "prompts": prompts.read_text()} if prompts.is_file() else digests


def _check_same(
    run: Path, settings: "DataclassInstance", before: Mapping[str, str], now: Mapping[str, str]
) -> None:
    """Whether what a run is made from is what was there before."""
    for name, digest in now.items():
        if before.get(name, digest) != digest:
            given = _as_json(settings)[name]
            raise ValueError(
                f"{name} must hold what the run in {str(run)!r} is made from, got something else in "
                f"{given!r}: remove that run, and what was made from it, to have them made anew, or give "
                "another output"
            )


def _as_json(settings: "DataclassInstance") -> dict[str, object]:
    """Their values as json gives them back."""
    values: dict[str, object] = json.loads(json.dumps(asdict(settings)))
    return values


def _has_saved(output: Path) -> bool:
    """Whether a run's folder holds what its settings made: logs, checkpoints, sampled paths."""
    for path in output.rglob("*"):
        parts = path.relative_to(output).parts
        if path.is_file() and parts[0] not in _SAVES_NOTHING and "partial" not in str(parts):
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
        """The command line that trains like this, into the same folder."""
        words = ["genstream", self.verb, self.part]
        for setting in fields(self.settings):
            value = getattr(self.settings, setting.name)
            factory = setting.default_factory
            if value != (setting.default if factory is MISSING else factory()):
                text = value if isinstance(value, str) else json.dumps(value)
                words += [f"--{setting.name.replace('_', '-')}", shlex.quote(text)]
        return " ".join([*words, "--output", shlex.quote(_place(self.run))])


def _place(run: Path) -> str:
    """A run's folder as others name it; outside of the working directory a path says nothing elsewhere."""
    if run.is_absolute():
        here = Path.cwd()
        run = run.relative_to(here) if run.is_relative_to(here) else Path("runs", run.name)
    return run.as_posix()


def write_record(model: Path, training: Training) -> None:
    """Write a csv file for each log and a json file into the record of the model in folder `model`."""
    folder = model / RECORD_FOLDER
    folder.mkdir(exist_ok=True)
    for name, log in training.logs.items():
        shutil.copyfile(log, folder / f"{name}.csv")
    record = {
        "command": training.command,
        "steps": training.steps,
        "settings": asdict(training.settings),
        "origins": _origins_of(training.run),
        "versions": {name: version(name) for name in _PACKAGES},
        "results": training.results,
    }
    # Behind all else: it tells that the run is finished.
    write_whole(folder / f"{training.name}.json", json.dumps(record, indent=1) + "\n")
