"""The `genstream` command: `genstream COMMAND --help` tells more.

Commands import torch only when they run, so that help and wrong usage answer at once.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

import genstream
from genstream.cli import bench, convert, distill, evaluate, generate, models, plan, train, transform, vae
from genstream.cli.parser import Parser
from genstream.cli.process import is_out_of_memory

COMMANDS = (generate, transform, models, plan, convert, train, distill, evaluate, bench, vae)
EXIT_ERROR = 2
_OPTION_OF_ARGUMENT = {
    "num_frames": "--frames",
    "height": "--size",
    "width": "--size",
    "window_frames": "--window",
    "sink_frames": "--sink",
    "chunk_frames": "--chunk",
}
"""Arguments of the library that have another name on the command line."""
_LOUD = (
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "imageio_ffmpeg",
)
"""Loggers that tell of kernels which this machine has no use for, used or not, and of every
video that is stored on its side."""


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = Parser(prog="genstream", description=genstream.__doc__, allow_abbrev=False)
    parser.epilog = "Add --debug to any command to see where an error comes from."
    parser.add_argument("--version", action="version", version=f"genstream {genstream.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(commands)
    parser.set_defaults(takes_more=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv`; returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    typed = sys.argv[1:] if argv is None else list(argv)
    given = [text for text in typed if text != "--debug"]
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        arguments = _parse(given)
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from the last checkpoint" if _trains(given) else ""
        print(f"genstream: interrupted{goes_on}", file=sys.stderr)
        return generate.EXIT_INTERRUPTED
    except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        bug = isinstance(error, RuntimeError) and not is_out_of_memory(error)
        if bug or given != typed:
            raise
        print(f"genstream: error: {_one_line(error, given)}", file=sys.stderr)
        return EXIT_ERROR
    return code


def _parse(given: list[str]) -> argparse.Namespace:
    """Arguments of the command; `more` holds the options that a command with `takes_more` parses itself."""
    parser = build_parser()
    arguments, more = parser.parse_known_args(given)
    if more and not arguments.takes_more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    arguments.more = more
    return arguments


def _one_line(error: Exception, given: Sequence[str]) -> str:
    text = "; ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])
    if is_out_of_memory(error):
        smaller = "smaller batches" if _trains(given) else "a smaller --size, or --dtype bfloat16"
        text = f"out of memory: use {smaller} ({text})"
    return " ".join(_with_option(text, given).split())


def _trains(given: Sequence[str]) -> bool:
    return given[:1] in (["train"], ["distill"]) and "--dry-run" not in given


def _with_option(text: str, given: Sequence[str]) -> str:
    """Messages start with the argument that is wrong: name the option that was typed for it, too."""
    name, _, rest = text.partition(" ")
    option = _OPTION_OF_ARGUMENT.get(name)
    typed = any(part.partition("=")[0] == option for part in given)
    return f"{name} ({option}) {rest}" if typed else text


if __name__ == "__main__":
    sys.exit(main())
