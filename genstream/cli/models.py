"""`genstream models`: what is installed, what each model can do, and the presets."""

import argparse
from pathlib import Path

from genstream.io.model_folder import find_model, installed_models, parameter_counts, read_card, size_bytes
from genstream.streaming.presets import PRESETS

_MEGA = 1e6


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "models",
        help="describe the installed models and the presets",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="other model folders to describe"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print one paragraph per model, then the presets."""
    names = installed_models()
    models = [describe(find_model(str(model))) for model in [*names, *arguments.folders]]
    print("\n\n".join([*models, describe_presets()]))
    return 0


def describe_presets() -> str:
    """A paragraph on the ways of running published students."""
    width = max(map(len, PRESETS))
    lines = [f"  {name:<{width}}  {preset.summary}" for name, preset in PRESETS.items()]
    return "\n".join(["presets, for `genstream generate --model FOLDER --preset NAME`:", *lines])


def describe(folder: Path) -> str:
    """A paragraph on the model in `folder`."""
    card = read_card(folder)
    counts = parameter_counts(folder)
    parts = ", ".join(f"{name} {count / _MEGA:.2f} M" for name, count in counts.items())
    lines = [
        f"{card.name}: {card.description}" if card.description else card.name,
        f"  folder      {folder}",
        f"  on disk     {size_bytes(folder) / _MEGA:.1f} MB",
        f"  parameters  {sum(counts.values()) / _MEGA:.2f} M ({parts})",
    ]
    if None not in (card.width, card.height, card.fps):
        lines.append(f"  native      {card.width}x{card.height} at {card.fps} fps")
    lines += [f"  knows       {group}: {', '.join(words)}" for group, words in card.vocabulary.items()]
    return "\n".join(lines)
