"""How close frames are to their reference."""

from math import inf, log10

import numpy as np
from numpy.typing import NDArray


def psnr(reference: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of all frames together in dB, infinite if equal; both [F, H, W, 3]."""
    if reference.shape != other.shape:
        raise ValueError(f"other must have the shape {reference.shape} of reference, got {other.shape}")
    error = np.mean((reference.astype(np.float32) - other.astype(np.float32)) ** 2, dtype=np.float64)
    return 10 * log10(255**2 / error) if error else inf
