"""What can be seen in a toy-world clip, from its pixels alone."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from genstream.data.vocabulary import COLOUR_RGB
from genstream.evaluation.components import label_regions
from genstream.evaluation.motion import classify_motion
from genstream.evaluation.shapes import classify_shape

# Smallest difference from the background, of 255, and share of an object's colour that make a pixel its own.
_MINIMUM_CONTRAST: Final = 40
_MINIMUM_COVER: Final = 0.5
# Two parts whose colours are closer than this are one object; palette colours are 88 apart at least.
_SAME_COLOUR: Final = 50.0
# A seventh of the smallest object, in squared short sides.
_MINIMUM_AREA: Final = 0.0034
_MINIMUM_SEEN: Final = 0.1
_WHOLE_SHARE: Final = 0.9
_SHAPE_FRAMES: Final = 16
_NAMES: Final = tuple(COLOUR_RGB)
_PALETTE: Final = np.array(tuple(COLOUR_RGB.values()), dtype=np.float32)
_NOTHING: Final = 255

Masks = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ObservedObject:
    """One object as seen.

    Args:
        shape: None if it was never seen well enough.
        motion: None if it was never seen well enough.
        rgb: Median colour of its pixels, [3].
        centres: (x, y) in pixels, NaN where unseen, [F, 2].
        areas: Pixels, [F].
    """

    colour: str
    shape: str | None
    motion: str | None
    rgb: NDArray[np.float32]
    centres: NDArray[np.float64]
    areas: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A clip as seen: objects, the most visible first, how many at a time, and the background, [3]."""

    objects: tuple[ObservedObject, ...]
    count: int
    background: NDArray[np.float32]


def observe(frames: NDArray[np.uint8], fps: float = 16) -> Observation:
    """Find the objects of a clip by their colours, and what they are and do.

    Objects of one colour count apart but are followed as one.

    Args:
        frames: [F, H, W, 3].
        fps: Frames per second.
    """
    background = np.median(frames[:, ::2, ::2].reshape(len(frames), -1, 3), axis=1)  # [F, 3]
    labels, cover = _label_colours(frames, background)
    short_side = min(frames.shape[1:3])
    found = []
    for colours, rgb in _group_colours(frames, np.where(cover > _MINIMUM_COVER, labels, _NOTHING)):
        silhouettes = _Silhouettes(np.where(np.isin(labels, colours), cover, 0), short_side)
        if (silhouettes.areas > 0).mean() >= _MINIMUM_SEEN:
            found.append((silhouettes, colours[0], rgb))
    found.sort(key=lambda item: -int(item[0].areas.sum()))
    objects = tuple(
        ObservedObject(
            colour=_NAMES[colour],
            shape=silhouettes.shape(),
            motion=silhouettes.motion(short_side, fps),
            rgb=rgb,
            centres=silhouettes.centres,
            areas=silhouettes.areas,
        )
        for silhouettes, colour, rgb in found
    )
    count = _count([item[0] for item in found])
    return Observation(
        objects=objects, count=count, background=np.median(background, axis=0).astype(np.float32)
    )


