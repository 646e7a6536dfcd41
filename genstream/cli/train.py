"""`genstream train vae|teacher|student|causal-vae`: trains from nothing; a run that was cut off goes on.

vae and student are the parts of the embedded model, a teacher is what students can be distilled from, and
causal-vae is a video VAE for any videos.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from genstream.cli.settings import parse_settings

S = TypeVar("S")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line; the options of each part are its settings, listed by --help."""
    parser = commands.add_parser(
        "train", help="train a VAE or the student", description=__doc__, allow_abbrev=False
    )
    parts = parser.add_subparsers(required=True, metavar="PART")
    for name, run, text in (
        ("vae", _train_vae, "train the tiny video VAE of the embedded model"),
        ("teacher", _train_teacher, "train a many-step model of whole clips, to distil students from"),
        ("student", _train_student, "train the few-step student on a trained VAE"),
        ("causal-vae", _train_causal_vae, "train a causal video VAE on videos or the toy world"),
    ):
        part = parts.add_parser(name, help=text, add_help=False, allow_abbrev=False)
        part.set_defaults(run=run, takes_more=True)


def _train_vae(arguments: argparse.Namespace) -> int:
    from genstream.training.vae import VAETrainingSettings, train_vae

    return run_training("genstream train vae", VAETrainingSettings, train_vae, arguments)


def _train_student(arguments: argparse.Namespace) -> int:
    from genstream.training.student import StudentTrainingSettings, train_student

    return run_training("genstream train student", StudentTrainingSettings, train_student, arguments)


def _train_teacher(arguments: argparse.Namespace) -> int:
    from genstream.training.teacher import TeacherTrainingSettings, train_teacher

    return run_training("genstream train teacher", TeacherTrainingSettings, train_teacher, arguments)


def _train_causal_vae(arguments: argparse.Namespace) -> int:
    from genstream.training.causal_vae import CausalVAETrainingSettings, train_causal_vae

    return run_training("genstream train causal-vae", CausalVAETrainingSettings, train_causal_vae, arguments)


def run_training(
    prog: str, kind: type[S], train: Callable[[S, Path], None], arguments: argparse.Namespace
) -> int:
    """Train with settings of class `kind` from the command line; the trainers' log lines go to stderr."""
    from genstream.cli.pipeline import quiet_loading

    settings, output = parse_settings(prog, kind, arguments.more)
    quiet_loading()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    train(settings, output)
    return 0
