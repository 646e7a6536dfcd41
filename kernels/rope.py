"""Rotary position embedding in time, height and width."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_THETA = 10_000.0


@dataclass(frozen=True)
class Phases:
    """Cosine and sine of every rotary angle, float32 `[L, 1, D / 2]`."""

    cos: Tensor
    sin: Tensor


def axis_widths(head_width: int) -> tuple[int, int, int]:
    """Channels of a head that encode time, height and width (Wan 2.1: 44, 42, 42 of 128)."""
    side = 2 * (head_width // 6)
    return head_width - 2 * side, side, side


def phases(frames: Sequence[int], height: int, width: int, head_width: int, device: torch.device) -> Phases:
    """Rotary angles of the tokens of `frames`, row-major inside a frame.

    The angles are products of integers and float64 frequencies, so frame 1,000,000 is as exact as frame 0.

    Args:
        frames: temporal position of each latent frame; any integers.
        height: token rows of a frame.
        width: token columns of a frame.
        head_width: channels of one attention head, even.
        device: where the result is wanted.
    """
    time_width, row_width, column_width = axis_widths(head_width)
    time = _angles(torch.tensor(frames, dtype=torch.float64), time_width)
    rows = _angles(torch.arange(height, dtype=torch.float64), row_width)
    columns = _angles(torch.arange(width, dtype=torch.float64), column_width)
    grid = (len(frames), height, width, -1)
    angles = torch.cat(
        [
            time[:, None, None].expand(grid),
            rows[None, :, None].expand(grid),
            columns[None, None].expand(grid),
        ],
        dim=-1,
    )
    angles = angles.flatten(0, 2).unsqueeze(1)  # [L, 1, D / 2]
    return Phases(angles.cos().float().to(device), angles.sin().float().to(device))


def rotate(x: Tensor, at: Phases) -> Tensor:
    """Rotate the channel pairs (0, 1), (2, 3), ... of `x` `[B, L, N, D]` by the angles of its tokens."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * at.cos - odd * at.sin, even * at.sin + odd * at.cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def _angles(positions: Tensor, width: int) -> Tensor:
    frequencies = _THETA ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return positions[:, None] * frequencies
