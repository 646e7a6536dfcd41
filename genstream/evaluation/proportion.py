"""Shares of successes with their uncertainty."""

from dataclasses import dataclass
from math import sqrt
from typing import Final

Z_95: Final = 1.959964
"""Standard deviations on each side of a 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """So many successes of so many trials."""

    successes: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.total:
            raise ValueError(f"successes must lie in 0 to {self.total}, got {self.successes}")

    @property
    def value(self) -> float:
        """Share of successes, NaN without trials."""
        return self.successes / self.total if self.total else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval (Wilson 1927), [0, 1] without trials."""
        if not self.total:
            return 0.0, 1.0
        share, spread = self.value, Z_95**2 / self.total
        centre = share + spread / 2
        half = Z_95 * sqrt(share * (1 - share) / self.total + spread / self.total / 4)
        return max((centre - half) / (1 + spread), 0.0), min((centre + half) / (1 + spread), 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
