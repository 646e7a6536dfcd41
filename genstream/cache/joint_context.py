"""What a pass over several unfinished chunks attends to."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from genstream.cache.kv_cache import CachePart, KVCache
from genstream.cache.layout import CacheLayout
from genstream.kernels.rope import rotate


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
        parts: the current pass, which is a single part.
    """

    past: KVCache
    layout: CacheLayout
    keys: Tensor
    values: Tensor
    parts: list[CachePart] = field(default_factory=list)
    sinks: slice = field(default_factory=lambda: slice(0))
    copied: tuple[tuple[slice, slice], ...] = ()

    @classmethod
    def allocate(cls, past: KVCache, layout: CacheLayout) -> JointContext:
        """A context whose buffer has the device and dtype of the cache."""
        shape, like = past.shape, past.keys[0]
        size = (shape.batch, layout.capacity_frames * shape.tokens_per_frame, shape.heads, shape.head_width)
        return cls(past, layout, like.new_empty(size), like.new_empty(size))

    def begin(self, start: int, frames: int, *, finished_frames: int = 0, past_weight: float = 1.0) -> None:
        """Prepare a pass over `frames` frames from absolute frame `start`: which keys go where."""
        if finished_frames or past_weight != 1:
            raise ValueError(
                "a joint pass has neither finished_frames nor a past_weight other than 1, "
                f"got {finished_frames} and {past_weight}"
            )
        first, tokens = start - self.past.origin, self.past.shape.tokens
        self.layout.check_pass(first, frames)
        sinks, kept = min(first, self.layout.sink_frames), self.layout.kept(first, first + frames)
        self.sinks = tokens(0, sinks)
        self.copied = tuple(
            (tokens(sinks + run.offset, run.length), tokens(run.slot, run.length))
            for run in self.past.layout.segments(kept.start, len(kept))
        )
        own = tokens(sinks + len(kept), frames)
        place = self.past.origin + self.layout.sink_positions(first + frames).start
        part = CachePart(
            tokens=tokens(0, frames),
            runs=[(own, tokens(0, frames))],
            sink_tokens=0,
            visible=slice(own.stop),
            sinks_place=place,
            sinks_at=self.past.shape.phases(place, sinks, self.keys.device) if sinks else None,
            weights=None,
        )
        self.parts = [part]

    def write(
        self, part: CachePart, layer: int, keys: Tensor, rotated_keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put one layer's keys and values side by side; return all that the pass attends to."""
        past_keys, past_values = self.past.keys[layer], self.past.values[layer]
        if part.sinks_at is not None:
            self.keys[:, self.sinks] = rotate(self.past.sinks[layer][:, self.sinks], part.sinks_at)
            self.values[:, self.sinks] = past_values[:, self.sinks]
        for here, there in self.copied:
            self.keys[:, here] = past_keys[:, there]
            self.values[:, here] = past_values[:, there]
        for slots, tokens in part.runs:
            self.keys[:, slots] = rotated_keys[:, tokens]
            self.values[:, slots] = values[:, tokens]
        return self.keys[:, part.visible], self.values[:, part.visible]
