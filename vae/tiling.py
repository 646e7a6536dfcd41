"""Tiles in space for clips that are too large for one pass, streamed in time.

All tiles take a step before any of them takes the next one, each with its own memory, so a stream of any
length needs room for one chunk. How a stream is cut in time does not change its tiles: chunked and whole
results stay as equal as those of the VAE inside. Seen from the untiled clip they differ near the seams, where
a tile does not see its neighbour; overlaps are blended linearly.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from genstream.shapes import check_count, check_whole
from genstream.vae.checks import (
    check_clip,
    check_frames,
    check_is_state,
    check_is_tensor,
    check_owner,
    check_start,
)
from genstream.vae.chunks import decoding_state
from genstream.vae.protocol import Direction, StreamingVAE, VAESpec, VAEState
from genstream.vae.wrapping import streams

_SEPARATOR = "/"
_TILING_OF = " of "


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a clip is cut in space.

    Attributes:
        height_px: of a tile.
        width_px: of a tile.
        overlap_px: of neighbouring tiles; the last ones of a row or column may overlap more.
    """

    height_px: int
    width_px: int
    overlap_px: int

    def __post_init__(self) -> None:
        check_whole("overlap_px", self.overlap_px)
        if self.overlap_px < 0:
            raise ValueError(f"overlap_px must be at least 0, got {self.overlap_px}")
        for name, value in (("height_px", self.height_px), ("width_px", self.width_px)):
            check_count(name, value)
            if value <= self.overlap_px:
                raise ValueError(f"{name} must be larger than overlap_px {self.overlap_px}, got {value}")


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Where a tile lies, in multiples of some unit, and how much it counts at each place."""

    start: int
    weights: Tensor  # [length]


class TiledVAE:
    """Works off each tile of a clip on its own and blends them; satisfies `StreamingVAE`.

    Args:
        vae: any `StreamingVAE`.
        tiling: sizes in pixels, multiples of the VAE's spatial ratio.
    """

    def __init__(self, vae: StreamingVAE, tiling: Tiling) -> None:
        if not streams(vae):
            raise ValueError(
                f"vae must stream, got a {type(vae).__name__}: give one of diffusers to stream_vae first"
            )
        ratio = vae.spec.spatial_ratio
        for name in ("height_px", "width_px", "overlap_px"):
            value = getattr(tiling, name)
            if value % ratio:
                raise ValueError(f"tiling.{name} must be a multiple of {ratio}, got {value}")
        self.vae = vae
        self.tiling = tiling

    @property
    def spec(self) -> VAESpec:
        """That of the VAE; its exactness compares streams with whole clips of the same tiles."""
        return self.vae.spec

    def init_state(self, direction: Direction, batch_size: int, height: int, width: int) -> VAEState:
        """State of a stream that has not started; size in pixels."""
        check_start(direction, batch_size, height, width, self.spec.spatial_ratio)
        state = VAEState(direction=direction, vae="", batch_size=batch_size, height=height, width=width)
        size = min(height, self.tiling.height_px), min(width, self.tiling.width_px)
        for name, _, _ in self._tiles(state, 1):
            inner = self.vae.init_state(direction, batch_size, *size)
            state.vae = self._describe(inner.vae)
            state.slots.update(_prefixed(name, inner.slots))
        return state

    def encode_chunk(self, frames: Tensor, state: VAEState) -> Tensor:
        """Latents [B, C, T, h, w] that become complete with `frames` [B, 3, F, H, W]; the rest waits."""
        self._check(state, "encode", "frames", frames)
        return self._run(state, lambda inner, part: self.vae.encode_chunk(part(frames), inner))

    def decode_chunk(self, latents: Tensor, state: VAEState) -> Tensor:
        """Frames [B, 3, F, H, W] in [-1, 1] that become complete with `latents` [B, C, T, h, w]."""
        self._check(state, "decode", "latents", latents)
        return self._run(state, lambda inner, part: self.vae.decode_chunk(part(latents), inner))

    def flush(self, state: VAEState) -> Tensor:
        """What still waits in `state`."""
        check_is_state(state)
        self._check_owner(state, state.direction)
        rest = self._run(state, lambda inner, part: self.vae.flush(inner))
        state.ended = True
        return rest

    def encode(self, frames: Tensor) -> Tensor:
        """Latents of a whole clip [B, 3, first_frames + r (T - 1), H, W]; any F where the VAE takes it."""
        if getattr(self.vae, "is_aligned", True):
            check_frames(frames, self.spec)
        else:
            check_clip("frames", frames)
        state = self.init_state("encode", frames.shape[0], frames.shape[3], frames.shape[4])
        return torch.cat([self.encode_chunk(frames, state), self.flush(state)], dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames of a whole clip [B, C, T, h, w]."""
        state = decoding_state(self, latents)
        return torch.cat([self.decode_chunk(latents, state), self.flush(state)], dim=2)

    def _run(self, state: VAEState, step: Callable[[VAEState, Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        """Let each tile take `step` with its state and its part of the input, and blend what comes out."""
        ratio = self.spec.spatial_ratio
        unit_in, unit_out = (1, ratio) if state.direction == "encode" else (ratio, 1)
        steps, outputs, slots = 0, [], dict[str, Tensor]()
        for name, row, column in self._tiles(state, unit_in):
            inner = self._state_of(name, state)
            outputs.append(step(inner, partial(_cut, row=row, column=column)))
            steps, slots = inner.steps - state.steps, slots | _prefixed(name, inner.slots)
        size = state.height // unit_out, state.width // unit_out
        result = outputs[0].new_zeros((*outputs[0].shape[:3], *size))
        for (_, row, column), output in zip(self._tiles(state, unit_out), outputs, strict=True):
            _add(result, output, row, column)
        state.advance(steps, slots)
        return result

    def _state_of(self, name: str, state: VAEState) -> VAEState:
        prefix = name + _SEPARATOR
        slots = {
            key.removeprefix(prefix): slot for key, slot in state.slots.items() if key.startswith(prefix)
        }
        height, width = min(state.height, self.tiling.height_px), min(state.width, self.tiling.width_px)
        return replace(state, vae=_inner_vae(state), height=height, width=width, slots=slots)

    def _tiles(self, state: VAEState, unit: int) -> Iterator[tuple[str, _Tile, _Tile]]:
        """Name, place along the height and place along the width of each tile, `unit` pixels per element."""
        overlap = self.tiling.overlap_px // unit
        rows = _places(state.height // unit, self.tiling.height_px // unit, overlap)
        columns = _places(state.width // unit, self.tiling.width_px // unit, overlap)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                yield f"{i}.{j}", row, column

    def _describe(self, inner: str) -> str:
        return f"{self.tiling}{_TILING_OF}{inner}"

    def _check_owner(self, state: VAEState, direction: Direction) -> None:
        """Only the tiling is checked here; the VAE does the same for the states of its tiles."""
        ratio = self.spec.spatial_ratio
        inner = _inner_vae(state) or self.vae.init_state("decode", 1, ratio, ratio).vae
        check_owner(state, direction, self._describe(inner))

    def _check(self, state: VAEState, direction: Direction, name: str, tensor: Tensor) -> None:
        self._check_owner(state, direction)
        check_is_tensor(name, tensor)
        unit = 1 if direction == "encode" else self.spec.spatial_ratio
        wanted = (state.batch_size, state.height // unit, state.width // unit)
        if tensor.ndim != 5 or (tensor.shape[0], *tensor.shape[3:]) != wanted:
            raise ValueError(
                f"{name} must have the batch size, height and width of their state {list(wanted)}, "
                f"got shape {list(tensor.shape)}"
            )


def _inner_vae(state: VAEState) -> str:
    return state.vae.partition(_TILING_OF)[2]


def _places(length: int, tile: int, overlap: int) -> list[_Tile]:
    """Tiles along one dimension, whose weights sum to 1 everywhere."""
    stride, tile = tile - overlap, min(tile, length)
    starts = [*range(0, length - tile, stride), length - tile]
    weights = [torch.ones(tile, dtype=torch.float64) for _ in starts]
    for index, (start, following) in enumerate(itertools.pairwise(starts)):
        shared = start + tile - following
        ramp = (torch.arange(shared, dtype=torch.float64) + 0.5) / max(1, shared)
        weights[index][tile - shared :] *= 1 - ramp
        weights[index + 1][:shared] *= ramp
    total = torch.zeros(length, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    return [
        _Tile(start=start, weights=weight / total[start : start + tile])
        for start, weight in zip(starts, weights, strict=True)
    ]


def _cut(video: Tensor, row: _Tile, column: _Tile) -> Tensor:
    """The tile's part of [B, C, F, H, W]."""
    return video.narrow(3, row.start, len(row.weights)).narrow(4, column.start, len(column.weights))


def _add(result: Tensor, output: Tensor, row: _Tile, column: _Tile) -> None:
    """Add a tile's output at its place, as much as it counts there."""
    weights = (row.weights[:, None] * column.weights).to(output)
    _cut(result, row, column).add_(output * weights)


def _prefixed(name: str, slots: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}{_SEPARATOR}{key}": slot for key, slot in slots.items()}
