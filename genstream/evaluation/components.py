"""Connected regions of binary masks."""

import numpy as np
from numpy.typing import NDArray


def label_regions(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number the 4-connected regions of each mask from 1 on, over all masks; 0 is outside, [F, H, W].

    Works on runs of pixels along rows, so that its cost grows with the outline and not with the area.
    """
    count, height, width = masks.shape
    padded = np.zeros((count * height, width + 2), dtype=np.int8)
    padded[:, 1:-1] = masks.reshape(count * height, width)
    edges = np.diff(padded, axis=1)
    row, start = np.nonzero(edges == 1)
    _, stop = np.nonzero(edges == -1)
    parent = np.arange(len(row))
    for above, below in _touching_runs(row, start, stop, height):
        _join(parent, above, below)
    while True:  # Point every run straight at its root.
        higher = parent[parent]
        if np.array_equal(higher, parent):
            break
        parent = higher
    numbers = np.unique(parent, return_inverse=True)[1] + 1
    labels = np.zeros(masks.shape, dtype=np.int64)
    # Runs come in the order in which pixels lie in memory.
    labels[masks] = np.repeat(numbers, stop - start)
    return labels


def _touching_runs(
    row: NDArray[np.int64], start: NDArray[np.int64], stop: NDArray[np.int64], height: int
) -> list[tuple[int, int]]:
    """Pairs of runs that overlap in adjacent rows of one mask."""
    pairs = []
    lookup = np.searchsorted(row, row - 1).tolist()
    rows, starts, stops = row.tolist(), start.tolist(), stop.tolist()
    for index, current in enumerate(rows):
        if current % height == 0:
            continue
        above = lookup[index]
        while rows[above] == current - 1 and starts[above] < stops[index]:
            if stops[above] > starts[index]:
                pairs.append((above, index))
            above += 1
    return pairs


def _join(parent: NDArray[np.int64], first: int, second: int) -> None:
    roots = []
    for item in (first, second):
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = int(parent[item])
        roots.append(item)
    parent[max(roots)] = min(roots)
