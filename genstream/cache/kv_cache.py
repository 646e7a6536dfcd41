"""Keys and values of the past of one stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from genstream.cache.layout import CacheLayout
from genstream.kernels.rope import Phases, phases, rotate


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

    def phases(self, first: int, frames: int, device: torch.device) -> Phases:
        """Rotary angles of `frames` frames from position `first`."""
        return phases(range(first, first + frames), self.rows, self.columns, self.head_width, device)


@dataclass(frozen=True, eq=False)
class CachePart:
    """Frames of a pass that see each other and the past: all, or a finished chunk and then the next one.

    Attributes:
        tokens: where they stand in the pass.
        runs: slots of the buffer, and the tokens of this part, counted from its first, that go there.
        sink_tokens: leading tokens of this part that are sinks.
        visible: tokens of the buffer that this part attends to.
        sinks_place: position of the first sink.
        sinks_at: where the sinks must be rotated to before it attends; None where they already stand there.
        weights: logarithm of each visible token's weight, `[1, visible tokens]`; None for equal ones.
    """

    tokens: slice
    runs: list[tuple[slice, slice]]
    sink_tokens: int
    visible: slice
    sinks_place: int
    sinks_at: Phases | None
    weights: Tensor | None


class AttentionContext(Protocol):
    """What a pass through the transformer attends to besides the prompt."""

    parts: list[CachePart]

    def begin(self, start: int, frames: int, *, finished_frames: int = 0, past_weight: float = 1.0) -> None:
        """Prepare a pass over `frames` frames from absolute frame `start`: its parts."""

    def write(
        self, part: CachePart, layer: int, keys: Tensor, rotated_keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take the keys and values of one layer of a part; return all that it attends to."""


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
        parts: what the current pass writes and sees.
        overwritten: what a pass over two chunks has overwritten, to put it back should the step fail.
    """

    layout: CacheLayout
    shape: CacheShape
    keys: list[Tensor]
    values: list[Tensor]
    sinks: list[Tensor]
    origin: int = 0
    placed: int | None = None
    parts: list[CachePart] = field(default_factory=list)
    overwritten: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def allocate(cls, layout: CacheLayout, shape: CacheShape, like: Tensor) -> KVCache:
        """An empty cache with the device and dtype of `like`."""
        tokens = layout.capacity_frames * shape.tokens_per_frame
        sink_tokens = layout.sink_frames * shape.tokens_per_frame

        def empty(length: int) -> list[Tensor]:
            size = (shape.batch, length, shape.heads, shape.head_width)
            return [like.new_zeros(size) for _ in range(shape.layers)]

        return cls(layout, shape, keys=empty(tokens), values=empty(tokens), sinks=empty(sink_tokens))

    def begin(self, start: int, frames: int, *, finished_frames: int = 0, past_weight: float = 1.0) -> None:
        """Prepare a pass over `frames` frames from absolute frame `start`: choose slots, place sinks.

        Args:
            start: absolute index of the first frame.
            frames: how many.
            finished_frames: the first of them that are a chunk of their own, which does not see the others.
            past_weight: factor on the attention that the others pay to past frames but the first.
        """
        placed, self.placed, self.parts = self.placed, None, []
        for offset, count, weight in (
            (0, finished_frames, 1.0),
            (finished_frames, frames - finished_frames, past_weight),
        ):
            if count:
                tokens = self.shape.tokens(offset, count)
                part = self._part(start + offset - self.origin, count, tokens, placed, weight)
                self.parts.append(part)
                placed = part.sinks_place
        if finished_frames:
            self._keep_overwritten(self.parts[-1])

    def write(
        self, part: CachePart, layer: int, keys: Tensor, rotated_keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values of one layer of a part; return all that it attends to."""
        keys, rotated_keys, values = (x[:, part.tokens] for x in (keys, rotated_keys, values))
        if part.sinks_at is not None:
            sink_tokens = self.sinks[layer].shape[1]
            self.keys[layer][:, :sink_tokens] = rotate(self.sinks[layer], part.sinks_at)
        for slots, tokens in part.runs:
            self.keys[layer][:, slots] = rotated_keys[:, tokens]
            self.values[layer][:, slots] = values[:, tokens]
        if count := part.sink_tokens:
            place = part.runs[0][0].start
            self.sinks[layer][:, place : place + count] = keys[:, :count]
        if layer + 1 == self.shape.layers:
            self.placed = part.sinks_place
        return self.keys[layer][:, part.visible], self.values[layer][:, part.visible]

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """A step that fails in it leaves all that a later step can see as it was."""
        try:
            yield
            self.overwritten = []
        finally:
            for slots, before in self.overwritten:
                slots.copy_(before)
            self.overwritten = []

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
            if tensors[name].shape != tensor.shape:
                found = list(tensors[name].shape)
                raise ValueError(f"{name} must have the cache's shape {list(tensor.shape)}, got {found}")
            tensor.copy_(tensors[name])
        self.origin, self.placed = origin, None

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def _part(
        self, first: int, frames: int, tokens: slice, placed: int | None, past_weight: float
    ) -> CachePart:
        """A part from frame `first` after the origin, when the sinks stand at `placed`."""
        self.layout.check_pass(first, frames)
        layout, shape, end = self.layout, self.shape, first + frames
        runs = [
            (shape.tokens(run.slot, run.length), shape.tokens(run.offset, run.length))
            for run in layout.segments(first, frames)
        ]
        writes_sinks = first < layout.sink_frames
        place = self.origin + (0 if writes_sinks else layout.sink_positions(end).start)
        hidden = layout.hidden_frames(first, end)
        visible = shape.tokens(hidden, layout.visible_frames(end) - hidden)
        return CachePart(
            tokens=tokens,
            runs=runs,
            sink_tokens=max(0, min(layout.sink_frames, end) - first) * shape.tokens_per_frame,
            visible=visible,
            sinks_place=place,
            sinks_at=None if writes_sinks or place == placed else self._sink_phases(place),
            weights=None if past_weight == 1 else self._weights(runs, visible.stop, end, past_weight),
        )

    def _sink_phases(self, place: int) -> Phases | None:
        count = self.layout.sink_frames
        return self.shape.phases(place, count, self.keys[0].device) if count else None

    def _weights(
        self, runs: list[tuple[slice, slice]], visible_tokens: int, end: int, past_weight: float
    ) -> Tensor:
        """Logarithms of the weights: 0 for the part itself and the first frame, where that is still kept."""
        weights = self.keys[0].new_full((1, visible_tokens), math.log(past_weight))
        for slots, _ in runs:
            weights[:, slots] = 0
        if self.layout.sink_frames or end <= self.layout.capacity_frames:
            weights[:, : self.shape.tokens_per_frame] = 0
        return weights

    def _keep_overwritten(self, part: CachePart) -> None:
        # A second try of the pass lets the finished chunk see the frames that this part overwrites.
        for buffer in (*self.keys, *self.values):
            self.overwritten += [(buffer[:, slots], buffer[:, slots].clone()) for slots, _ in part.runs]


@dataclass(frozen=True, eq=False)
class TextCache:
    """What a stream is conditioned on, as the transformer takes it.

    Attributes:
        text: cross-attention keys and values of a prompt, per layer `[B, tokens, N, D]`.
        image: likewise of an image.
        channels: `[B, in_channels - out_channels, T, h, w]` behind the latents of latent frames 0 to T - 1;
            the last of them stands for all that follow.
    """

    text: list[tuple[Tensor, Tensor]]
    image: list[tuple[Tensor, Tensor]] | None = None
    channels: Tensor | None = None
