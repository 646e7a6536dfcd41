"""`genstream evaluate toyworld`: scores a model on fixed prompts, by looking at the pixels it makes."""

import argparse
import json
from pathlib import Path

from genstream.io.model_folder import find_model, read_card
from genstream.io.sections import check_section_file, write_section


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("evaluate", help="score a model", description=__doc__, allow_abbrev=False)
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    toyworld = benchmarks.add_parser(
        "toyworld", help="prompt adherence, drift, VAE quality and speed", allow_abbrev=False
    )
    toyworld.add_argument(
        "--model", default="toyworld", help="installed model, model folder or run (toyworld)"
    )
    toyworld.add_argument("--prompts", type=int, default=200, help="number of evaluation prompts (200)")
    toyworld.add_argument("--vae-clips", type=int, default=100, help="clips that the VAE reconstructs (100)")
    toyworld.add_argument("--seconds", type=float, default=4.0, help="length that is judged (4)")
    toyworld.add_argument(
        "--end-of", type=float, metavar="SECONDS", help="make streams this long and judge their end as well"
    )
    toyworld.add_argument("--seed", type=int, default=0, help="seed of the first prompt, counted up (0)")
    toyworld.add_argument("--device", help="cpu, cuda, cuda:1, mps (cuda if there is one, else cpu)")
    toyworld.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(by device)")
    toyworld.add_argument("--json", action="store_true", help="print json in place of the table")
    toyworld.add_argument(
        "--output",
        type=Path,
        help="also write the table to this markdown file: Scores or, with --end-of, Streams of SECONDS s",
    )
    toyworld.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Generate a clip per prompt, judge it, print the table."""
    folder = find_model(arguments.model)
    card = read_card(folder)
    if card.height is None or card.width is None or card.fps is None:
        raise ValueError(
            f"model {arguments.model!r} does not say its size and frame rate in model_index.json"
        )
    if arguments.output is not None:
        check_section_file(arguments.output)
    from genstream.cli.pipeline import load_pipeline
    from genstream.cli.toyworld_benchmark import BenchmarkSettings, run_benchmark

    settings = BenchmarkSettings(
        prompts=arguments.prompts,
        vae_clips=arguments.vae_clips,
        seconds=arguments.seconds,
        end_of_s=arguments.end_of,
        seed=arguments.seed,
        height=card.height,
        width=card.width,
        fps=card.fps,
    )
    pipe = load_pipeline(folder, device=arguments.device, dtype=arguments.dtype)
    result = run_benchmark(pipe, settings)
    table = result.table(arguments.model)
    print(json.dumps(result.as_json()) if arguments.json else table)
    if arguments.output is not None:
        section = "Scores" if arguments.end_of is None else f"Streams of {arguments.end_of:g} s"
        write_section(arguments.output, section, table)
    return 0
