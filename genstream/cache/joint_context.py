"""What a pass over several unfinished chunks attends to."""

from __future__ import annotations

from dataclasses import dataclass, field

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
        layout: what a pass sees; its ring is the latest finished frames and those of the pass.
        keys: of one layer, `[B, capacity tokens, N, D]`.
        values: likewise.
    """

    past: KVCache
    layout: CacheLayout
    keys: Tensor
    values: Tensor
    sinks: slice = field(default_factory=lambda: slice(0))
    sinks_at: Phases | None = None
    copied: tuple[tuple[slice, slice], ...] = ()
    own: slice = field(default_factory=lambda: slice(0))

    @classmethod
    def allocate(cls, past: KVCache, layout: CacheLayout) -> JointContext:
        """A context whose buffer has the device and dtype of the cache."""
        shape, like = past.shape, past.keys[0]
        size = (shape.batch, layout.capacity_frames * shape.tokens_per_frame, shape.heads, shape.head_width)
        return cls(past, layout, like.new_empty(size), like.new_empty(size))

    def begin(self, start: int, frames: int) -> None:
        """Prepare a pass over `frames` frames from absolute frame `start`: which keys go where."""
        first, tokens = start - self.past.origin, self.past.shape.tokens
        self.layout.check_pass(first, frames)
        sinks, kept = min(first, self.layout.sink_frames), self.layout.kept(first, first + frames)
        self.sinks = tokens(0, sinks)
        self.copied = tuple(
            (tokens(sinks + run.offset, run.length), tokens(run.slot, run.length))
            for run in self.past.layout.segments(kept.start, len(kept))
        )
        self.own = tokens(sinks + len(kept), frames)
        positions = self.layout.sink_positions(first + frames)[:sinks]
        self.sinks_at = self._phases(positions) if sinks else None

    def write(self, layer: int, keys: Tensor, rotated_keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put one layer's keys and values side by side; return all that the pass attends to."""
        past_keys, past_values = self.past.keys[layer], self.past.values[layer]
        if self.sinks_at is not None:
            self.keys[:, self.sinks] = rotate(self.past.sinks[layer][:, self.sinks], self.sinks_at)
            self.values[:, self.sinks] = past_values[:, self.sinks]
        for here, there in self.copied:
            self.keys[:, here] = past_keys[:, there]
            self.values[:, here] = past_values[:, there]
        self.keys[:, self.own] = rotated_keys
        self.values[:, self.own] = values
        return self.keys[:, : self.own.stop], self.values[:, : self.own.stop]

    def _phases(self, positions: range) -> Phases:
        """Rotary angles of frames at these positions, counted from the cache's origin."""
        shape, origin = self.past.shape, self.past.origin
        at = range(origin + positions.start, origin + positions.stop)
        return phases(at, shape.rows, shape.columns, shape.head_width, self.keys.device)
