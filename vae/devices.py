"""Devices and precisions, as callers name them."""

import torch


def check_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: this machine has none.
    """
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device must be one of this machine, got {str(device)!r}: {error}") from error
    return found


def check_dtype(dtype: object) -> None:
    """Weights are floating-point numbers."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
