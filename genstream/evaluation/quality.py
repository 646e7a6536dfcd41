"""How close frames are to their reference."""

from math import inf, log10

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

_PEAK = 255
_WINDOW_PX = 11
_WINDOW_SIGMA_PX = 1.5
_LUMINANCE_FLOOR = (0.01 * _PEAK) ** 2
_CONTRAST_FLOOR = (0.03 * _PEAK) ** 2


def psnr(reference: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of all frames together in dB, infinite if equal; both [F, H, W, 3]."""
    _check_shapes(reference, other)
    error = np.mean((reference.astype(np.float32) - other.astype(np.float32)) ** 2, dtype=np.float64)
    return 10 * log10(_PEAK**2 / error) if error else inf


def ssim(reference: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Mean structural similarity of frames [F, H, W, 3], 1 if equal.

    A Gaussian window of 11x11 pixels with sigma 1.5, moved over all places inside of a frame, each colour for
    itself (Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, 2004).
    """
    _check_shapes(reference, other)
    if min(reference.shape[1:3]) < _WINDOW_PX:
        raise ValueError(f"frames must be at least {_WINDOW_PX} pixels high and wide, got {reference.shape}")
    pairs = zip(reference, other, strict=True)
    return float(np.mean([_frame_ssim(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs]))


def flicker(reference: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """How much the error changes from frame to frame: mean of |e_t - e_(t-1)|, of 255; both [F, H, W, 3].

    An error that stays where it is, such as a wrong colour, does not flicker: 0.
    """
    _check_shapes(reference, other)
    if len(reference) < 2:
        raise ValueError(f"flicker needs at least 2 frames, got {len(reference)}")
    errors = other.astype(np.int16) - reference
    return float(np.mean([np.abs(errors[i] - errors[i - 1]).mean() for i in range(1, len(errors))]))


def _frame_ssim(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Structural similarity of two frames [H, W, 3]."""
    mean_a, mean_b = _blurred(a), _blurred(b)
    variance_a, variance_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _LUMINANCE_FLOOR) / (mean_a**2 + mean_b**2 + _LUMINANCE_FLOOR)
    structure = (2 * covariance + _CONTRAST_FLOOR) / (variance_a + variance_b + _CONTRAST_FLOOR)
    return float((luminance * structure).mean())


def _blurred(frame: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted means of all windows [H - 10, W - 10, 3] of a frame [H, W, 3]."""
    offsets = np.arange(_WINDOW_PX) - _WINDOW_PX // 2
    weights = np.exp(-(offsets**2) / (2 * _WINDOW_SIGMA_PX**2))
    weights /= weights.sum()
    rows = sliding_window_view(frame, _WINDOW_PX, axis=0) @ weights
    blurred: NDArray[np.float64] = sliding_window_view(rows, _WINDOW_PX, axis=1) @ weights
    return blurred


def _check_shapes(reference: NDArray[np.uint8], other: NDArray[np.uint8]) -> None:
    if reference.shape != other.shape:
        raise ValueError(f"other must have the shape {reference.shape} of reference, got {other.shape}")
