"""Regions, motions, intervals and PSNR against what is known of them."""

from math import inf

import numpy as np
import pytest

from genstream.evaluation.components import label_regions
from genstream.evaluation.motion import classify_motion
from genstream.evaluation.proportion import Proportion
from genstream.evaluation.quality import psnr


def flooded(mask):
    """Number of 4-connected regions, by flood filling."""
    left, count = set(zip(*np.nonzero(mask), strict=True)), 0
    while left:
        stack, count = [left.pop()], count + 1
        while stack:
            row, column = stack.pop()
            for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
    return count


@pytest.mark.parametrize("density", [0.0, 0.3, 0.6, 1.0])
def test_regions_equal_flood_filling(density):
    masks = np.random.default_rng(0).random((5, 17, 23)) < density
    labels = label_regions(masks)
    assert np.array_equal(labels > 0, masks)
    for mask, label in zip(masks, labels, strict=True):
        assert len(np.unique(label[mask])) == flooded(mask)
    assert labels.max() == sum(flooded(mask) for mask in masks)
    both = masks[:, 1:] & masks[:, :-1]
    assert (labels[:, 1:][both] == labels[:, :-1][both]).all()


@pytest.mark.parametrize(
    ("angle", "motion"), [(0, "right"), (40, "down-right"), (95, "down"), (-130, "up-left")]
)
def test_direction_is_the_nearest_of_eight(angle, motion):
    heading = np.radians(angle)
    path = np.arange(40)[:, None] * 2 * np.array([np.cos(heading), np.sin(heading)])
    path[20:] -= 90
    usable = np.ones(40, dtype=bool)
    usable[18:22] = False
    assert classify_motion(path, usable, 128, 16) == motion


def test_motion_of_a_path_too_short_is_unknown():
    assert classify_motion(np.zeros((5, 2)), np.array([True, True, False, True, True]), 128, 16) is None
    assert classify_motion(np.zeros((1, 2)), np.ones(1, dtype=bool), 128, 16) is None


def test_interval_is_wilsons():
    low, high = Proportion(successes=8, total=10).interval
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Proportion(successes=0, total=0).interval == (0, 1)
    assert Proportion(successes=200, total=200).interval[1] == pytest.approx(1)
    with pytest.raises(ValueError, match="successes must lie in 0 to 3, got 4"):
        Proportion(successes=4, total=3)


def test_psnr_of_a_constant_error():
    frames = np.full((2, 4, 4, 3), 100, dtype=np.uint8)
    assert psnr(frames, frames + 5) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr(frames, frames) == inf
    with pytest.raises(ValueError, match="other must have the shape"):
        psnr(frames, frames[:1])
