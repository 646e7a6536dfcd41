"""The toy world: same seed, same frames; any window of an endless scene; captions and tracks that hold."""

import numpy as np
import pytest

from genstream.data import vocabulary
from genstream.data.captions import plain_caption
from genstream.data.prompts import evaluation_prompts
from genstream.data.scene import (
    DIRECTION,
    HELD_OUT_COLOUR_SHAPE,
    HELD_OUT_SHAPE_MOTION,
    ObjectSpec,
    Scene,
    sample_scene,
)
from genstream.data.toyworld import POINTS_PER_OBJECT, ToyWorld


def spec(**changes):
    values = {"colour": "red", "shape": "circle", "size": "medium", "motion": "right", "x": 0.5, "y": 0.5}
    return ObjectSpec(**(values | {"speed": 0.25} | changes))


def lone(**changes):
    return Scene(objects=(spec(**changes),), background="navy")


def test_same_seed_same_clip_and_another_seed_another_clip():
    world = ToyWorld()
    first, again, other = (world.clip(world.scene(seed, "train"), 9) for seed in (5, 5, 6))
    assert first.caption == again.caption
    assert np.array_equal(first.frames, again.frames)
    assert not np.array_equal(first.frames, other.frames)
    assert sample_scene(5, "train") != sample_scene(5, "eval")


def test_any_window_equals_the_same_frames_of_the_whole():
    world = ToyWorld(height=64, width=96)
    for seed in range(20):
        scene = world.scene(seed, "eval")
        whole, part = world.clip(scene, 40), world.clip(scene, 11, start_frame=29)
        assert np.array_equal(whole.frames[29:], part.frames)
        assert np.array_equal(whole.tracks[:, 29:], part.tracks)
        assert np.array_equal(whole.visible[:, 29:], part.visible)


def test_training_never_sees_a_held_out_combination_and_evaluation_often_does():
    training = [sample_scene(seed, "train") for seed in range(3000)]
    pairs = {(item.colour, item.shape) for scene in training for item in scene.objects}
    moves = {(item.shape, item.motion) for scene in training for item in scene.objects}
    assert not pairs & HELD_OUT_COLOUR_SHAPE
    assert not moves & HELD_OUT_SHAPE_MOTION
    assert len(pairs) == 32 - len(HELD_OUT_COLOUR_SHAPE)
    assert len(moves) == 44 - len(HELD_OUT_SHAPE_MOTION)
    assert np.mean([sample_scene(seed, "eval").held_out for seed in range(500)]) > 0.5


def test_a_quarter_of_the_scenes_has_two_objects_of_different_colours():
    counts = [len(sample_scene(seed, "train").objects) for seed in range(2000)]
    assert 0.22 < np.mean(np.array(counts) == 2) < 0.28
    with pytest.raises(ValueError, match="two of red"):
        Scene(objects=(spec(), spec(motion="left")), background="navy")


def test_every_object_is_in_sight_at_the_start():
    world = ToyWorld()
    for seed in range(200):
        assert world.clip(world.scene(seed, "train"), 1).visible.all()


def test_background_and_colour_are_the_true_ones_at_the_centre():
    world = ToyWorld()
    for colour, rgb in vocabulary.COLOUR_RGB.items():
        frame = world.frames(lone(colour=colour, motion="still", speed=0), 1)[0]
        assert tuple(frame[64, 64]) == rgb
        assert tuple(frame[0, 0]) == vocabulary.BACKGROUND_RGB["navy"]


@pytest.mark.parametrize("shape", vocabulary.SHAPES)
def test_tracked_points_lie_on_the_object_and_its_mass_is_where_the_track_says(shape):
    world = ToyWorld()
    clip = world.clip(lone(shape=shape, colour="white", motion="up-right", x=0.4, y=0.7), 16)
    assert clip.tracks.shape == (POINTS_PER_OBJECT, 16, 2)
    for index, frame in enumerate(clip.frames):
        for x, y in clip.tracks[:, index]:
            assert frame[int(y), int(x)].min() > 230
        weight = frame[..., 0].astype(float) - vocabulary.BACKGROUND_RGB["navy"][0]
        rows, columns = np.mgrid[:128, :128] + 0.5
        centre = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
        assert np.abs(centre - clip.tracks[0, index]).max() < 0.15


def test_edges_are_antialiased_without_bias():
    world = ToyWorld()
    areas = []
    for offset in np.linspace(0, 1, 7):
        scene = lone(colour="white", motion="still", speed=0, x=0.5 + offset / 128)
        weight = (world.frames(scene, 1)[0, ..., 0].astype(float) - 16) / (240 - 16)
        areas.append(weight.sum())
    radius = 0.12 * 128
    assert np.allclose(areas, np.pi * radius**2, rtol=0.01)


