"""A toy-world scene as a closed-form function of time, and how scenes are drawn at random."""

from dataclasses import dataclass
from math import cos, pi, sin
from types import MappingProxyType
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from genstream.data import vocabulary

Split = Literal["train", "eval"]

HELD_OUT_COLOUR_SHAPE: Final = frozenset(
    {("orange", "star"), ("green", "triangle"), ("purple", "circle"), ("yellow", "square")}
)
HELD_OUT_SHAPE_MOTION: Final = frozenset(
    {
        ("star", "left"),
        ("triangle", "up"),
        ("square", "circling"),
        ("circle", "down-right"),
        ("triangle", "down-left"),
    }
)
# Half the side of the bounding box in radii. A square and a circle of one size cover the same area.
SHAPE_EXTENT: Final = MappingProxyType({"circle": 1.0, "square": 0.88, "triangle": 1.3, "star": 1.3})
_DIAGONAL = 0.5**0.5
DIRECTION: Final = MappingProxyType(
    {
        "left": (-1.0, 0.0),
        "right": (1.0, 0.0),
        "up": (0.0, -1.0),
        "down": (0.0, 1.0),
        "up-left": (-_DIAGONAL, -_DIAGONAL),
        "up-right": (_DIAGONAL, -_DIAGONAL),
        "down-left": (-_DIAGONAL, _DIAGONAL),
        "down-right": (_DIAGONAL, _DIAGONAL),
    }
)
TWO_OBJECT_SHARE: Final = 0.25
HELD_OUT_SHARE: Final = 0.5
MOTION_SHARE: Final = MappingProxyType(
    {name: 0.12 if name in ("left", "right", "up", "down") else 0.06 for name in DIRECTION}
    | {"still": 0.09, "bouncing": 0.09, "circling": 0.10}
)


