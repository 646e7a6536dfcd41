"""A picture of many frames: rows of them, each under its caption."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_GAP_PX = 4
_CAPTION_PX = 18
_FONT_PX = 12


def contact_sheet(rows: Iterable[tuple[str, NDArray[np.uint8]]]) -> Image.Image:
    """Captions with their frames `[N, H, W, 3]` below, side by side; every row as long as it needs."""
    strips = [(caption, _strip(frames)) for caption, frames in rows]
    width = max(strip.shape[1] for _, strip in strips)
    height = sum(strip.shape[0] + _CAPTION_PX + _GAP_PX for _, strip in strips) - _GAP_PX
    sheet = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for caption, strip in strips:
        draw.text((2, top + 2), caption, fill="black", font_size=_FONT_PX)
        sheet.paste(Image.fromarray(strip), (0, top + _CAPTION_PX))
        top += _CAPTION_PX + strip.shape[0] + _GAP_PX
    return sheet


def evenly(frames: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """`count` frames from the first to the last, or all where there are fewer."""
    chosen: NDArray[np.uint8] = frames[
        np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    ]
    return chosen


def _strip(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    spaced = np.pad(frames, ((0, 0), (0, 0), (0, _GAP_PX), (0, 0)), constant_values=255)
    strip: NDArray[np.uint8] = np.concatenate(list(spaced), axis=1)[:, :-_GAP_PX]
    return strip
