"""Rollouts with gradient: the student streams as it does for a viewer, and learns from its own past.

Self Forcing (arXiv 2506.08009): a chunk's denoising ends at a random step, whose prediction is the chunk and
the only part of it with gradient; the past is in the cache, without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from genstream.cache.kv_cache import CachePart, KVCache, TextCache
from genstream.kernels.rope import rotate
from genstream.streaming.engine import CacheEngine
from genstream.streaming.request import StreamRequest
from genstream.streaming.settings import ContextPolicy
from genstream.streaming.state import StreamState

CONTEXTS = (ContextPolicy.CLEAN, ContextPolicy.RECOMPUTE)
"""The last step of a rollout writes nothing that a context could be made of."""


Copy = tuple[Tensor, Tensor]
"""Keys and values of a past frame, `[B, tokens, N, D]`."""

Copies = dict[tuple[int, int, int | None], Copy]
"""By layer, frame and, for a sink, where it stands."""

_copies: WeakKeyDictionary[KVCache, Copies] = WeakKeyDictionary()


class GradientCache:
    """A stream's cache for one pass with gradient: the pass sees all it would write, but writes nothing.

    Later passes overwrite the cache in place, which a graph that has seen it would not survive, nor would
    gradient checkpointing, which makes the pass again when all is overwritten. So the pass sees copies of the
    past frames.

    Args:
        past: the stream's cache.
        copies: what passes before this one have copied, as long as that has not changed; is added to.
    """

    def __init__(self, past: KVCache, copies: Copies) -> None:
        self.past = past
        self.parts: list[CachePart] = []
        self._frames: dict[int, int] = {}  # past frames by their slot, counted from the cache's origin
        self._shared = copies
        self._seen: dict[tuple[int, int], dict[int, Copy]] = {}  # by part and layer, then by first token

    def begin(self, start: int, frames: int, *, finished_frames: int = 0, past_weight: float = 1.0) -> None:
        """Prepare a pass over `frames` frames from absolute frame `start`."""
        self.past.begin(start, frames, finished_frames=finished_frames, past_weight=past_weight)
        self.parts = list(self.past.parts)
        layout, first = self.past.layout, start - self.past.origin
        kept = [*range(min(first, layout.sink_frames)), *layout.kept(first, first + frames)]
        self._frames = {layout.slot(frame): frame for frame in kept}

    def write(
        self, part: CachePart, layer: int, keys: Tensor, rotated_keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All that the part attends to: copies of the past, and its own keys and values with gradient."""
        del keys
        own_keys, own_values = rotated_keys[:, part.tokens], values[:, part.tokens]
        pieces = dict(self._past(part, layer))
        pieces |= {slots.start: (own_keys[:, tokens], own_values[:, tokens]) for slots, tokens in part.runs}
        # In the order of the slots: sums in another one would round differently than without gradient.
        seen_keys, seen_values = zip(*(pieces[place] for place in sorted(pieces)), strict=True)
        return torch.cat(seen_keys, dim=1), torch.cat(seen_values, dim=1)

    def _past(self, part: CachePart, layer: int) -> dict[int, Copy]:
        """Copies of the visible past frames, by their first token in the buffer."""
        if (part_id := (id(part), layer)) not in self._seen:
            shape, sinks = self.past.shape, self.past.layout.sink_frames
            visible = {
                (layer, frame, part.sinks_place if frame < sinks else None): shape.tokens(slot, 1)
                for slot, frame in self._frames.items()
                if shape.tokens(slot, 1).start >= (part.visible.start or 0)
            }
            for gone in [key for key in self._shared if key[0] == layer and key not in visible]:
                del self._shared[gone]
            for key, tokens in visible.items():
                if key not in self._shared:
                    self._shared[key] = self._copy(part, layer, tokens)
            self._seen[part_id] = {tokens.start: self._shared[key] for key, tokens in visible.items()}
        return self._seen[part_id]

    def _copy(self, part: CachePart, layer: int, tokens: slice) -> Copy:
        past, keys = self.past, self.past.keys[layer]
        sinks = past.sinks[layer]
        if part.sinks_at is not None and tokens.start < sinks.shape[1]:
            keys = rotate(sinks, part.sinks_at)
        return keys[:, tokens].detach().clone(), past.values[layer][:, tokens].detach().clone()


@dataclass(frozen=True)
class RolloutEngine(CacheEngine):
    """A cache engine whose chunks carry gradient from their last denoising step on.

    `step` is that of every stream; its latents have gradient from latent frame `gradient_from` on.

    Attributes:
        gradient_from: first latent frame with gradient.
    """

    gradient_from: int = 0

    def text_cache(self, prompt_embeds: Tensor, request: StreamRequest) -> TextCache:
        """What the transformer is told, with gradient: what embeds it is trained too."""
        with torch.enable_grad():
            return super().text_cache(prompt_embeds, request)

    def _check_context(self, request: StreamRequest) -> None:
        super()._check_context(request)
        if request.settings.context not in CONTEXTS:
            raise ValueError(
                f"context must be one of {[str(each) for each in CONTEXTS]} for a rollout with gradient, "
                f"whose last step writes nothing, got {str(request.settings.context)!r}"
            )

    def generate(self, state: StreamState) -> Tensor:
        """The next chunk, with the gradient of its last step."""
        with torch.set_grad_enabled(state.frame >= self.gradient_from):
            return super().generate(state)

    def predict(self, x: Tensor, timestep: float, state: StreamState) -> Tensor:
        """Velocity of a noisy chunk; without gradient in all steps but the last."""
        if not torch.is_grad_enabled():
            return super().predict(x, timestep, state)
        if timestep != state.request.schedule.timesteps[-1]:
            with torch.no_grad():
                return super().predict(x, timestep, state)
        past = state.kv
        # Finished frames do not change, unless all of them are made anew for every chunk.
        lasting = state.request.settings.context is ContextPolicy.CLEAN
        copies = _copies.setdefault(past, {}) if lasting else {}
        state.kv = cast(KVCache, GradientCache(past, copies))
        try:
            return super().predict(x, timestep, state)
        finally:
            state.kv = past


def rollout(engine: RolloutEngine, request: StreamRequest, exit_step: int) -> Tensor:
    """Latents `[B, C, T, h, w]` of a whole stream whose chunks leave their denoising after `exit_step`.

    Args:
        engine: of the student.
        request: with a length; its latents are not decoded.
        exit_step: index into the schedule's noise levels; the last one is what a viewer gets.
    """
    shortened = replace(request, schedule=request.schedule.until(exit_step), decode=False)
    state = engine.start(shortened)
    chunks = []
    while not state.finished:
        latents = engine.step(state).latents
        assert latents is not None
        chunks.append(latents)
    return torch.cat(chunks, dim=2)
