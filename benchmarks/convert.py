"""Measures `genstream convert` on files of the published size.

The weights are random numbers under the published names; time and memory do not depend on them.
Run as `python benchmarks/convert.py`, with 12 GB free for the files of the 1.3B student.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from genstream.cli.process import hardware_name
from genstream.io.sections import write_section

ROOT = Path(__file__).resolve().parent.parent
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
MEGA, GIGA = 1e6, 1e9
SIZES = {
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}
TINY = {"num_attention_heads": 1, "ffn_dim": 8, "num_layers": 1}
# As Self Forcing publishes it. In a process of its own: its memory is not counted.
WRITER = """
import json, sys, torch
from genstream.transformer.conversion import expected_shapes, wan_names
path, config = sys.argv[1], json.loads(sys.argv[2])
shapes, names = expected_shapes(config), wan_names(config)
weights = {f"model.{wan}": torch.randn(shapes[ours]).bfloat16() for wan, ours in names.items()}
torch.save({"generator_ema": weights}, path)
"""
# The largest of all processes below it, the one that opens the pickle among them.
WATCHER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one conversion."""

    source: str
    size_bytes: int
    largest_bytes: int
    elapsed_s: float
    peak_bytes: int

    def row(self) -> str:
        """Of the table."""
        return (
            f"| {self.source} | {self.size_bytes / GIGA:.2f} | {self.largest_bytes / GIGA:.2f} "
            f"| {self.elapsed_s:.1f} | {self.peak_bytes / MEGA:.0f} |"
        )


def main() -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1.3B")
    parser.add_argument("--folder", type=Path, help="for the files (temporary)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "convert.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = [figures.row() for figures in measure(Path(folder), SIZES[arguments.size])]
    header = "| source | GB | largest file written, GB | time, s | peak memory, MB |\n|---|" + 4 * "---:|"
    table = "\n".join([header, *rows])
    note = (
        f"`python benchmarks/convert.py --size {arguments.size}` on {hardware_name(torch.device('cpu'))}, "
        f"{datetime.now(UTC).date()}. Random weights in bfloat16. Time from the start of the command to "
        "its end, the sha256 of the source included. Peak memory is the resident size of the largest "
        "process; the first line, of a model with next to no weights, is what the program itself takes."
    )
    write_section(arguments.output, f"{arguments.size} student", f"{note}\n\n{table}")
    sys.stdout.write(f"{table}\n")


def measure(folder: Path, config: dict[str, int]) -> list[Figures]:
    """A tiny torch file, the student in one file and in shards, and the shards as the source."""
    tiny, student = folder / "tiny.pt", folder / "student.pt"
    for path, arguments in ((tiny, TINY), (student, config)):
        _python(WRITER, str(path), json.dumps(arguments))
    found = [
        convert("torch file, next to no weights", tiny, folder / "tiny"),
        convert("torch file", student, folder / "whole"),
    ]
    shutil.rmtree(folder / "whole")
    found.append(convert("torch file, `--max-shard-gb 1`", student, folder / "shards", "--max-shard-gb", "1"))
    student.unlink()
    back = ("--to", "diffusers", "--max-shard-gb", "1")
    found.append(convert("shards of it, to diffusers", folder / "shards", folder / "back", *back))
    return found


def convert(title: str, source: Path, output: Path, *options: str) -> Figures:
    """Run the command and measure it."""
    files = [source] if source.is_file() else list(source.rglob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    command = ("-m", "genstream.cli", "convert", str(source), "-o", str(output), *options)
    start_s = time.perf_counter()
    peak = int(_python(WATCHER, sys.executable, *command))
    elapsed_s = time.perf_counter() - start_s
    return Figures(
        source=title,
        size_bytes=size,
        largest_bytes=max(path.stat().st_size for path in output.rglob("*.safetensors")),
        elapsed_s=elapsed_s,
        peak_bytes=peak * RSS_UNIT_BYTES,
    )


def _python(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


if __name__ == "__main__":
    main()
