"""Regions, motions, intervals and PSNR against what is known of them."""

from math import inf

import numpy as np
import pytest

from genstream.evaluation.components import label_regions
from genstream.evaluation.motion import classify_motion
from genstream.evaluation.proportion import Proportion
from genstream.evaluation.quality import flicker, psnr, ssim


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


def noise(seed=0, frames=2, height=16, width=20):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_ssim_of_equal_frames_is_one():
    assert ssim(noise(), noise()) == 1


@pytest.mark.parametrize(("one", "other"), [(0, 255), (100, 130), (200, 199)])
def test_ssim_of_flat_frames_compares_their_brightness(one, other):
    frames = [np.full((1, 12, 12, 3), value, np.uint8) for value in (one, other)]
    floor = (0.01 * 255) ** 2
    expected = (2 * one * other + floor) / (one**2 + other**2 + floor)
    assert ssim(*frames) == pytest.approx(expected, rel=1e-9)


def test_ssim_of_opposite_stripes():
    """Stripes of one pixel have a mean of 127.5 in every window, and a covariance of minus their variance."""
    stripes = np.zeros((1, 24, 24, 3), np.uint8)
    stripes[:, :, ::2] = 255
    variance, floor = 127.5**2, (0.03 * 255) ** 2
    expected = (floor - 2 * variance) / (floor + 2 * variance)
    assert ssim(stripes, 255 - stripes) == pytest.approx(expected, abs=1e-4)


def test_ssim_of_stripes_with_less_contrast():
    strong, weak = np.full((2, 1, 24, 24, 3), 77, np.uint8)
    strong[:, ::2], weak[:, ::2] = 177, 137
    weak[:, 1::2] = 117
    floor = (0.03 * 255) ** 2
    assert ssim(strong, weak) == pytest.approx((2 * 50 * 10 + floor) / (50**2 + 10**2 + floor), abs=1e-4)


def test_ssim_falls_with_noise():
    image = np.tile(np.linspace(0, 200, 40).astype(np.uint8)[:, None, None], (1, 1, 40, 3))
    scores = [ssim(image, image + (noise(1, 1, 40, 40) % size).astype(np.uint8)) for size in (1, 4, 16, 50)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 1 and scores[-1] < 0.6


def test_only_errors_that_change_flicker():
    frames = noise(frames=5) // 2 + 50
    assert flicker(frames, frames) == 0
    assert flicker(frames, frames + 20) == 0
    pulsing = frames.copy()
    pulsing[1::2] += 20
    assert flicker(frames, pulsing) == 20
    pulsing[1::2] -= 40
    pulsing[0::2] += 20
    assert flicker(frames, pulsing) == 40
    once = frames.copy()
    once[2] -= 12
    assert flicker(frames, once) == pytest.approx(12 * 2 / 4)


@pytest.mark.parametrize("measure", [psnr, ssim, flicker])
def test_measures_of_unlike_clips_are_refused(measure):
    with pytest.raises(ValueError, match=r"other must have the shape \(2, 16, 20, 3\).*got \(3, 16, 20, 3\)"):
        measure(noise(), noise(frames=3))


def test_clips_that_are_too_small_to_measure():
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(noise(height=10), noise(height=10))
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        flicker(noise(frames=1), noise(frames=1))
