"""The training commands: what each one trains, with which settings; and the recipes that chain them."""

import importlib
import logging
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import genstream.training
from genstream.cli.settings import parse_settings

RECIPES = Path(genstream.training.__file__).parent / "recipes"
RECIPE_INDEX = "recipe.json"


@dataclass(frozen=True)
class Trainer:
    """What a training command runs; its module, which imports torch, is loaded when it is needed.

    Attributes:
        module: in `genstream.training`.
        settings: name of the class of its settings there.
        function: name of the function that trains with them into a folder.
        text: what it does, for help.
    """

    module: str
    settings: str
    function: str
    text: str

    def load(self) -> tuple[type[Any], Callable[[Any, Path], None]]:
        """Class of the settings, and the function."""
        module = importlib.import_module(f"genstream.training.{self.module}")
        return getattr(module, self.settings), getattr(module, self.function)


TRAINERS: Mapping[str, Trainer] = {
    "train vae": Trainer(
        "vae", "VAETrainingSettings", "train_vae", "train the tiny video VAE of the embedded model"
    ),
    "train text": Trainer(
        "text_encoder",
        "TextTrainingSettings",
        "train_text_encoder",
        "train the text encoder of the embedded model on captions",
    ),
    "train teacher": Trainer(
        "teacher",
        "TeacherTrainingSettings",
        "train_teacher",
        "train a many-step model of whole clips, to distil students from",
    ),
    "train student": Trainer(
        "student", "StudentTrainingSettings", "train_student", "train the few-step student on a trained VAE"
    ),
    "train causal-vae": Trainer(
        "causal_vae",
        "CausalVAETrainingSettings",
        "train_causal_vae",
        "train a causal video VAE on videos or the toy world",
    ),
    "distill vae": Trainer(
        "distilled_vae", "VAEDistillationSettings", "distill_vae", "distil the decoder of a video VAE"
    ),
    "distill causal": Trainer(
        "adaptation", "AdaptationSettings", "adapt_teacher", "make a teacher a causal student of few steps"
    ),
    "distill student": Trainer(
        "self_forcing",
        "SelfForcingSettings",
        "distill_student",
        "distil a student from a teacher by self forcing",
    ),
}


def parts_of(verb: str) -> dict[str, Trainer]:
    """Trainers of `genstream VERB PART`, by part."""
    return {
        name.removeprefix(f"{verb} "): trainer
        for name, trainer in TRAINERS.items()
        if name.startswith(f"{verb} ")
    }


def known_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(path.parent.name for path in RECIPES.glob(f"*/{RECIPE_INDEX}"))


def run_training(command: str, texts: list[str], others: ArgumentParser | None = None) -> int:
    """Train with settings from the command line; `others` are options besides, which help lists too."""
    kind, train = TRAINERS[command].load()
    settings, output = parse_settings(f"genstream {command}", kind, texts, others)
    show_training()
    train(settings, output)
    return 0


def show_training() -> None:
    """The trainers' log lines go to stderr, and nothing else does."""
    from genstream.cli.pipeline import quiet_loading

    quiet_loading()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
