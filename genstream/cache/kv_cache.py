"""Keys and values of the past of one stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from genstream.cache.layout import CacheLayout
from genstream.kernels.rope import phases, rotate


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Sizes of the tensors of a cache.

    Attributes:
        layers: transformer blocks.
        batch: streams that advance together.
        heads: attention heads.
        head_width: channels of a head.
        rows: token rows of a latent frame.
        columns: token columns of a latent frame.
    """

    layers: int
    batch: int
    heads: int
    head_width: int
    rows: int
    columns: int

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        return self.rows * self.columns

    def tokens(self, frame: int, frames: int) -> slice:
        """Tokens of `frames` frames from the one at `frame`."""
        return slice(frame * self.tokens_per_frame, (frame + frames) * self.tokens_per_frame)


class AttentionContext(Protocol):
    """What a pass through the transformer attends to besides the prompt."""

    def begin(self, start: int, frames: int) -> None:
        """Prepare a pass over `frames` frames from absolute frame `start`."""

    def write(self, layer: int, keys: Tensor, rotated_keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take the pass's keys and values of one layer; return all that it attends to."""


@dataclass(eq=False)
class KVCache:
    """Preallocated keys and values, addressed by frame slot.

    Keys are rotated when they are written. Only the sinks keep an un-rotated master, from which they are
    rotated again when the window moves on. The object is opaque to device hooks: it is no container and
    has no method named `to`.

    Attributes:
        layout: which frames are kept.
        shape: sizes of the tensors.
        keys: per layer `[B, capacity tokens, N, D]`.
        values: per layer `[B, capacity tokens, N, D]`.
        sinks: un-rotated sink keys, per layer `[B, sink tokens, N, D]`.
        origin: absolute index of the frame at slot 0.
        placed: position of the first sink that its rotated keys stand for; None when they must be rotated.
    """

    layout: CacheLayout
    shape: CacheShape
    keys: list[Tensor]
    values: list[Tensor]
    sinks: list[Tensor]
    origin: int = 0
    placed: int | None = None
    current: list[tuple[slice, slice]] = field(default_factory=list)
    current_sink_tokens: int = 0
    visible_tokens: slice = field(default_factory=lambda: slice(0))

    @classmethod
    def allocate(cls, layout: CacheLayout, shape: CacheShape, like: Tensor) -> KVCache:
        """An empty cache with the device and dtype of `like`."""
        tokens = layout.capacity_frames * shape.tokens_per_frame
        sink_tokens = layout.sink_frames * shape.tokens_per_frame

        def empty(length: int) -> list[Tensor]:
            size = (shape.batch, length, shape.heads, shape.head_width)
            return [like.new_zeros(size) for _ in range(shape.layers)]

        return cls(layout, shape, keys=empty(tokens), values=empty(tokens), sinks=empty(sink_tokens))

    def begin(self, start: int, frames: int) -> None:
        """Prepare a pass over `frames` frames from absolute frame `start`: place sinks, choose slots."""
        first = start - self.origin
        self.layout.check_pass(first, frames)
        per_frame = self.shape.tokens_per_frame
        self.current = [
            (
                slice(run.slot * per_frame, (run.slot + run.length) * per_frame),
                slice(run.offset * per_frame, (run.offset + run.length) * per_frame),
            )
            for run in self.layout.segments(first, frames)
        ]
        sinks_here = max(0, min(self.layout.sink_frames, first + frames) - first)
        self.current_sink_tokens = sinks_here * per_frame
        hidden = self.layout.hidden_frames(first, first + frames)
        self.visible_tokens = self.shape.tokens(hidden, self.layout.visible_frames(first + frames) - hidden)
        self._place_sinks(first, frames)

    def write(self, layer: int, keys: Tensor, rotated_keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the current pass's keys and values of one layer; return all that it attends to."""
        for slots, tokens in self.current:
            self.keys[layer][:, slots] = rotated_keys[:, tokens]
            self.values[layer][:, slots] = values[:, tokens]
        if count := self.current_sink_tokens:
            place = self.current[0][0].start
            self.sinks[layer][:, place : place + count] = keys[:, :count]
        return self.keys[layer][:, self.visible_tokens], self.values[layer][:, self.visible_tokens]

    def clone(self) -> KVCache:
        """An independent copy."""
        copy = KVCache(
            self.layout,
            self.shape,
            keys=[tensor.clone() for tensor in self.keys],
            values=[tensor.clone() for tensor in self.values],
            sinks=[tensor.clone() for tensor in self.sinks],
        )
        copy.origin, copy.placed = self.origin, self.placed
        return copy

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a snapshot."""
        return {
            f"{name}.{layer}": tensor
            for name in ("keys", "values", "sinks")
            for layer, tensor in enumerate(getattr(self, name))
            if tensor.numel()
        }

    def load(self, tensors: dict[str, Tensor], origin: int) -> None:
        """Take over the tensors of a snapshot of a cache of the same shape."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.origin, self.placed = origin, None

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def _place_sinks(self, first: int, frames: int) -> None:
        """Rotate the sinks to where they stand for a pass, unless the pass itself writes them."""
        positions = self.layout.sink_positions(first + frames)
        place = self.origin + positions.start
        if first < self.layout.sink_frames or place == self.placed:
            self.placed = self.origin if first < self.layout.sink_frames else place
            return
        at = phases(
            [self.origin + position for position in positions],
            self.shape.rows,
            self.shape.columns,
            self.shape.head_width,
            self.keys[0].device,
        )
        tokens = self.layout.sink_frames * self.shape.tokens_per_frame
        for layer, masters in enumerate(self.sinks):
            if tokens:
                self.keys[layer][:, :tokens] = rotate(masters, at)
        self.placed = place


@dataclass(frozen=True, eq=False)
class TextCache:
    """Cross-attention keys and values of a prompt, per layer `[B, tokens, N, D]`; likewise of an image."""

    text: list[tuple[Tensor, Tensor]]
    image: list[tuple[Tensor, Tensor]] | None = None
