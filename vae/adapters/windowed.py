"""Windows with context, look-ahead and blending, for networks that see the future.

Each piece of a stream is worked off together with some latent frames before and behind it. What comes out for
those behind it is blended linearly into the next piece. The result differs from that of the whole clip; the
probe says by how much.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genstream.vae.adapters.memory import Memory

_CONTEXT = "context"
_TAIL = "tail"


@dataclass(frozen=True, kw_only=True)
class Window:
    """What is worked off together, in latent frames.

    Attributes:
        context: before a piece, seen again; at least 1, because a window's first latent frame is one frame.
        piece: of a piece; a stream's first has one more.
        lookahead: behind a piece, blended into the next one.
    """

    context: int
    piece: int
    lookahead: int

    def __post_init__(self) -> None:
        for name, value, least in (
            ("context", self.context, 1),
            ("piece", self.piece, 1),
            ("lookahead", self.lookahead, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    @property
    def first(self) -> int:
        """Latent frames of a stream's first piece."""
        return self.piece + 1

    @property
    def memory(self) -> int:
        """Latent frames back that a frame depends on, through the window before its own."""
        return self.context + self.piece

    def ready(self, count: int, steps: int) -> list[int]:
        """Latent frames of each piece that may run when `count` wait after `steps`."""
        pieces: list[int] = []
        size = self.piece if steps else self.first
        while count >= size + self.lookahead:
            pieces.append(size)
            count, size = count - size, self.piece
        return pieces

    def rest(self, count: int, steps: int) -> list[int]:
        """Latent frames of each piece for the `count` left at a stream's end."""
        pieces: list[int] = []
        size = self.piece if steps else self.first
        while count > 0:
            pieces.append(min(size, count))
            count, size = count - size, self.piece
        return pieces


def run_window(
    x: Tensor,
    memory: Memory,
    network: Callable[[Tensor], Tensor],
    window: Window,
    ratio_in: int,
    ratio_out: int,
) -> Tensor:
    """Outputs of the current piece.

    Args:
        x: [B, C, F, h, w], the piece and what is known of the look-ahead.
        memory: the stream's.
        network: maps 1 + ratio_in n frames to 1 + ratio_out n frames.
        window: what is worked off together.
        ratio_in: input frames per latent frame.
        ratio_out: output frames per latent frame.

    Returns:
        [B, C, F, h, w], with 1 + ratio_out n frames for a stream's first piece and ratio_out n for others.
    """
    short = 0 if memory.started else 1
    seen = x[:, :, : ratio_in * (memory.piece - short) + short]
    context = memory.recall(_CONTEXT)
    if context is None:
        outputs = network(x)
    else:
        known = 1 + (context.shape[2] - 1) // ratio_in * ratio_out
        outputs = network(torch.cat([context, x], dim=2))[:, :, known:]
        seen = torch.cat([context, seen], dim=2)
    outputs = _blended(memory.recall(_TAIL), outputs)
    piece_out = ratio_out * (memory.piece - short) + short
    memory.remember(_CONTEXT, seen[:, :, -(1 + ratio_in * (window.context - 1)) :])
    memory.remember(_TAIL, outputs[:, :, piece_out:])
    return outputs[:, :, :piece_out]


def _blended(tail: Tensor | None, outputs: Tensor) -> Tensor:
    """Outputs that fade in over what the window before gave for the same frames."""
    frames = 0 if tail is None else min(tail.shape[2], outputs.shape[2])
    if tail is None or frames == 0:
        return outputs
    weight = torch.arange(frames, dtype=outputs.dtype, device=outputs.device).view(-1, 1, 1) / frames
    mixed = tail[:, :, :frames] * (1 - weight) + outputs[:, :, :frames] * weight
    return torch.cat([mixed, outputs[:, :, frames:]], dim=2)
