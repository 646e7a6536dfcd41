"""Recipes: training runs one after the other, from nothing to a model; a chain that was cut off goes on.

A recipe is a folder with a `recipe.json`, which names the stages and their commands in order, and a config
file for each stage. Folders in a config (`vae`, `initial`, `text_encoder`, `teacher`) are those of earlier
stages, or installed models; `prompts` and `videos` are paths from the recipe's folder.
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genstream.cli.settings import parse_settings
from genstream.cli.trainers import RECIPE_INDEX, RECIPES, TRAINERS, known_recipes
from genstream.io.model_folder import INDEX_NAME, RESULT_FOLDER, installed_models, read_object
from genstream.io.partial import partial_path
from genstream.streaming.settings import StreamSettings
from genstream.training.adaptation import AdaptationSettings
from genstream.training.model_config import ModelConfig
from genstream.training.model_run import LATENTS_FOLDER
from genstream.training.processes import once
from genstream.training.prompts import TextPrompts
from genstream.training.self_forcing import SelfForcingSettings
from genstream.training.student import StudentTrainingSettings
from genstream.training.teacher import TeacherTrainingSettings

logger = logging.getLogger(__name__)

_PLACES = ("vae", "initial", "text_encoder", "teacher")
_DATA = ("prompts", "videos")
_TRAINED = (StudentTrainingSettings, TeacherTrainingSettings)
_TAKEN = (RESULT_FOLDER, LATENTS_FOLDER)
"""Folders beside those of the stages."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of a recipe.

    Attributes:
        name: its folder in the recipe's.
        command: such as "train vae".
        settings: of that command.
        train: runs it into a folder.
    """

    name: str
    command: str
    settings: Any
    train: Callable[[Any, Path], None]


def read_recipe(name_or_folder: str, output: Path) -> list[Stage]:
    """The stages of a recipe whose runs lie in `output`; all settings are checked.

    Raises:
        ValueError: there is no such recipe; a stage's command or one of its settings is unknown or wrong.
    """
    folder = RECIPES / name_or_folder if name_or_folder in known_recipes() else Path(name_or_folder)
    if not (folder / RECIPE_INDEX).is_file():
        raise ValueError(
            f"recipe must be one of {', '.join(known_recipes())} or a folder with a {RECIPE_INDEX}, "
            f"got {name_or_folder!r}"
        )
    stages = read_object(folder / RECIPE_INDEX).get("stages")
    if not isinstance(stages, dict) or not stages:
        raise ValueError(f"stages in {str(folder / RECIPE_INDEX)!r} must name at least one, got {stages!r}")
    made: list[Stage] = []
    for name, command in stages.items():
        made.append(_stage(name, command, folder / f"{name}.json", output, [stage.name for stage in made]))
    _check_streams(made, output)
    return made


def run_recipe(stages: list[Stage], output: Path) -> Path | None:
    """Run all stages that are not finished yet.

    Returns:
        The folder of the model that the last one made, copied to `output`/model; None if it made none.
    """
    for number, stage in enumerate(stages, 1):
        logger.info("stage %d of %d: genstream %s, %s", number, len(stages), stage.command, stage.name)
        stage.train(stage.settings, output / stage.name)
    made, model = output / stages[-1].name / RESULT_FOLDER, output / RESULT_FOLDER

    if not (made / INDEX_NAME).is_file():
        return None

    def copy() -> None:
        # Under another name, so that a kill never leaves half of a model: what has no index is none.
        partial = partial_path(model)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(made, partial)
        (model / INDEX_NAME).unlink(missing_ok=True)
        shutil.rmtree(model, ignore_errors=True)
        partial.rename(model)

    once(copy)
    return model


def _stage(name: str, command: str, config: Path, output: Path, earlier: list[str]) -> Stage:
    if not name.isidentifier() or name in _TAKEN:
        raise ValueError(f"stages must have names like a_b_1, but not {' or '.join(_TAKEN)}, got {name!r}")
    if command not in TRAINERS:
        raise ValueError(f"command of stage {name!r} must be one of {', '.join(TRAINERS)}, got {command!r}")
    if not config.is_file():
        raise ValueError(f"recipe file {str(config)!r} is missing")
    kind, train = TRAINERS[command].load()
    settings, _ = parse_settings(f"genstream {command}", kind, ["--config", str(config)])
    videos = getattr(settings, "videos", None)
    places: dict[str, str] = {}
    for setting in _PLACES:
        unused = setting == "vae" and videos is not None  # then `initial` brings its own
        if not unused and (value := getattr(settings, setting, None)) is not None:
            place = _place(value, output, earlier)
            if place is None:
                raise ValueError(
                    f"{setting} of stage {name!r} must be in the folder of an earlier stage "
                    f"({', '.join(earlier) or 'there is none'}) or an installed model, got {value!r}"
                )
            places[setting] = place
    for setting in _DATA:
        if (value := getattr(settings, setting, None)) is not None:
            places[setting] = _beside(config, value)
    if not (output / name).exists():  # what is finished may have lost what it was made from
        _check_data(name, places)
    return Stage(name=name, command=command, settings=replace(settings, **places), train=train)


def _check_streams(stages: Sequence[Stage], output: Path) -> None:
    """Whether models that are not made yet will stream as the stages that start from them need it."""
    planned: dict[str, StreamSettings] = {}

    def stream(name: str, given: str) -> StreamSettings | None:
        if Path(given).is_relative_to(output):
            return planned.get(Path(given).relative_to(output).parts[0])
        return ModelConfig.of(name, given).settings

    for stage in stages:
        settings = stage.settings
        try:
            if isinstance(settings, SelfForcingSettings):
                teacher, made = stream("teacher", settings.teacher), stream("initial", settings.initial)
                if teacher is not None and made is not None:
                    settings.check_streams(teacher, made)
            elif isinstance(settings, AdaptationSettings):
                made = settings.stream
                if (teacher := stream("teacher", settings.teacher)) is not None:
                    settings.check_streams(teacher)
            else:
                made = settings.stream if isinstance(settings, _TRAINED) else None
        except ValueError as error:
            raise ValueError(f"stage {stage.name!r}: {error}") from error
        if made is not None:
            planned[stage.name] = made


def _check_data(name: str, places: Mapping[str, str]) -> None:
    """Whether there are the prompts and videos that a stage is to learn from."""
    if "prompts" in places:
        TextPrompts(Path(places["prompts"]))
    if "videos" in places and not Path(places["videos"]).is_dir():
        raise ValueError(f"videos of stage {name!r} must be a folder, got {places['videos']!r}")


def _beside(config: Path, given: str) -> str:
    """A path of a config, however the recipe's folder was given."""
    return given if Path(given).is_absolute() else os.path.relpath(config.parent / given)


def _place(value: str, output: Path, earlier: list[str]) -> str | None:
    """Where an earlier stage made what a setting names; None where nothing can be."""
    if Path(value).parts[:1] in [(name,) for name in earlier]:
        return str(output / value)
    return value if value in installed_models() else None
