"""Which shape a silhouette is."""

from math import pi, sin, sqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from genstream.data.rendering import STAR_INNER, signed_distance
from genstream.data.scene import SHAPE_EXTENT

# Area of each shape of radius 1.
_UNIT_AREA: Final = {
    "circle": pi,
    "square": 4 * SHAPE_EXTENT["square"] ** 2,
    "triangle": 3 * sqrt(3) / 4 * SHAPE_EXTENT["triangle"] ** 2,
    "star": 5 * sin(pi / 5) * STAR_INNER * SHAPE_EXTENT["star"] ** 2,
}


def overlaps(mask: NDArray[np.bool_]) -> dict[str, float]:
    """Intersection over union of a silhouette with each shape of the same area and centre.

    What the edge of the picture cuts off is left out of the comparison only in so far as it lies outside.

    Args:
        mask: One silhouette, [H, W].
    """
    rows, columns = np.nonzero(mask)
    centre_x, centre_y = columns.mean(), rows.mean()
    grid_y, grid_x = np.mgrid[: mask.shape[0], : mask.shape[1]].astype(np.float32)
    result = {}
    for shape, unit_area in _UNIT_AREA.items():
        radius = sqrt(len(rows) / unit_area)
        template = signed_distance(shape, grid_x - centre_x, grid_y - centre_y, radius) < 0
        result[shape] = float((template & mask).sum() / max((template | mask).sum(), 1))
    return result


def classify_shape(masks: list[NDArray[np.bool_]]) -> str | None:
    """The shape that overlaps best on average over some silhouettes of one object, None without any."""
    if not masks:
        return None
    scores = [overlaps(mask) for mask in masks]
    return max(_UNIT_AREA, key=lambda shape: sum(score[shape] for score in scores))
