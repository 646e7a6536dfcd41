"""`genstream distill vae|causal|student`: small and fast from large and slow; a run that was cut off goes on.

vae is a small decoder that replaces a large one, causal a stream of few steps that follows a teacher's own
samples, student such a stream that a teacher corrects. With --recipe, a whole chain of training runs, from
nothing to a model, and a report of it.
"""

import argparse
from pathlib import Path

from genstream.cli.settings import parse_settings
from genstream.cli.trainers import (
    RECIPE_INDEX,
    TRAINERS,
    known_recipes,
    parts_of,
    run_training,
    show_training,
)
from genstream.cli.units import gpu_memory


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line; the options of each part are its settings, listed by --help."""
    parser = commands.add_parser(
        "distill", help="make a model smaller and faster", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--recipe", help=f"{', '.join(known_recipes())}, or a folder with a {RECIPE_INDEX}")
    parser.add_argument("--output", type=Path, help="folder of the recipe's runs (runs/RECIPE)")
    parser.set_defaults(run=run_chain)
    parts = parser.add_subparsers(metavar="PART")
    for name, trainer in parts_of("distill").items():
        others = _dry_run_options() if name == "student" else None
        part = parts.add_parser(
            name,
            help=trainer.text,
            add_help=False,
            allow_abbrev=False,
            parents=[] if others is None else [others],
        )
        part.set_defaults(run=run, command=f"distill {name}", takes_more=True, others=others)


def _dry_run_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    group = options.add_argument_group("dry run")
    group.add_argument("--dry-run", action="store_true", help="print the memory that each GPU takes")
    group.add_argument("--processes", type=int, default=1, help="GPUs of the dry run, with FSDP (1)")
    return options


def run(arguments: argparse.Namespace) -> int:
    """Distil the part."""
    if arguments.recipe is not None:
        raise ValueError(f"--recipe runs a whole chain, without a part, got {arguments.command}")
    if getattr(arguments, "dry_run", False):
        return dry_run(arguments)
    if getattr(arguments, "processes", 1) != 1:
        raise ValueError(
            f"processes (--processes) is for --dry-run, got {arguments.processes}; "
            "accelerate launch --num_processes starts a run on several"
        )
    return run_training(arguments.command, arguments.more, arguments.others)


def dry_run(arguments: argparse.Namespace) -> int:
    """Print what the distillation would take; nothing is loaded or written."""
    from genstream.training.memory import distillation_memory

    kind, _ = TRAINERS[arguments.command].load()
    settings, _ = parse_settings(f"genstream {arguments.command}", kind, arguments.more, arguments.others)
    memory = distillation_memory(settings, arguments.processes)
    rows = {
        "student and critic: weights, gradients, moments, average": memory.trained_bytes,
        "teacher and text encoders": memory.frozen_bytes,
        "blocks that are whole while they are computed": memory.gathered_bytes,
        "keys and values of the streams": memory.cache_bytes,
        "besides, while the student learns": memory.student_bytes,
        "besides, while the critic learns": memory.critic_bytes,
        "most at once": memory.peak_bytes,
    }
    kept = "in float32" if settings.precision == "fp32" else "passes in bfloat16, what is kept in float32"
    print(f"on each of {arguments.processes} GPUs, {kept}, {settings.batch_size} streams each:")
    print("\n".join(f"{gpu_memory(taken):>12}  {text}" for text, taken in rows.items()))
    print(f"{gpu_memory(memory.host_bytes):>12}  on the host of each process, while loading")
    return 0


def run_chain(arguments: argparse.Namespace) -> int:
    """Run a recipe and write its report, which one process does alone."""
    if arguments.recipe is None:
        raise ValueError("distill needs a part or --recipe (see genstream distill --help)")
    from genstream.cli.recipe import read_recipe, run_recipe
    from genstream.cli.report import write_report
    from genstream.training.processes import process

    output = arguments.output or Path("runs") / Path(arguments.recipe).resolve().name
    stages = read_recipe(arguments.recipe, output)
    show_training()
    model = run_recipe(stages, output)
    if process().is_main_process:
        if model is not None:
            print(f"model: {model}")
        print(f"report: {write_report(stages, output)}")
    return 0
