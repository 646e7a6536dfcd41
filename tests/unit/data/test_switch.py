"""A scene that takes over from another goes on where its objects are."""

import numpy as np
import pytest

from genstream.data import vocabulary
from genstream.data.switch import continued, switch_scene
from genstream.data.toyworld import ToyWorld

WORLD = ToyWorld()
AT_S = 45 / 16


@pytest.mark.parametrize("seed", range(40))
def test_a_continued_object_stays_on_its_path(seed):
    later_s = np.linspace(0, 5, 41)
    for item in WORLD.scene(seed).objects:
        apart = continued(item, AT_S).centres(later_s, 128, 128) - item.centres(AT_S + later_s, 128, 128)
        # Where a path wraps, rounding may decide on which side an object is.
        apart[np.abs(apart) > 100] = 0
        assert np.abs(apart).max() < 0.2


def test_every_motion_is_continued():
    seen = {item.motion for seed in range(40) for item in WORLD.scene(seed).objects}
    assert {"bouncing", "circling", "still", "up"} <= seen


@pytest.mark.parametrize("seed", range(40))
def test_a_switch_moves_no_object_far(seed):
    before = WORLD.scene(seed)
    after = switch_scene(before, AT_S, seed).after
    moved = [
        np.abs(new.centres(np.zeros(1), 1, 1) - old.centres(np.array([AT_S]), 1, 1)).max()
        for old, new in zip(before.objects, after.objects, strict=False)
    ]
    # Into sight at most, for an object that was leaving the frame.
    assert min(moved) < 0.6
    assert not after.held_out


def test_switches_follow_from_their_seed_and_change_something():
    changed = set()
    for seed in range(80):
        before = WORLD.scene(seed)
        switch = switch_scene(before, AT_S, seed)
        assert switch == switch_scene(before, AT_S, seed)
        old, new = before.objects[0], switch.after.objects[0]
        differing = {
            name for name in ("colour", "shape", "motion") if getattr(old, name) != getattr(new, name)
        }
        assert differing or len(before.objects) == 2
        changed |= differing
    assert changed == {"colour", "shape", "motion"}


def test_captions_tell_of_a_new_background():
    told = 0
    for seed in range(200):
        before = WORLD.scene(seed)
        switch = switch_scene(before, AT_S, seed)
        if switch.after.background != before.background:
            words = vocabulary.BACKGROUNDS[switch.after.background]
            assert any(word in switch.caption(seed) for word in words)
            told += 1
    assert told > 20
