"""What becomes of streams as time goes by: scores window by window, and slopes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from genstream.evaluation.judge import Adherence, ClipScore
from genstream.evaluation.proportion import Z_95

ERRORS: Final = ("colour_error", "brightness_error", "saturation_error")


@dataclass(frozen=True, kw_only=True)
class DriftWindow:
    """Scores of one stretch of time over all streams; errors as in ObjectScore, averaged."""

    start_s: float
    adherence: Adherence
    colour_error: float
    brightness_error: float
    saturation_error: float


@dataclass(frozen=True, kw_only=True)
class Slope:
    """How fast an error grows: mean over streams and half the width of its 95 % interval, a minute.

    Both are NaN where fewer streams than two show their objects in at least two windows.
    """

    per_minute: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.per_minute:+.2f} a minute ({self.low:+.2f} to {self.high:+.2f})"

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.per_minute - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.per_minute + self.half_width


def drift(streams: Iterable[Sequence[ClipScore]], window_s: float) -> list[DriftWindow]:
    """Scores along time, one entry per window.

    Args:
        streams: for each stream the scores of its windows in order.
        window_s: seconds of a window.
    """
    return [
        DriftWindow(
            start_s=index * window_s,
            adherence=Adherence.of(scores),
            **{name: _mean(error for score in scores for error in _errors(score, name)) for name in ERRORS},
        )
        for index, scores in enumerate(zip(*streams, strict=True))
    ]


def slope(streams: Iterable[Sequence[ClipScore]], window_s: float, error: str) -> Slope:
    """Of the least-squares lines through every stream's errors.

    Args:
        streams: for each stream the scores of its windows in order.
        window_s: seconds of a window.
        error: one of ERRORS.
    """
    slopes = []
    for scores in streams:
        values = np.array([_mean(_errors(score, error)) for score in scores])
        known = ~np.isnan(values)
        if known.sum() > 1:
            minutes = np.arange(len(values))[known] * window_s / 60
            slopes.append(np.polyfit(minutes, values[known], 1)[0])
    if len(slopes) < 2:
        return Slope(per_minute=float("nan"), half_width=float("nan"))
    spread = np.std(slopes, ddof=1) / np.sqrt(len(slopes))
    return Slope(per_minute=float(np.mean(slopes)), half_width=float(Z_95 * spread))


def _errors(score: ClipScore, name: str) -> list[float]:
    return [getattr(item, name) for item in score.objects]


def _mean(values: Iterable[float]) -> float:
    """Of those that are known, NaN without any."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
