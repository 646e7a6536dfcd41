"""`genstream train vae|text|student|teacher|causal-vae`: trains from nothing; a run that was cut off goes on.

vae, text and student are the parts of the embedded model, a teacher is what students can be distilled from,
and causal-vae is a video VAE for any videos.
"""

import argparse

from genstream.cli.trainers import parts_of, run_training


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line; the options of each part are its settings, listed by --help."""
    parser = commands.add_parser(
        "train", help="train a model or a VAE", description=__doc__, allow_abbrev=False
    )
    parts = parser.add_subparsers(required=True, metavar="PART")
    for name, trainer in parts_of("train").items():
        part = parts.add_parser(name, help=trainer.text, add_help=False, allow_abbrev=False)
        part.set_defaults(run=run, command=f"train {name}", takes_more=True)


def run(arguments: argparse.Namespace) -> int:
    """Train the part."""
    return run_training(arguments.command, arguments.more)
