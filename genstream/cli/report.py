"""The report of a recipe: how each stage went, curves, and what its model makes."""

import csv
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from genstream.cli.contact_sheet import contact_sheet, evenly
from genstream.cli.pipeline import load_pipeline, to_uint8
from genstream.cli.recipe import Stage
from genstream.cli.window_judge import judge_together
from genstream.data.prompts import evaluation_prompts
from genstream.evaluation.judge import Adherence
from genstream.io.model_folder import INDEX_NAME, RESULT_FOLDER, read_object
from genstream.io.partial import write_whole
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.shapes import frames_of
from genstream.training.record import RECORD_FOLDER

REPORT_NAME = "report.md"
_CURVES_NAME = "curves.png"
_PROMPTS = 64
_SECONDS = 4.0
_STRIPS = 3
_COLUMNS = 8
_NOT_DRAWN = ("step", "learning_rate", "seconds")


def write_report(stages: Sequence[Stage], output: Path) -> Path:
    """Write `output`/report.md with its pictures; returns its path."""
    lines = [f"# {output.resolve().name}", "", "| stage | command | steps | minutes |", "|---|---|---|---|"]
    logs = {stage.name: _logs(stage, output / stage.name) for stage in stages}
    for stage in stages:
        rows = [row for log in logs[stage.name].values() for row in log[-1:]]
        steps, minutes = sum(int(row["step"]) for row in rows), sum(row["seconds"] for row in rows) / 60
        taken = f"{steps} | {minutes:.0f}" if rows else "unknown | unknown"
        lines.append(f"| {stage.name} | `genstream {stage.command}` | {taken} |")
    if drawn := {name: log for each in logs.values() for name, log in each.items()}:
        _draw_curves(drawn, output / _CURVES_NAME)
        lines += ["", f"![Curves]({_CURVES_NAME})"]
    if lost := [name for name, each in logs.items() if not each]:
        lines += ["", f"Curves are left out of what has no log any more: {', '.join(lost)}."]
    lines.append("")
    for stage in stages:
        model = output / stage.name / RESULT_FOLDER
        if (model / INDEX_NAME).is_file():
            lines += _section(stage.name, load_pipeline(model, device=None, dtype=None), output)
    path = output / REPORT_NAME
    write_whole(path, "\n".join(lines) + "\n")
    return path


def read_figures(path: Path) -> list[dict[str, float]]:
    """Rows of a log; empty cells are left out."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]


def _logs(stage: Stage, run_folder: Path) -> dict[str, list[dict[str, float]]]:
    """All logs of a run that have rows, by the name of the run and of its phase.

    Of a finished run nothing may be left but what it made, with its record.
    """
    paths = {path.parent.relative_to(run_folder).as_posix(): path for path in run_folder.rglob("log.csv")}
    paths = paths or _recorded_logs(stage, run_folder)
    logs = {phase: read_figures(path) for phase, path in sorted(paths.items())}
    return {f"{run_folder.name} {phase}".removesuffix(" ."): rows for phase, rows in logs.items() if rows}


def _recorded_logs(stage: Stage, run_folder: Path) -> dict[str, Path]:
    """Logs in the record of a run's result, by phase; those of what it was made from lie there too."""
    words = stage.command.split()
    for record in run_folder.glob(f"*/{RECORD_FOLDER}/*.json"):
        _, *command = shlex.split(str(read_object(record).get("command")))
        if command[: len(words)] == words and Path(command[-1]).name == run_folder.name:
            if (log := record.with_suffix(".csv")).is_file():
                return {".": log}
            start = f"{record.stem}_"
            return {path.stem.removeprefix(start): path for path in record.parent.glob(f"{start}*.csv")}
    return {}


def _draw_curves(logs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6 * len(logs)), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(len(logs), squeeze=False)[:, 0], logs.items(), strict=True):
        drawn = dict.fromkeys(key for row in rows for key in row if key not in _NOT_DRAWN)
        for key in drawn:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(*zip(*points, strict=True), ".-" if len(points) == 1 else "-", label=key, linewidth=1)
        positive = all(row[key] > 0 for row in rows for key in drawn if key in row)
        # A log scale would leave out the other values, and losses such as SiD's have them.
        axes.set(title=name, xlabel="step", yscale="log" if positive else "symlog")
        axes.legend()
    figure.savefig(path, dpi=100)


def _section(name: str, pipe: CausalVideoPipeline, output: Path) -> list[str]:
    """Markdown lines: adherence and sample strips of one model."""
    prompts, seconds = evaluation_prompts(_PROMPTS), _seconds(pipe)
    scores = judge_together(pipe, prompts, seconds, seconds, seed=0)
    adherence = Adherence.of([score for stream in scores for score in stream])
    picture = f"{name}.png"
    strips = [(prompt.caption, _frames(pipe, prompt.caption, seconds)) for prompt in prompts[:_STRIPS]]
    contact_sheet(strips).save(output / picture, optimize=True)
    return [
        f"## {name}",
        "",
        f"{_PROMPTS} prompts, {seconds:.3g} s each: colour {adherence.colour}, shape {adherence.shape}, "
        f"direction {adherence.direction}, count {adherence.count}.",
        "",
        f"![Samples]({picture})",
        "",
    ]


def _seconds(pipe: CausalVideoPipeline) -> float:
    """How long a model is judged: one without a past makes clips that have nothing to do with each other."""
    if pipe.settings.sees_past:
        return _SECONDS
    frames = frames_of(pipe.settings.chunk_frames, pipe.vae.spec.temporal_ratio)
    return min(_SECONDS, float(frames / pipe.config.default_fps))


def _frames(pipe: CausalVideoPipeline, caption: str, seconds: float) -> NDArray[np.uint8]:
    chunks = pipe.stream(prompt=caption, seconds=seconds, seed=0)
    frames = [to_uint8(chunk.frames) for chunk in chunks if chunk.frames is not None]
    return evenly(np.concatenate(frames), _COLUMNS)
