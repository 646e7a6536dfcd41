"""`genstream distill vae|causal|student`: small and fast from large and slow; a run that was cut off goes on.

vae is a small decoder that replaces a large one, causal a stream of few steps that follows a teacher's own
samples, student such a stream that a teacher corrects.
"""

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
    part = parts.add_parser(
        "causal", help="make a teacher a causal student of few steps", add_help=False, allow_abbrev=False
    )
    part.set_defaults(run=_distill_causal, takes_more=True)
    part = parts.add_parser(
        "student", help="distil a student from a teacher by self forcing", add_help=False, allow_abbrev=False
    )
    part.set_defaults(run=_distill_student, takes_more=True)


def _distill_vae(arguments: argparse.Namespace) -> int:
    from genstream.training.distilled_vae import VAEDistillationSettings, distill_vae

    return run_training("genstream distill vae", VAEDistillationSettings, distill_vae, arguments)


def _distill_causal(arguments: argparse.Namespace) -> int:
    from genstream.training.adaptation import AdaptationSettings, adapt_teacher

    return run_training("genstream distill causal", AdaptationSettings, adapt_teacher, arguments)


def _distill_student(arguments: argparse.Namespace) -> int:
    from genstream.training.self_forcing import SelfForcingSettings, distill_student

    return run_training("genstream distill student", SelfForcingSettings, distill_student, arguments)
