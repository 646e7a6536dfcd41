"""Rollouts with gradient: the student streams as it does for a viewer, and learns from its own past.

Self Forcing (arXiv 2506.08009): a chunk's denoising ends at a random step, whose prediction is the chunk and
the only part of it with gradient; the past is in the cache, without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from genstream.cache.kv_cache import CachePart, KVCache, TextCache
from genstream.kernels.rope import rotate
from genstream.streaming.engine import CacheEngine
from genstream.streaming.request import StreamRequest
from genstream.streaming.settings import ContextPolicy
from genstream.streaming.state import StreamState

_CONTEXTS = (ContextPolicy.CLEAN, ContextPolicy.RECOMPUTE)


class GradientCache:
    """A stream's cache for one pass with gradient: the pass sees all it would write, but writes nothing.

    Later passes overwrite the cache in place, which a graph that has seen it would not survive. What the pass
    has seen of the past is kept, since gradient checkpointing makes the pass again when all is overwritten.
    """

    def __init__(self, past: KVCache) -> None:
        self.past = past
        self.parts: list[CachePart] = []
        self._seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by part and layer

    def begin(self, start: int, frames: int, *, finished_frames: int = 0, past_weight: float = 1.0) -> None:
        """Prepare a pass over `frames` frames from absolute frame `start`."""
        self.past.begin(start, frames, finished_frames=finished_frames, past_weight=past_weight)
        self.parts = list(self.past.parts)

    def write(
        self, part: CachePart, layer: int, keys: Tensor, rotated_keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All that the part attends to: a copy of the past, and its own keys and values with gradient."""
        del keys
        seen_keys, seen_values = self._past(part, layer)
        own_keys, own_values = rotated_keys[:, part.tokens], values[:, part.tokens]
        first = part.visible.start or 0
        for slots, tokens in part.runs:
            place = slice(slots.start - first, slots.stop - first)
            seen_keys = _replaced(seen_keys, place, own_keys[:, tokens])
            seen_values = _replaced(seen_values, place, own_values[:, tokens])
        return seen_keys, seen_values

    def _past(self, part: CachePart, layer: int) -> tuple[Tensor, Tensor]:
        key = (id(part), layer)
        if key not in self._seen:
            past, sinks = self.past, self.past.sinks[layer]
            keys, values = (
                each[layer][:, part.visible].detach().clone() for each in (past.keys, past.values)
            )
            if part.sinks_at is not None:
                keys[:, : sinks.shape[1]] = rotate(sinks, part.sinks_at)
            self._seen[key] = keys, values
        return self._seen[key]


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
        if request.settings.context not in _CONTEXTS:
            raise ValueError(
                f"context must be one of {[str(each) for each in _CONTEXTS]} for a rollout with gradient, "
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
        state.kv = cast(KVCache, GradientCache(past))
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


def _replaced(x: Tensor, place: slice, values: Tensor) -> Tensor:
    return torch.cat([x[:, : place.start], values, x[:, place.stop :]], dim=1)
