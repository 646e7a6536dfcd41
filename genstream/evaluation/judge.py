"""The analytic judge: scores how well toy-world clips follow their prompts, reading pixels only."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from genstream.data.scene import ObjectSpec, Scene
from genstream.data.vocabulary import COLOUR_RGB
from genstream.evaluation.observation import Observation, ObservedObject, observe
from genstream.evaluation.proportion import Proportion


@dataclass(frozen=True, kw_only=True)
class ObjectScore:
    """What is right about one expected object.

    Args:
        colour_error: Root mean square distance of its colour from the palette's, of 255; NaN if unseen.
        brightness_error: Mean of its channels minus the palette's, of 255; NaN if unseen.
        saturation_error: Largest minus least of its channels, minus the palette's, of 255; NaN if unseen.
    """

    colour: bool
    shape: bool
    direction: bool
    colour_error: float
    brightness_error: float
    saturation_error: float


@dataclass(frozen=True, kw_only=True)
class ClipScore:
    """What is right about one clip; one entry per expected object."""

    objects: tuple[ObjectScore, ...]
    count: bool
    observation: Observation


@dataclass(frozen=True, kw_only=True)
class Adherence:
    """How often clips show what was asked for: per expected object, and for the count per clip."""

    colour: Proportion
    shape: Proportion
    direction: Proportion
    count: Proportion

    @classmethod
    def of(cls, scores: Iterable[ClipScore]) -> "Adherence":
        """Adherence over some clips."""
        clips = list(scores)
        objects = [item for clip in clips for item in clip.objects]
        return cls(
            colour=_share([item.colour for item in objects]),
            shape=_share([item.shape for item in objects]),
            direction=_share([item.direction for item in objects]),
            count=_share([clip.count for clip in clips]),
        )


def judge_clip(frames: NDArray[np.uint8], expected: Scene, fps: float = 16) -> ClipScore:
    """Score a clip against the attributes of a scene; places, speeds and background are free.

    Args:
        frames: [F, H, W, 3]; about four seconds, in which every motion shows what it is.
        expected: What the prompt asks for.
        fps: Frames per second.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    observation = observe(frames, fps)
    # Only as many as were asked for, the most visible ones: no credit for showing everything at once.
    seen: list[ObservedObject | None] = list(observation.objects[: len(expected.objects)])
    seen += [None] * (len(expected.objects) - len(seen))
    candidates = [
        tuple(_score(item, found) for item, found in zip(expected.objects, order, strict=True))
        for order in permutations(seen)
    ]
    return ClipScore(
        objects=max(candidates, key=_closeness),
        count=observation.count == len(expected.objects),
        observation=observation,
    )


def _score(expected: ObjectSpec, seen: ObservedObject | None) -> ObjectScore:
    if seen is None:
        nan = float("nan")
        return ObjectScore(
            colour=False,
            shape=False,
            direction=False,
            colour_error=nan,
            brightness_error=nan,
            saturation_error=nan,
        )
    true = np.array(COLOUR_RGB[expected.colour], dtype=np.float32)
    error = seen.rgb - true
    return ObjectScore(
        colour=seen.colour == expected.colour,
        shape=seen.shape == expected.shape,
        direction=seen.motion == expected.motion,
        colour_error=float(np.sqrt(np.mean(error**2))),
        brightness_error=float(error.mean()),
        saturation_error=float(np.ptp(seen.rgb) - np.ptp(true)),
    )


def _closeness(scores: tuple[ObjectScore, ...]) -> tuple[int, int]:
    """Objects are told apart by their colours first."""
    return sum(item.colour for item in scores), sum(item.shape + item.direction for item in scores)


def _share(results: list[bool]) -> Proportion:
    return Proportion(successes=sum(results), total=len(results))
