"""The judge is right on true clips, stays right when they are degraded, and notices what is wrong."""

from dataclasses import replace

import numpy as np
import pytest

from genstream.data.scene import ObjectSpec, Scene
from genstream.data.toyworld import ToyWorld
from genstream.data.vocabulary import COLOUR_RGB
from genstream.evaluation.judge import Adherence, judge_clip

FOUR_SECONDS = 65


def degraded(frames, seed):
    """Blurred by 0.8 pixels and with noise of 3/255, as a lossy codec leaves them."""
    kernel = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 0.8**2))
    blurred = frames.astype(np.float32)
    for axis in (1, 2):
        rows = [np.roll(blurred, shift, axis=axis) for shift in range(-2, 3)]
        blurred = sum(weight * row for weight, row in zip(kernel / kernel.sum(), rows, strict=True))
    noise = 3 * np.random.default_rng(seed).standard_normal(frames.shape, dtype=np.float32)
    return np.clip(blurred + noise, 0, 255).round().astype(np.uint8)


def adherence(world, seeds, split, change=lambda frames, seed: frames):
    scores = []
    for seed in seeds:
        scene = world.scene(seed, split)
        scores.append(judge_clip(change(world.frames(scene, FOUR_SECONDS), seed), scene))
    return Adherence.of(scores)


def lone(**changes):
    values = {"colour": "red", "shape": "circle", "size": "medium", "motion": "right", "x": 0.5, "y": 0.5}
    return Scene(objects=(ObjectSpec(**(values | {"speed": 0.25} | changes)),), background="navy")


def parts(result):
    return [result.colour, result.shape, result.direction, result.count]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "eval"])
def test_true_clips_score_at_least_998_in_1000(split):
    result = adherence(ToyWorld(), range(250), split)
    assert [part.value >= 0.998 for part in parts(result)] == [True] * 4


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160)])
def test_true_clips_of_other_sizes(height, width):
    result = adherence(ToyWorld(height=height, width=width), range(100), "eval")
    assert [part.value >= 0.99 for part in parts(result)] == [True] * 4


def test_degraded_clips_score_at_least_99_in_100():
    result = adherence(ToyWorld(), range(60), "eval", degraded)
    assert [part.value >= 0.99 for part in parts(result)] == [True] * 4


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        ({"colour": "orange"}, "colour"),
        ({"shape": "square"}, "shape"),
        ({"motion": "left"}, "direction"),
        ({"motion": "up-right"}, "direction"),
        ({"motion": "still"}, "direction"),
    ],
)
def test_a_wrong_attribute_is_noticed_and_only_that(asked, wrong):
    (score,) = judge_clip(ToyWorld().frames(lone(), FOUR_SECONDS), lone(**asked)).objects
    assert {name: getattr(score, name) for name in ("colour", "shape", "direction")} == {
        name: name != wrong for name in ("colour", "shape", "direction")
    }


def test_a_frozen_stream_is_still_and_a_shuffled_one_goes_nowhere():
    frames = ToyWorld().frames(lone(speed=0.2, x=0.3), 33)
    assert judge_clip(np.repeat(frames[:1], 33, axis=0), lone()).observation.objects[0].motion == "still"
    assert judge_clip(frames[::-1], lone()).observation.objects[0].motion == "left"
    shuffled = frames[np.random.default_rng(0).permutation(33)]
    assert not judge_clip(shuffled, lone()).objects[0].direction


def test_count_notices_a_missing_and_a_second_object():
    world = ToyWorld()
    one = lone(x=0.2, y=0.3, motion="still", speed=0)
    two = replace(one, objects=(*one.objects, replace(one.objects[0], colour="blue", x=0.7, y=0.7)))
    frames = world.frames(one, 32)
    assert judge_clip(frames, one).count
    missing = judge_clip(frames, two)
    assert not missing.count
    assert [item.colour for item in missing.objects] == [True, False]
    assert not judge_clip(world.frames(two, 32), one).count
    twins = np.maximum(frames, np.roll(frames, 60, axis=2))
    assert judge_clip(twins, one).observation.count == 2


def test_an_empty_clip_scores_nothing():
    score = judge_clip(np.full((16, 64, 64, 3), 30, dtype=np.uint8), lone())
    assert score.observation.count == 0
    assert not any((score.count, score.objects[0].colour, score.objects[0].shape, score.objects[0].direction))


def test_noise_has_no_object_of_any_prompt():
    frames = np.random.default_rng(0).integers(0, 256, (32, 64, 64, 3), dtype=np.uint8)
    assert not judge_clip(frames, lone()).objects[0].direction


def test_errors_of_colour_brightness_and_saturation_are_those_of_the_object():
    frames = ToyWorld().frames(lone(), 33)
    true = judge_clip(frames, lone()).objects[0]
    assert true.colour_error < 1
    dim = judge_clip((frames * 0.8).astype(np.uint8), lone()).objects[0]
    assert dim.colour
    assert dim.brightness_error == pytest.approx(-0.2 * np.mean(COLOUR_RGB["red"]), abs=1)
    assert dim.saturation_error == pytest.approx(-0.2 * np.ptp(COLOUR_RGB["red"]), abs=1)
    gray = frames.mean(axis=-1, keepdims=True)
    pale = judge_clip((0.7 * frames + 0.3 * gray).astype(np.uint8), lone()).objects[0]
    assert pale.saturation_error == pytest.approx(-0.3 * np.ptp(COLOUR_RGB["red"]), abs=1)
    assert pale.brightness_error == pytest.approx(0, abs=1)


def test_late_windows_of_an_endless_stream_are_judged_as_well():
    world = ToyWorld()
    scores = []
    for seed in range(100):
        scene = world.scene(seed, "eval")
        scores.append(judge_clip(world.frames(scene, FOUR_SECONDS, start_frame=37 * seed), scene))
    result = Adherence.of(scores)
    assert [part.value >= 0.98 for part in parts(result)] == [True] * 4


@pytest.mark.parametrize("frames", [np.zeros((4, 8, 8), np.uint8), np.zeros((4, 8, 8, 3), np.float32)])
def test_frames_of_another_kind_are_refused(frames):
    with pytest.raises(ValueError, match="frames must be uint8"):
        judge_clip(frames, lone())