@dataclass(frozen=True, kw_only=True)
class ObjectSpec:
    """One object: what it is, and where it is at any time.

    Args:
        x: Centre at time 0 in frame widths; of a circling object, the centre of its orbit.
        y: The same in frame heights, downwards.
        speed: Short sides of the frame per second, 0 if still.
        heading: Radians, clockwise from right: where a bouncing object goes at first, or where on its
            orbit a circling object starts.
        orbit: Radius of the orbit in short sides, 0 if not circling; negative orbits counterclockwise.
    """

    colour: str
    shape: str
    size: str
    motion: str
    x: float
    y: float
    speed: float
    heading: float = 0.0
    orbit: float = 0.0

    def __post_init__(self) -> None:
        _require("colour", self.colour, tuple(vocabulary.COLOURS))
        _require("shape", self.shape, tuple(vocabulary.SHAPES))
        _require("size", self.size, tuple(vocabulary.SIZES))
        _require("motion", self.motion, vocabulary.MOTIONS)
        if (self.orbit != 0) != (self.motion == "circling"):
            raise ValueError(f"orbit must be 0 unless motion is circling, got {self.orbit} for {self.motion}")

    @property
    def radius(self) -> float:
        """Radius in short sides of the frame."""
        return vocabulary.SIZE_RADIUS[self.size]

    @property
    def extent(self) -> float:
        """Half the side of the bounding box in short sides of the frame."""
        return self.radius * SHAPE_EXTENT[self.shape]

    @property
    def held_out(self) -> bool:
        """Whether this combination of attributes is never trained on."""
        return (self.colour, self.shape) in HELD_OUT_COLOUR_SHAPE or (
            self.shape,
            self.motion,
        ) in HELD_OUT_SHAPE_MOTION

    def centres(self, times_s: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
        """Centre (x, y) in pixels at each time, [F, 2]; pixel i covers [i, i + 1).

        A moving object that leaves the frame comes back on the other side as soon as the last of it is
        out of sight, so that the motion and its caption hold forever.
        """
        short = min(height, width)
        size = np.array([width, height], dtype=np.float64)  # [2]
        start = np.array([self.x, self.y]) * size
        if self.motion == "circling":
            angle = self.heading + times_s * self.speed / self.orbit
            return start + abs(self.orbit) * short * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        step = self.velocity * short
        path = start + times_s[:, None] * step  # [F, 2]
        margin = self.extent * short
        if self.motion == "bouncing":
            return _reflect(path, margin, size - margin)
        if self.motion == "still":
            return path
        period = size + 2 * margin
        wrapped: NDArray[np.float64] = np.mod(path + margin, period) - margin
        # An axis without motion must not wrap by rounding.
        return np.where(step == 0, path, wrapped)

    @property
    def velocity(self) -> NDArray[np.float64]:
        """Velocity (x, y) at time 0 in short sides per second, of everything but circling objects, [2]."""
        if self.motion == "bouncing":
            return self.speed * np.array([cos(self.heading), sin(self.heading)])
        return self.speed * np.array(DIRECTION.get(self.motion, (0.0, 0.0)))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One or two objects over a plain background; the later object is in front."""

    objects: tuple[ObjectSpec, ...]
    background: str
    phrasing_seed: int = 0

    def __post_init__(self) -> None:
        _require("background", self.background, tuple(vocabulary.BACKGROUNDS))
        if len(self.objects) not in (1, 2):
            raise ValueError(f"objects must hold 1 or 2 objects, got {len(self.objects)}")
        if len({item.colour for item in self.objects}) < len(self.objects):
            raise ValueError(f"objects must differ in colour, got two of {self.objects[0].colour}")

    @property
    def held_out(self) -> bool:
        """Whether any of its objects is a combination that is never trained on."""
        return any(item.held_out for item in self.objects)


def sample_scene(seed: int, split: Split) -> Scene:
    """The scene of a seed: the same forever for one (seed, split).

    Scenes of the train split never hold a held-out combination; at least half of those of the eval split do.
    """
    _require("split", split, get_args(Split))
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    generator = np.random.default_rng((seed, get_args(Split).index(split)))
    wants_held_out = split == "eval" and generator.random() < HELD_OUT_SHARE
    count = 2 if generator.random() < TWO_OBJECT_SHARE else 1
    while True:
        scene = _draw_scene(generator, count)
        if scene.held_out if wants_held_out else (split == "eval" or not scene.held_out):
            return scene


def place_object(
    generator: np.random.Generator, colour: str, shape: str, size: str, motion: str
) -> ObjectSpec:
    """An object of these attributes that is wholly in sight at time 0, with a random place and speed."""
    extent = vocabulary.SIZE_RADIUS[size] * SHAPE_EXTENT[shape]
    # 20 to 45 pixels per second at 128 x 128.
    speed = float(generator.uniform(0.156, 0.352))
    heading = orbit = 0.0
    if motion == "still":
        speed = 0.0
    elif motion == "bouncing":
        # Fast and steep enough to meet a wall on both axes within four seconds.
        speed = float(generator.uniform(0.36, 0.42))
        heading = pi / 2 * int(generator.integers(4)) + float(generator.uniform(0.7, 0.87))
    elif motion == "circling":
        turn_s = float(generator.uniform(3.0, 4.5))
        orbit = float(generator.uniform(0.16, 0.26))
        speed = 2 * pi * orbit / turn_s
        heading = float(generator.uniform(0, 2 * pi))
    reach = extent + orbit
    x, y = (float(value) for value in generator.uniform(reach, 1 - reach, size=2))
    if orbit and generator.random() < 0.5:
        orbit = -orbit
    return ObjectSpec(
        colour=colour,
        shape=shape,
        size=size,
        motion=motion,
        x=x,
        y=y,
        speed=speed,
        heading=heading,
        orbit=orbit,
    )


def overlap_at_start(first: ObjectSpec, second: ObjectSpec) -> bool:
    """Whether the bounding boxes of two objects meet at time 0 in a square frame."""
    start = np.zeros(1)
    distance = np.abs(first.centres(start, 1, 1) - second.centres(start, 1, 1)).max()
    return bool(distance < first.extent + second.extent)


def _draw_scene(generator: np.random.Generator, count: int) -> Scene:
    colours = generator.choice(tuple(vocabulary.COLOURS), size=count, replace=False)
    looks = [
        (
            str(colour),
            str(generator.choice(tuple(vocabulary.SHAPES))),
            str(generator.choice(tuple(vocabulary.SIZES))),
            str(generator.choice(tuple(MOTION_SHARE), p=tuple(MOTION_SHARE.values()))),
        )
        for colour in colours
    ]
    return Scene(
        objects=place_apart(generator, looks),
        background=str(generator.choice(tuple(vocabulary.BACKGROUNDS))),
        phrasing_seed=int(generator.integers(2**31)),
    )


def place_apart(
    generator: np.random.Generator, looks: list[tuple[str, str, str, str]]
) -> tuple[ObjectSpec, ...]:
    """Objects of these (colour, shape, size, motion), redrawn until none covers another at time 0."""
    while True:
        objects = tuple(place_object(generator, *look) for look in looks)
        if len(objects) == 1 or not overlap_at_start(*objects):
            return objects


def _reflect(path: NDArray[np.float64], low: float, high: NDArray[np.float64]) -> NDArray[np.float64]:
    span = high - low
    folded = np.mod(path - low, 2 * span)
    bounced: NDArray[np.float64] = low + span - np.abs(folded - span)
    return bounced


def _require(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
