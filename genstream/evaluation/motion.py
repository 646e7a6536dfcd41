"""What motion a path shows."""

from math import atan2, pi
from typing import Final

import numpy as np
from numpy.typing import NDArray

# Toy-world objects go at 0.156 short sides per second at least, and circle at 1.4 rad/s at least.
STILL_SPEED: Final = 0.07
CIRCLING_RATE: Final = 0.6
# Share of the path length that is left of a straight path; each bounce costs more.
STRAIGHT_SHARE: Final = 0.92
_STEP_S: Final = 0.1875
_MINIMUM_STEPS: Final = 3
_OCTANTS: Final = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")


def classify_motion(
    centres: NDArray[np.float64], usable: NDArray[np.bool_], short_side: int, fps: float
) -> str | None:
    """The motion of the vocabulary that a path shows, None if too little of it can be seen.

    Steps are taken within stretches of usable frames only, so a path may jump while out of sight.

    Args:
        centres: (x, y) in pixels, [F, 2].
        usable: Whether the centre can be trusted, [F].
        short_side: Pixels.
        fps: Frames per second.
    """
    stride = max(round(_STEP_S * fps), 1)
    steps = centres[stride:] - centres[:-stride]  # [F - stride, 2]
    whole = _all_usable(usable, stride)
    if whole.sum() < _MINIMUM_STEPS:
        return None
    lengths = np.hypot(steps[:, 0], steps[:, 1])
    if np.median(lengths[whole]) < STILL_SPEED * short_side * stride / fps:
        return "still"
    total = steps[whole].sum(axis=0)
    if np.hypot(*total) < STRAIGHT_SHARE * lengths[whole].sum():
        turn = _turn(steps, _all_usable(usable, 2 * stride), stride)
        return "circling" if abs(turn) > CIRCLING_RATE * stride / fps else "bouncing"
    return _OCTANTS[round(atan2(total[1], total[0]) / (pi / 4)) % 8]


def _all_usable(usable: NDArray[np.bool_], stride: int) -> NDArray[np.bool_]:
    """Whether all of the frames i to i + stride are usable, [F - stride]."""
    if len(usable) <= stride:
        return np.zeros(0, dtype=np.bool_)
    windows = np.lib.stride_tricks.sliding_window_view(usable, stride + 1)
    return np.asarray(windows.all(axis=1))


def _turn(steps: NDArray[np.float64], whole: NDArray[np.bool_], stride: int) -> float:
    """Median angle from one step to the next in radians: bounces are too few to change it."""
    if whole.sum() < _MINIMUM_STEPS:
        return 0.0
    first, second = steps[:-stride][whole], steps[stride:][whole]
    cross = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    return float(np.median(np.arctan2(cross, (first * second).sum(axis=1))))
