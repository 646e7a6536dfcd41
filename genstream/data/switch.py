"""What a scene becomes when its prompt is switched: another scene that goes on where the objects are."""

from dataclasses import dataclass, replace
from math import atan2, cos, sin
from typing import Final

import numpy as np

from genstream.data import vocabulary
from genstream.data.captions import CaptionStyle, describe
from genstream.data.scene import SHAPE_EXTENT, ObjectSpec, Scene, place_object, sample_scene

_MOMENT_S: Final = 1e-3
_STREAM: Final = 7
"""Keeps these draws apart from those of scenes of the same seed."""
_STYLE: Final = CaptionStyle(plain=0.3, synonym=0.5, extra=0.3, omitted=0.0)
_EVERYTHING: Final = CaptionStyle(plain=0.0, synonym=0.5, extra=1.0, omitted=0.0)


@dataclass(frozen=True, kw_only=True)
class Switch:
    """The scene after a switch, with time 0 at the switch, and how its caption must be written.

    Attributes:
        after: the scene.
        style: mentions whatever cannot be known from the scene before.
    """

    after: Scene
    style: CaptionStyle

    def caption(self, variant: int = 0) -> str:
        """One of many captions for the scene after the switch."""
        return describe(self.after, np.random.default_rng((self.after.phrasing_seed, variant)), self.style)


def switch_scene(before: Scene, at_s: float, seed: int) -> Switch:
    """A scene never held out that takes over from `before` at `at_s` seconds, in a square frame.

    Half the time one attribute of one object changes, otherwise all of it; background and size change only
    where the caption says so. The new first object stands where the old one was.
    """
    generator = np.random.default_rng((seed, _STREAM))
    while True:
        kind = generator.random()
        if kind < 0.5:
            switch = Switch(after=_change_one(before, at_s, generator), style=_STYLE)
        else:
            switch = _change_all(before, at_s, generator, sized=kind < 0.75)
        if not switch.after.held_out:
            return switch


def continued(item: ObjectSpec, at_s: float) -> ObjectSpec:
    """The same object on the same path in a square frame, with time 0 at `at_s`."""
    if item.motion == "circling":
        return replace(item, heading=item.heading + at_s * item.speed / item.orbit)
    now, soon = item.centres(np.array([at_s, at_s + _MOMENT_S]), 1, 1)
    heading = item.heading
    if item.motion == "bouncing":
        heading = atan2(soon[1] - now[1], soon[0] - now[0])
    return replace(item, x=float(now[0]), y=float(now[1]), heading=heading)


def _change_one(before: Scene, at_s: float, generator: np.random.Generator) -> Scene:
    objects = [continued(item, at_s) for item in before.objects]
    index = int(generator.integers(len(objects)))
    old = objects[index]
    attribute = str(generator.choice(("motion", "colour", "shape"), p=(0.5, 0.25, 0.25)))
    if attribute == "motion":
        motion = _other(vocabulary.MOTIONS, {old.motion}, generator)
        fresh = place_object(generator, old.colour, old.shape, old.size, motion)
        objects[index] = _moved(fresh, before.objects[index], at_s)
    elif attribute == "colour":
        taken = {item.colour for item in objects}
        objects[index] = replace(old, colour=_other(tuple(vocabulary.COLOURS), taken, generator))
    else:
        objects[index] = replace(old, shape=_other(tuple(vocabulary.SHAPES), {old.shape}, generator))
    return replace(before, objects=tuple(objects), phrasing_seed=int(generator.integers(2**31)))


def _change_all(before: Scene, at_s: float, generator: np.random.Generator, *, sized: bool) -> Switch:
    after = sample_scene(int(generator.integers(2**31)), "train")
    first, *others = after.objects
    style = _EVERYTHING
    if sized:
        first = replace(first, size=before.objects[0].size)
        after = replace(after, background=before.background)
        style = _STYLE
    first = _moved(first, before.objects[0], at_s)
    return Switch(after=replace(after, objects=(first, *others)), style=style)


def _moved(item: ObjectSpec, old: ObjectSpec, at_s: float) -> ObjectSpec:
    """`item` starting where `old` is at `at_s`, or as near as its own path allows."""
    x, y = (float(value) for value in old.centres(np.array([at_s]), 1, 1)[0])
    if item.motion == "circling":
        x -= abs(item.orbit) * cos(item.heading)
        y -= abs(item.orbit) * sin(item.heading)
    reach = vocabulary.SIZE_RADIUS[item.size] * SHAPE_EXTENT[item.shape] + abs(item.orbit)
    return replace(item, x=min(max(x, reach), 1 - reach), y=min(max(y, reach), 1 - reach))


def _other(choices: tuple[str, ...], taken: set[str], generator: np.random.Generator) -> str:
    return str(generator.choice([choice for choice in choices if choice not in taken]))