def _label_colours(
    frames: NDArray[np.uint8], background: NDArray[np.float64]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Palette colour of each pixel, _NOTHING on the background, and how far it covers it; both [F, H, W].

    A pixel belongs to the colour whose direction from the background is nearest to its own, so that dim and
    antialiased pixels keep their hue.
    """
    difference = frames.astype(np.int16) - background[:, None, None].astype(np.int16)
    strong = (np.abs(difference) > _MINIMUM_CONTRAST).any(axis=-1)
    pixels = difference[strong].astype(np.float32)  # [n, 3]
    toward = _PALETTE - np.median(background, axis=0).astype(np.float32)  # [8, 3]
    length = np.linalg.norm(toward, axis=1)
    along = pixels @ (toward / length[:, None]).T  # [n, 8]
    best = along.argmax(axis=1)
    labels = np.full(frames.shape[:3], _NOTHING, dtype=np.uint8)
    labels[strong] = best
    cover = np.zeros(frames.shape[:3], dtype=np.float32)
    cover[strong] = along[np.arange(len(best)), best] / length[best]
    return labels, cover


def _group_colours(
    frames: NDArray[np.uint8], labels: NDArray[np.uint8]
) -> list[tuple[list[int], NDArray[np.float32]]]:
    """Palette colours that together make one object, the largest first, with its median colour, [3]."""
    areas = np.bincount(labels.ravel(), minlength=_NOTHING + 1)[: len(_NAMES)]
    least = _MINIMUM_AREA * min(labels.shape[1:]) ** 2 * len(labels) * _MINIMUM_SEEN / 4
    groups: list[tuple[list[int], NDArray[np.float32]]] = []
    for colour in np.argsort(-areas, kind="stable").tolist():
        if areas[colour] < max(least, 1):
            break
        rgb = np.median(frames[labels == colour], axis=0).astype(np.float32)
        near = [group for group in groups if np.linalg.norm(group[1] - rgb) < _SAME_COLOUR]
        if near:
            near[0][0].append(colour)
        else:
            groups.append(([colour], rgb))
    return groups


def _count(found: list["_Silhouettes"]) -> int:
    """The largest number of objects that is in sight at once in at least a tenth of the frames."""
    if not found:
        return 0
    seen = np.sum([(item.areas > 0) * item.pieces for item in found], axis=0)  # [F]
    return max(number for number in range(seen.max() + 1) if (seen >= number).mean() >= _MINIMUM_SEEN)


class _Silhouettes:
    """The largest region of one object's pixels in each frame."""

    def __init__(self, cover: NDArray[np.float32], short_side: int) -> None:
        regions = label_regions(cover > _MINIMUM_COVER)
        sizes = np.bincount(regions.ravel())
        sizes[0] = 0
        owner = np.zeros(len(sizes), dtype=np.int64)
        owner[regions[regions > 0]] = np.nonzero(regions)[0]
        large = np.flatnonzero(sizes >= _MINIMUM_AREA * short_side**2)
        per_frame = np.bincount(owner[large], minlength=len(cover))
        # Median: an object that another one cuts in two for a while is still one.
        self.pieces = int(np.median(per_frame[per_frame > 0])) if len(large) else 0
        largest = np.full(len(cover), -1)
        for index in large[np.argsort(sizes[large], kind="stable")].tolist():
            largest[owner[index]] = index
        self.masks = regions == largest[:, None, None]
        self.areas = np.count_nonzero(self.masks, axis=(1, 2))
        self.centres = _centroids(self.masks, cover)
        edges = (self.masks[:, [0, -1]].any(axis=(1, 2)), self.masks[:, :, [0, -1]].any(axis=(1, 2)))
        self._cut = edges[0] | edges[1]

    def whole(self) -> Masks:
        """Frames in which hardly anything of the object is hidden or beyond the border, [F]."""
        inside = self.areas[(self.areas > 0) & ~self._cut]
        usual = np.median(inside) if len(inside) else self.areas.max()
        enough: Masks = self.areas >= max(_WHOLE_SHARE * usual, 1)
        return enough

    def shape(self) -> str | None:
        frames = np.flatnonzero(self.whole())
        picked = frames[np.linspace(0, len(frames) - 1, min(len(frames), _SHAPE_FRAMES)).astype(int)]
        return classify_shape([_crop(self.masks[index]) for index in picked])

    def motion(self, short_side: int, fps: float) -> str | None:
        return classify_motion(self.centres, self.whole(), short_side, fps) or classify_motion(
            self.centres, self.areas > 0, short_side, fps
        )


def _crop(mask: Masks) -> Masks:
    """The mask's bounding box with a margin of half its size, as far as the frame goes, [h, w]."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    margin = max(rows[-1] - rows[0], columns[-1] - columns[0]) // 2 + 1
    return mask[
        max(rows[0] - margin, 0) : rows[-1] + margin + 1,
        max(columns[0] - margin, 0) : columns[-1] + margin + 1,
    ]


def _centroids(masks: Masks, cover: NDArray[np.float32]) -> NDArray[np.float64]:
    """Centre (x, y) of each mask in pixels, NaN without one, [F, 2].

    Weighs the soft edge by its cover: the centre of a square's binary mask would move in whole pixels.
    """
    grown = masks.copy()
    grown[:, 1:] |= masks[:, :-1]
    grown[:, :-1] |= masks[:, 1:]
    grown[:, :, 1:] |= masks[:, :, :-1]
    grown[:, :, :-1] |= masks[:, :, 1:]
    frame, row, column = np.nonzero(grown)
    weight = np.clip(cover[grown], 0, 1).astype(np.float64)
    total = np.bincount(frame, weights=weight, minlength=len(masks)).astype(np.float64)
    total[total == 0] = np.nan
    moments = [
        np.bincount(frame, weights=weight * (axis + 0.5), minlength=len(masks)) for axis in (column, row)
    ]
    return np.stack(moments, axis=1) / total[:, None]
