"""Antialiased shapes from signed distances, painted into frames."""

from math import ceil, cos, pi, sin, sqrt

import numpy as np
from numpy.typing import NDArray

from genstream.data.scene import SHAPE_EXTENT

Floats = NDArray[np.float32]
STAR_INNER = 0.45


def signed_distance(shape: str, x: Floats, y: Floats, radius: float) -> Floats:
    """Distance to the outline, negative inside, in the unit of x, y and radius; y points down.

    Exact along the edges, a lower bound beyond the corners, which is where antialiasing needs no more.
    """
    reach = np.float32(radius * SHAPE_EXTENT[shape])
    if shape == "circle":
        return np.sqrt(x * x + y * y) - reach
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - reach
    if shape == "triangle":
        # Three half-planes at the inradius, half of the circumradius.
        slanted = np.float32(sqrt(3) / 2) * np.abs(x) - np.float32(0.5) * y
        return np.maximum(slanted, y) - np.float32(0.5) * reach
    return _star_distance(x, y, reach)


def _star_distance(x: Floats, y: Floats, reach: np.float32) -> Floats:
    """Five-pointed star: mirrored into one half point, then the distance to its one edge."""
    c, s = np.float32(cos(pi / 5)), np.float32(sin(pi / 5))
    x, y = np.abs(x), np.negative(y)
    for sign in (np.float32(1), np.float32(-1)):
        beyond: Floats = 2 * np.maximum(sign * c * x - s * y, np.float32(0))
        x, y = x - sign * c * beyond, y + s * beyond
    x = np.abs(x)
    inner = (reach * STAR_INNER * s, reach * STAR_INNER * c)
    edge_x, edge_y = inner[0], inner[1] - reach
    length = np.sqrt(edge_x * edge_x + edge_y * edge_y)
    distance: Floats = ((y - reach) * edge_x - x * edge_y) / length
    return distance


def paint(
    frames: NDArray[np.uint8],
    shape: str,
    radius: float,
    centres: NDArray[np.float64],
    rgb: tuple[int, int, int],
) -> None:
    """Paint one shape into every frame, in place.

    Args:
        frames: [F, H, W, 3].
        shape: A shape of the vocabulary.
        radius: Pixels.
        centres: (x, y) in pixels per frame, [F, 2]; may lie outside of the frame.
        rgb: Colour.
    """
    reach = ceil(radius * SHAPE_EXTENT[shape]) + 1
    corner = np.floor(centres).astype(np.int64) - reach  # [F, 2]
    grid = np.arange(2 * reach + 1)
    offset = (corner[:, None, :] + grid[None, :, None] + 0.5 - centres[:, None, :]).astype(np.float32)
    distance = signed_distance(shape, offset[:, None, :, 0], offset[:, :, None, 1], radius)
    # 8-bit cover: integer blending is twice as fast as float.
    cover = (np.clip(np.float32(0.5) - distance, 0, 1) * 256).astype(np.int16)[..., None]  # [F, P, P, 1]
    colour = np.array(rgb, dtype=np.int32)
    height, width = frames.shape[1:3]
    for frame, (left, top), mask in zip(frames, corner.tolist(), cover, strict=True):
        rows = slice(max(top, 0), max(min(top + len(grid), height), 0))
        columns = slice(max(left, 0), max(min(left + len(grid), width), 0))
        patch = frame[rows, columns]
        if patch.size:
            part = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            patch += (((colour - patch) * part.astype(np.int32)) >> 8).astype(np.uint8)
