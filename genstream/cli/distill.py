"""`genstream distill vae`: trains a small decoder to replace a large one; a run that was cut off goes on."""

import argparse

from genstream.cli.train import run_training


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line; its options are its settings, listed by --help."""
    parser = commands.add_parser(
        "distill", help="make a model smaller and faster", description=__doc__, allow_abbrev=False
    )
    parts = parser.add_subparsers(required=True, metavar="PART")
    part = parts.add_parser(
        "vae", help="distil the decoder of a video VAE", add_help=False, allow_abbrev=False
    )
    part.set_defaults(run=_distill_vae, takes_more=True)


def _distill_vae(arguments: argparse.Namespace) -> int:
    from genstream.training.distilled_vae import VAEDistillationSettings, distill_vae

    return run_training("genstream distill vae", VAEDistillationSettings, distill_vae, arguments)
