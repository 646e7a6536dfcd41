"""Every attribute of the toy world with its words; the first word of each list is the plain one."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

Rgb = tuple[int, int, int]
Words = Mapping[str, tuple[str, ...]]

COLOUR_RGB: Final[Mapping[str, Rgb]] = MappingProxyType(
    {
        "red": (220, 40, 40),
        "orange": (240, 140, 30),
        "yellow": (240, 225, 50),
        "green": (50, 180, 70),
        "cyan": (60, 210, 220),
        "blue": (50, 90, 230),
        "purple": (150, 60, 200),
        "white": (240, 240, 240),
    }
)
BACKGROUND_RGB: Final[Mapping[str, Rgb]] = MappingProxyType(
    {
        "black": (14, 14, 18),
        "navy": (16, 22, 56),
        "dark green": (16, 44, 28),
        "dark gray": (56, 56, 60),
        "brown": (58, 30, 24),
        "dark teal": (14, 50, 56),
    }
)
SIZE_RADIUS: Final[Mapping[str, float]] = MappingProxyType({"small": 0.085, "medium": 0.12, "large": 0.16})
"""Radius of an object in short sides of the frame."""

COLOURS: Final[Words] = MappingProxyType(
    {name: (name,) for name in COLOUR_RGB} | {"cyan": ("cyan", "turquoise"), "purple": ("purple", "violet")}
)
SHAPES: Final[Words] = MappingProxyType(
    {
        "circle": ("circle", "ball", "disc"),
        "square": ("square", "box"),
        "triangle": ("triangle",),
        "star": ("star",),
    }
)
SIZES: Final[Words] = MappingProxyType(
    {"small": ("small", "little", "tiny"), "medium": ("medium",), "large": ("large", "big", "huge")}
)
BACKGROUNDS: Final[Words] = MappingProxyType(
    {
        "black": ("black",),
        "navy": ("navy", "dark blue"),
        "dark green": ("dark green",),
        "dark gray": ("dark gray", "dark grey", "gray"),
        "brown": ("brown", "dark brown"),
        "dark teal": ("dark teal", "teal"),
    }
)
HEADINGS: Final[Words] = MappingProxyType(
    {
        "left": ("left", "to the left", "leftward", "leftwards"),
        "right": ("right", "to the right", "rightward", "rightwards"),
        "up": ("up", "upward", "upwards"),
        "down": ("down", "downward", "downwards"),
        "up-left": ("up and left", "diagonally up and left", "up and to the left", "to the top left"),
        "up-right": ("up and right", "diagonally up and right", "up and to the right", "to the top right"),
        "down-left": (
            "down and left",
            "diagonally down and left",
            "down and to the left",
            "to the bottom left",
        ),
        "down-right": (
            "down and right",
            "diagonally down and right",
            "down and to the right",
            "to the bottom right",
        ),
    }
)
VERBS: Final = ("moving", "drifting", "going", "travelling", "sliding", "flying")
FINITE_VERBS: Final = ("moves", "drifts", "goes", "travels", "slides", "flies")
OTHER_MOTIONS: Final[Words] = MappingProxyType(
    {
        "still": ("standing still", "not moving", "staying still", "at rest"),
        "bouncing": ("bouncing around", "bouncing", "bouncing off the walls"),
        "circling": ("circling", "circling around", "going round and round", "orbiting"),
    }
)
FINITE_OTHER_MOTIONS: Final[Words] = MappingProxyType(
    {
        "still": ("stands still", "does not move", "stays still", "rests"),
        "bouncing": ("bounces around", "bounces", "bounces off the walls"),
        "circling": ("circles around", "goes round and round", "orbits"),
    }
)
MOTIONS: Final = (*HEADINGS, *OTHER_MOTIONS)
ATTRIBUTES: Final[Mapping[str, Words]] = MappingProxyType(
    {
        "colour": COLOURS,
        "shape": SHAPES,
        "size": SIZES,
        "motion": MappingProxyType({**HEADINGS, **OTHER_MOTIONS}),
        "background": BACKGROUNDS,
    }
)
ANY_SHAPE: Final = ("object", "shape", "thing")
JOINTS: Final = ("and", "in front of", "behind", "with")
BACKGROUND_PHRASES: Final = (
    "on a {} background",
    "against a {} background",
    "over a {} background",
    "on {}",
    "the background is {}",
)
OTHER_WORDS: Final = ("a", "an", "the", "there", "is")


def words() -> tuple[str, ...]:
    """All words that captions can use, lower case, sorted."""
    phrases = [*VERBS, *FINITE_VERBS, *ANY_SHAPE, *JOINTS, *OTHER_WORDS]
    phrases += [phrase.format("") for phrase in BACKGROUND_PHRASES]
    for table in (COLOURS, SHAPES, SIZES, BACKGROUNDS, HEADINGS, OTHER_MOTIONS, FINITE_OTHER_MOTIONS):
        phrases += [phrase for choices in table.values() for phrase in choices]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))
