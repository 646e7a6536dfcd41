"""Means of values that belong together, with intervals that know it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

SHARE: Final = (0.0, 0.0, 1.0, 1.0)
"""Means of prompts to add to a share: a sample without failures does not say that there are none.

Source: Agresti and Coull 1998.
"""
DIFFERENCE: Final = (-1.0, 1.0)
"""Likewise to the difference of two shares of the same prompts. Source: Bonett and Price 2012."""
_DRAWS: Final = 2000
_TAILS: Final = (0.025, 0.975)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its 95 % interval.

    Attributes:
        value: the mean; NaN of nothing.
        low: end of the interval; NaN of fewer than two prompts, which do not tell how much prompts differ.
        high: likewise.
        prompts: how many have a value.
    """

    value: float
    low: float
    high: float
    prompts: int


def estimate(
    values: NDArray[np.float64], prompts: NDArray[np.int64], added: Sequence[float] = ()
) -> Estimate:
    """Mean of all values that are not NaN; the interval by drawing prompts and seeds anew.

    A prompt is drawn with all its values, of every seed, and seeds are drawn besides, the same in each call.
    The interval is somewhat wide where seeds are alike, and too narrow where three seeds differ more than
    prompts do, or where prompts are fewer than about ten and none are added.
    Source: the pigeonhole bootstrap (Owen 2007).

    Args:
        values: [seeds, values, moments].
        prompts: which one each value is of, [values].
        added: means of prompts that are added for the interval alone: SHARE, DIFFERENCE, nothing to means.
    """
    if values.ndim != 3 or prompts.shape != values.shape[1:2]:
        raise ValueError(
            "prompts must be one for each of the [seeds, values, moments], "
            f"got {list(prompts.shape)} for {list(values.shape)}"
        )
    names, number = np.unique(prompts, return_inverse=True)
    member = np.eye(len(names))[number]  # [values, prompts]
    known = ~np.isnan(values)
    sums = np.where(known, values, 0).sum(axis=2) @ member  # [seeds, prompts]
    counts = known.sum(axis=2) @ member  # [seeds, prompts]
    with_value = int(counts.any(axis=0).sum())
    value = float(sums.sum() / counts.sum()) if with_value else float("nan")
    if with_value < 2:
        return Estimate(value=value, low=float("nan"), high=float("nan"), prompts=with_value)
    usual = counts.mean(axis=1, keepdims=True)  # [seeds, 1]
    sums = np.hstack([sums, usual * np.array(added)])
    counts = np.hstack([counts, np.repeat(usual, len(added), axis=1)])
    generator = np.random.default_rng(0)
    of_seeds, of_prompts = (_times_drawn(generator, size) for size in counts.shape)
    totals = ((of_seeds @ counts) * of_prompts).sum(axis=1)  # [draws]
    means = ((of_seeds @ sums) * of_prompts).sum(axis=1)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, _TAILS).tolist()
    return Estimate(value=value, low=low, high=high, prompts=with_value)


def _times_drawn(generator: np.random.Generator, size: int) -> NDArray[np.int64]:
    """How often each of `size` is among `size` that are drawn with replacement, [draws, size]."""
    return generator.multinomial(size, np.full(size, 1 / size), size=_DRAWS)
