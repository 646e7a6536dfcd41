"""`genstream train vae|student`: trains the parts of the embedded model; a run that was cut off goes on."""

import argparse
import logging

from genstream.cli.settings import parse_settings


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line; the options of each part are its settings, listed by --help."""
    parser = commands.add_parser(
        "train", help="train the VAE or the student", description=__doc__, allow_abbrev=False
    )
    parts = parser.add_subparsers(required=True, metavar="PART")
    for name, run, text in (
        ("vae", _train_vae, "train the video VAE"),
        ("student", _train_student, "train the few-step student on a trained VAE"),
    ):
        part = parts.add_parser(name, help=text, add_help=False, allow_abbrev=False)
        part.set_defaults(run=run, takes_more=True)


def _train_vae(arguments: argparse.Namespace) -> int:
    from genstream.training.vae import VAETrainingSettings, train_vae

    settings, output = parse_settings("genstream train vae", VAETrainingSettings, arguments.more)
    _show_progress()
    train_vae(settings, output)
    return 0


def _train_student(arguments: argparse.Namespace) -> int:
    from genstream.training.student import StudentTrainingSettings, train_student

    settings, output = parse_settings("genstream train student", StudentTrainingSettings, arguments.more)
    _show_progress()
    train_student(settings, output)
    return 0


def _show_progress() -> None:
    """The trainers' log lines on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
