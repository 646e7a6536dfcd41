"""What a pass over several unfinished chunks attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from genstream.cache.kv_cache import KVCache
from genstream.cache.layout import CacheLayout
from genstream.kernels.rope import Phases, phases, rotate


@dataclass(eq=False)
class JointContext:
    """Sinks, latest finished frames and a pass's own keys side by side, without a trace in the cache.

    The keys of an unfinished chunk are of no use after its layer, so all layers share one buffer: it costs
    the memory of a single layer. The few frames of the past that the pass sees are copied there from the
    cache; the sinks' keys are rotated from their masters on the way.

    Attributes:
        past: the stream's cache; only read.
        layout: of the shared buffer; its ring holds the latest finished frames and those of the pass.
        keys: `[B, capacity tokens, N, D]`.
        values: `[B, capacity tokens, N, D]`.
    """

    past: KVCache
    layout: CacheLayout
    keys: Tensor
    values: Tensor
    sink_frames: int = 0
    sinks_at: Phases | None = None
    copied: tuple[tuple[slice, slice], ...] = ()
    own: tuple[tuple[slice, slice], ...] = ()
    visible_tokens: int = 0

    @classmethod
    def allocate(cls, past: KVCache, layout: CacheLayout) -> JointContext:
        """A context whose buffer has the device and dtype of the cache."""
        shape, like = past.shape, past.keys[0]
        size = (shape.batch, layout.capacity_frames * shape.tokens_per_frame, shape.heads, shape.head_width)
        return cls(past, layout, like.new_zeros(size), like.new_zeros(size))

    def begin(self, start: int, frames: int) -> None:
        """Prepare a pass over `frames` frames from absolute frame `start`: which keys go where."""
        first = start - self.past.origin
        self.layout.check_pass(first, frames)
        tokens = self.past.shape.tokens
        self.own = tuple(
            (tokens(run.slot, run.length), tokens(run.offset, run.length))
            for run in self.layout.segments(first, frames)
        )
        kept = self.layout.kept(first, first + frames)
        self.copied = tuple(
            (tokens(run.slot + part.offset, part.length), tokens(part.slot, part.length))
            for run in self.layout.segments(kept.start, len(kept))
            for part in self.past.layout.segments(kept.start + run.offset, run.length)
        )
        self.visible_tokens = tokens(0, self.layout.visible_frames(first + frames)).stop
        self._place_sinks(first, frames)

    def write(self, layer: int, keys: Tensor, rotated_keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put one layer's keys and values side by side; return all that the pass attends to."""
        past_keys, past_values = self.past.keys[layer], self.past.values[layer]
        if self.sinks_at is not None:
            sinks = self.past.shape.tokens(0, self.sink_frames)
            self.keys[:, sinks] = rotate(self.past.sinks[layer][:, sinks], self.sinks_at)
            self.values[:, sinks] = past_values[:, sinks]
        for here, there in self.copied:
            self.keys[:, here] = past_keys[:, there]
            self.values[:, here] = past_values[:, there]
        for here, tokens in self.own:
            self.keys[:, here] = rotated_keys[:, tokens]
            self.values[:, here] = values[:, tokens]
        return self.keys[:, : self.visible_tokens], self.values[:, : self.visible_tokens]

    def _place_sinks(self, first: int, frames: int) -> None:
        """Where the finished sinks stand for a pass."""
        shape = self.past.shape
        self.sink_frames = min(first, self.layout.sink_frames)
        positions = self.layout.sink_positions(first + frames)[: self.sink_frames]
        self.sinks_at = None
        if positions:
            at = [self.past.origin + position for position in positions]
            self.sinks_at = phases(at, shape.rows, shape.columns, shape.head_width, self.keys.device)
