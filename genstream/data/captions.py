"""Captions of scenes from templates with synonyms."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from genstream.data import vocabulary
from genstream.data.scene import ObjectSpec, Scene


@dataclass(frozen=True, kw_only=True)
class CaptionStyle:
    """How captions vary; every share lies in [0, 1].

    Args:
        plain: Share of captions in the plain form "a red circle moving right".
        synonym: Share of words replaced by a synonym in the others.
        extra: Share that mentions the size, and again that mentions the background.
        omitted: Share in which one attribute of a lone object is left out.
    """

    plain: float
    synonym: float
    extra: float
    omitted: float


TRAINING_STYLE: Final = CaptionStyle(plain=0.3, synonym=0.5, extra=0.3, omitted=0.15)
COMPLETE_STYLE: Final = CaptionStyle(plain=0.5, synonym=0.5, extra=0.25, omitted=0.0)
LONGEST_WORDS: Final = 28
"""Of the longest caption: ten for each of two objects, three between them and five of the background."""
_PLAIN_JOINT = " and "


@dataclass(frozen=True)
class Phrase:
    """Part of a caption, with its spaces.

    Args:
        text: Words.
        item: The object they are about.
        background: The background they are about; what stands between two objects is about neither.
    """

    text: str
    item: ObjectSpec | None = None
    background: str | None = None


def plain_caption(scene: Scene) -> str:
    """The shortest complete caption: "a red circle moving right and a blue square moving left"."""
    return _PLAIN_JOINT.join(_plain_phrase(item) for item in scene.objects)


def describe(scene: Scene, generator: np.random.Generator, style: CaptionStyle = TRAINING_STYLE) -> str:
    """A caption of the scene that holds at every time."""
    return "".join(phrase.text for phrase in phrases(scene, generator, style))


def phrases(
    scene: Scene, generator: np.random.Generator, style: CaptionStyle = TRAINING_STYLE
) -> list[Phrase]:
    """The same caption in parts, each about one object, the background or neither."""
    if generator.random() < style.plain:
        plain = [Phrase(_plain_phrase(item), item) for item in scene.objects]
        return plain if len(plain) == 1 else [plain[0], Phrase(_PLAIN_JOINT), plain[1]]
    writer = _Writer(generator, style)
    if len(scene.objects) == 1:
        parts = [Phrase(writer.lone(scene.objects[0]), scene.objects[0])]
    else:
        parts = writer.pair(scene.objects)
    if generator.random() < style.extra:
        phrase = writer.choose(vocabulary.BACKGROUND_PHRASES)
        text = phrase.format(writer.word(vocabulary.BACKGROUNDS[scene.background]))
        joint = ", " if phrase.startswith("the") else " "
        parts.append(Phrase(joint + text, background=scene.background))
    return parts


def _plain_phrase(item: ObjectSpec) -> str:
    phrase = f"{item.colour} {item.shape} {_plain_motion(item.motion)}"
    return f"{_article(phrase)} {phrase}"


def _plain_motion(motion: str) -> str:
    if motion in vocabulary.HEADINGS:
        return f"{vocabulary.VERBS[0]} {vocabulary.HEADINGS[motion][0]}"
    return vocabulary.OTHER_MOTIONS[motion][0]


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"


class _Writer:
    """Random choices of one caption."""

    def __init__(self, generator: np.random.Generator, style: CaptionStyle) -> None:
        self._generator = generator
        self._style = style

    def chance(self, share: float) -> bool:
        return bool(self._generator.random() < share)

    def choose(self, choices: tuple[str, ...]) -> str:
        return choices[int(self._generator.integers(len(choices)))]

    def word(self, choices: tuple[str, ...]) -> str:
        return self.choose(choices) if self.chance(self._style.synonym) else choices[0]

    def lone(self, item: ObjectSpec) -> str:
        omitted = self.choose(("colour", "shape", "motion")) if self.chance(self._style.omitted) else ""
        colour = "" if omitted == "colour" else self.word(vocabulary.COLOURS[item.colour])
        shape = (
            self.choose(vocabulary.ANY_SHAPE)
            if omitted == "shape"
            else self.word(vocabulary.SHAPES[item.shape])
        )
        name = self.name(colour, shape, item.size)
        if omitted == "motion":
            return name
        form = self.choose(("{} {}", "{} {}", "{} is {}", "there is {} {}", "{} finite"))
        if form == "{} finite":
            return f"{name} {self.finite_motion(item.motion)}"
        return form.format(name, self.motion(item.motion))

    def pair(self, objects: tuple[ObjectSpec, ...]) -> list[Phrase]:
        back, front = (Phrase(self.complete(item), item) for item in objects)
        joint = self.word(("and", *vocabulary.JOINTS))
        if joint == "in front of" or (joint != "behind" and self.chance(0.5)):
            back, front = front, back
        return [back, Phrase(f" {joint} "), front]

    def complete(self, item: ObjectSpec) -> str:
        colour = self.word(vocabulary.COLOURS[item.colour])
        shape = self.word(vocabulary.SHAPES[item.shape])
        return f"{self.name(colour, shape, item.size)} {self.motion(item.motion)}"

    def name(self, colour: str, shape: str, size: str) -> str:
        size_word = self.word(vocabulary.SIZES[size]) if self.chance(self._style.extra) else ""
        phrase = " ".join(word for word in (size_word, colour, shape) if word)
        return f"{'the' if self.chance(0.1) else _article(phrase)} {phrase}"

    def motion(self, motion: str) -> str:
        if motion in vocabulary.HEADINGS:
            return f"{self.word(vocabulary.VERBS)} {self.word(vocabulary.HEADINGS[motion])}"
        return self.word(vocabulary.OTHER_MOTIONS[motion])

    def finite_motion(self, motion: str) -> str:
        if motion in vocabulary.HEADINGS:
            return f"{self.word(vocabulary.FINITE_VERBS)} {self.word(vocabulary.HEADINGS[motion])}"
        return self.word(vocabulary.FINITE_OTHER_MOTIONS[motion])
