"""Tables and plots of trials that are compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path

import numpy as np
from ablations.scores import ERROR, SHARES, Scores, Trial
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from genstream.evaluation.bootstrap import DIFFERENCE, SHARE, Estimate, estimate
from genstream.io.sections import write_section

METRICS = (*SHARES, ERROR)
PLACES = 15
"""Most places in time that a stream's windows are summed up to."""
FEW_PROMPTS = 10


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Trials of the same prompts and noise, which stand in one table and one plot.

    Attributes:
        title: of its section.
        rows: a trial for each seed of training, by label; the first row is what the others are compared with.
    """

    title: str
    rows: Mapping[str, tuple[Trial, ...]]

    @property
    def first(self) -> Trial:
        """One trial; prompts, seconds and windows are those of all."""
        return next(iter(self.rows.values()))[0]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Scores of a trial for each seed, together.

    Attributes:
        evaluations: of the model, for each chunk of a stream; mean of the seeds.
        prompts: number of the prompt that each object is of, [objects].
        values: of each object by metric, [seeds, objects, W].
    """

    evaluations: float
    prompts: NDArray[np.int64]
    values: Mapping[str, NDArray[np.float64]]

    @classmethod
    def of(cls, seeds: Sequence[Scores]) -> "Row":
        """The row of a trial's scores for each seed."""
        values = {name: np.stack([scores.values[name] for scores in seeds]) for name in METRICS}
        evaluations = float(np.mean([scores.evaluations for scores in seeds]))
        return cls(evaluations=evaluations, prompts=seeds[0].prompts, values=values)

    def less(self, other: "Row") -> "Row":
        """What is left when those of `other` are taken away, NaN where either is."""
        values = {name: self.values[name] - other.values[name] for name in METRICS}
        evaluations = self.evaluations - other.evaluations
        return Row(evaluations=evaluations, prompts=self.prompts, values=values)

    def at(self, windows: slice, name: str, added: Sequence[float]) -> Estimate:
        """Mean of a metric over some windows; `added` as in `estimate`, for shares alone."""
        return estimate(self.values[name][..., windows], self.prompts, added if name in SHARES else ())


def write_comparison(page: Path, comparison: Comparison, scores: Mapping[str, Scores]) -> None:
    """Write the section of a comparison and its picture, of the scores of all trials by name."""
    rows = {
        label: Row.of([scores[trial.name] for trial in trials]) for label, trials in comparison.rows.items()
    }
    picture = f"training_{comparison.title.lower().replace(' ', '_')}.png"
    draw(rows, comparison.first.window_s, page.parent / "pictures" / picture)
    parts = [
        notes(comparison, rows),
        table(rows, comparison.first.window_s),
        differences(rows, comparison.first.window_s),
        f"![{comparison.title}](pictures/{picture})",
    ]
    write_section(page, comparison.title, "\n\n".join(parts))


def places(windows: int) -> list[slice]:
    """Neighbouring windows as one, so that at most `PLACES` are left."""
    size = -(-windows // PLACES)
    return [slice(start, min(start + size, windows)) for start in range(0, windows, size)]


def notes(comparison: Comparison, rows: Mapping[str, Row]) -> str:
    """What stands in the table, and what its intervals are of."""
    row = next(iter(rows.values()))
    seeds, objects, _ = row.values[ERROR].shape
    prompts = len(np.unique(row.prompts))
    size = f"{prompts} prompts with {objects} objects, {comparison.first.seconds:g} s each"
    if seeds > 1:
        trained = (
            f"{seeds} runs of each kind, which differ in their seed. The VAE, the base and the teacher are "
            "one each: seeds cover the short runs alone. Intervals are 95 %, of prompts and seeds drawn anew"
        )
    else:
        trained = (
            "one training of each student, and of VAE, base and teacher: intervals tell of other prompts, "
            "not of other trainings. They are 95 %, of prompts drawn anew"
        )
    fewest = _fewest_prompts(rows)
    narrow = (
        f" The fewest prompts of an error are {fewest}: of so few, intervals of the error are too narrow."
        if fewest < FEW_PROMPTS
        else ""
    )
    return (
        f"{size}; {trained} (bootstrap), a prompt with all of its objects and moments, with two failures and "
        "two successes added to shares and one of each to differences. Colour errors are of the objects "
        f"that were seen; the others count as wrong in colour, shape and direction.{narrow}"
    )


def _fewest_prompts(rows: Mapping[str, Row]) -> int:
    """Fewest prompts that an interval of the error in the tables is of; those of one prompt have none."""
    base, *others = rows.values()
    compared = [*rows.values(), *(row.less(base) for row in others)]
    known = [row.at(place, ERROR, ()).prompts for row in compared for place in _told(row)]
    return min((prompts for prompts in known if prompts > 1), default=FEW_PROMPTS)


def table(rows: Mapping[str, Row], window_s: float) -> str:
    """Means at the first and the last place, and over all."""
    return _table(rows, window_s, SHARE, "-")


def differences(rows: Mapping[str, Row], window_s: float) -> str:
    """Differences of all rows from the first, at the first and the last place, and over all."""
    (first, base), *others = rows.items()
    less = {label: row.less(base) for label, row in others}
    what = f"Differences from {first}, object by object; those of errors are of objects that both show:"
    return f"{what}\n\n{_table(less, window_s, DIFFERENCE, '+')}"


def _table(rows: Mapping[str, Row], window_s: float, added: Sequence[float], sign: str) -> str:
    titles = [*(f"{name}, %" for name in SHARES), f"{ERROR}, of 255"]
    lines = [f"| | evaluations per chunk | | {' | '.join(titles)} |", "|---" * (3 + len(titles)) + "|"]
    for label, row in rows.items():
        for place in _told(row):
            time = f"{place.start * window_s:g} to {place.stop * window_s:g} s"
            cells = [_cell(name, row.at(place, name, added), sign) for name in METRICS]
            lines.append(f"| {label} | {row.evaluations:{sign}g} | {time} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(row: Row) -> list[slice]:
    """The first and the last place, and all windows; one alone where they are the same."""
    windows = row.values[ERROR].shape[-1]
    at = places(windows)
    return [at[0], at[-1], slice(0, windows)] if len(at) > 1 else at


def _cell(name: str, mean: Estimate, sign: str) -> str:
    if isnan(mean.value):
        return "none"
    unit = 1 if name == ERROR else 100
    value, low, high = (f"{unit * number:{sign}.1f}" for number in (mean.value, mean.low, mean.high))
    return f"{value} (one prompt)" if mean.prompts == 1 else f"{value} ({low} to {high})"


def draw(rows: Mapping[str, Row], window_s: float, path: Path) -> None:
    """Shares and errors over time, with 95 % bands."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axes, name in zip(panels, METRICS, strict=False):
        for label, row in rows.items():
            _band(axes, row, name, window_s, label)
        title, top = (f"{name}, of 255", None) if name == ERROR else (name, 1.02)
        axes.set(title=title, xlabel="s", ylim=(0, top))
    panels[-1].axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center left", frameon=False)
    figure.savefig(path, dpi=100)


def _band(axes: Axes, row: Row, name: str, window_s: float, label: str) -> None:
    at = places(row.values[name].shape[-1])
    means = [row.at(place, name, SHARE) for place in at]
    times = [(place.start + place.stop) / 2 * window_s for place in at]
    (line,) = axes.plot(times, [mean.value for mean in means], label=label, marker=".")
    low, high = [mean.low for mean in means], [mean.high for mean in means]
    axes.fill_between(times, low, high, alpha=0.12, color=line.get_color())
