"""`genstream distill vae|causal|student`: small and fast from large and slow; a run that was cut off goes on.

vae is a small decoder that replaces a large one, causal a stream of few steps that follows a teacher's own
samples, student such a stream that a teacher corrects. With --recipe, a whole chain of training runs, from
nothing to a model, and a report of it.
"""

import argparse
from pathlib import Path

from genstream.cli.trainers import parts_of, run_training, show_training


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line; the options of each part are its settings, listed by --help."""
    parser = commands.add_parser(
        "distill", help="make a model smaller and faster", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--recipe", help="toyworld, or a folder with a recipe.json")
    parser.add_argument("--output", type=Path, help="folder of the recipe's runs (runs/RECIPE)")
    parser.set_defaults(run=run_chain)
    parts = parser.add_subparsers(metavar="PART")
    for name, trainer in parts_of("distill").items():
        part = parts.add_parser(name, help=trainer.text, add_help=False, allow_abbrev=False)
        part.set_defaults(run=run, command=f"distill {name}", takes_more=True)


def run(arguments: argparse.Namespace) -> int:
    """Distil the part."""
    if arguments.recipe is not None:
        raise ValueError(f"--recipe runs a whole chain, without a part, got {arguments.command}")
    return run_training(arguments.command, arguments.more)


def run_chain(arguments: argparse.Namespace) -> int:
    """Run a recipe and write its report."""
    if arguments.recipe is None:
        raise ValueError("distill needs a part or --recipe (see genstream distill --help)")
    from genstream.cli.recipe import read_recipe, run_recipe
    from genstream.cli.report import write_report

    output = arguments.output or Path("runs") / Path(arguments.recipe).name
    stages = read_recipe(arguments.recipe, output)
    show_training()
    model = run_recipe(stages, output)
    print(f"model: {model}")
    print(f"report: {write_report(stages, output)}")
    return 0