def test_a_covered_point_is_not_visible():
    back = spec(colour="blue", size="small", motion="still", speed=0)
    front = spec(size="large", x=0.1)
    scene = Scene(objects=(back, front), background="black")
    clip = ToyWorld().clip(scene, 64)
    covered = [index for index, frame in enumerate(clip.frames) if tuple(frame[64, 64]) == (220, 40, 40)]
    assert covered
    assert np.array_equal(np.flatnonzero(~clip.visible[0]), covered)
    x = clip.tracks[POINTS_PER_OBJECT, :, 0]
    assert np.array_equal(clip.visible[POINTS_PER_OBJECT], (x >= 0) & (x < 128))


@pytest.mark.parametrize("motion", DIRECTION)
def test_a_moving_object_keeps_its_direction_for_ever_and_is_never_long_out_of_sight(motion):
    world = ToyWorld()
    clip = world.clip(lone(motion=motion, speed=0.2), 16 * 60, start_frame=10_000)
    steps = np.diff(clip.tracks[0], axis=0)
    along = steps @ np.array(DIRECTION[motion])
    usual = np.isclose(along, 0.2 * 128 / 16, atol=2e-3)
    assert usual.mean() > 0.97
    # A wrap happens out of sight.
    before = np.flatnonzero(~usual)
    assert not clip.visible[0, before].any()
    assert clip.visible[0].mean() > 0.6


@pytest.mark.parametrize("motion", ["still", "bouncing", "circling"])
def test_other_motions_stay_in_the_frame_for_ever(motion):
    world = ToyWorld(height=64, width=96)
    scenes = (sample_scene(seed, "train") for seed in range(400))
    kept = [scene for scene in scenes if [item.motion for item in scene.objects] == [motion]]
    assert len(kept) > 10
    for scene in kept:
        tracks = world.clip(scene, 200, start_frame=57_600).tracks[0]
        reach = scene.objects[0].extent * 64 - 1e-3
        assert (tracks >= reach).all()
        assert (tracks <= np.array([96, 64]) - reach).all()


def test_bouncing_meets_a_wall_on_both_axes_within_four_seconds():
    world = ToyWorld()
    for seed in range(300):
        for item in sample_scene(seed, "train").objects:
            if item.motion == "bouncing":
                path = item.centres(np.arange(65) / 16, world.height, world.width)
                signs = np.sign(np.diff(path, axis=0))
                assert (signs.min(axis=0) < 0).all()
                assert (signs.max(axis=0) > 0).all()


def test_captions_use_known_words_only_and_plain_ones_are_frequent():
    world = ToyWorld()
    known = set(vocabulary.words())
    scenes = [world.scene(seed, "train") for seed in range(500)]
    captions = [world.caption(scene, variant) for scene in scenes for variant in range(3)]
    used = {word for caption in captions for word in caption.replace(",", "").split()}
    assert used == known
    assert np.mean([world.caption(scene) == plain_caption(scene) for scene in scenes]) > 0.3


def test_plain_captions():
    two = Scene(
        objects=(spec(), spec(colour="orange", shape="square", motion="still", speed=0)), background="navy"
    )
    assert plain_caption(two) == "a red circle moving right and an orange square standing still"


def test_evaluation_prompts_are_fixed_balanced_and_complete():
    prompts = evaluation_prompts()
    assert prompts == evaluation_prompts()
    assert prompts[:10] == evaluation_prompts(10)
    firsts = [prompt.scene.objects[0] for prompt in prompts]
    counts = [sum(item.colour == colour for item in firsts) for colour in vocabulary.COLOURS]
    assert set(counts) == {25}
    assert sum(item.motion in ("left", "right", "up", "down") for item in firsts) > 100
    for prompt in prompts:
        for item in prompt.scene.objects:
            assert any(word in prompt.caption for word in vocabulary.COLOURS[item.colour])
            assert any(word in prompt.caption for word in vocabulary.SHAPES[item.shape])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ToyWorld(height=8), "height must be at least 32, got 8"),
        (lambda: ToyWorld(fps=0), "fps must be at least 1, got 0"),
        (lambda: ToyWorld().scene(-1, "train"), "seed must be at least 0, got -1"),
        (lambda: ToyWorld().scene(1, "test"), "split must be one of train, eval, got 'test'"),
        (lambda: ToyWorld().clip(lone(), 0), "num_frames must be at least 1, got 0"),
        (lambda: ToyWorld().frames(lone(), 1, -1), "start_frame must be at least 0, got -1"),
        (lambda: spec(colour="pink"), "colour must be one of .*, got 'pink'"),
        (lambda: spec(orbit=0.2), "orbit must be 0 unless motion is circling"),
        (lambda: evaluation_prompts(0), "count must be at least 1, got 0"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
