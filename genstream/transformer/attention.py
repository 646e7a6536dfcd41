"""Attention of the causal transformer: on itself through the KV cache, and on the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from genstream.cache.kv_cache import AttentionContext
from genstream.kernels.rope import Phases, rotate

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class FrameMask:
    """Which latent frame sees which. Attention that needs no dense mask of tokens makes none of it.

    Attributes:
        frames: boolean `[T, T]`, True where the row's frame sees the column's.
        tokens_per_frame: tokens that see alike.
    """

    frames: Tensor
    tokens_per_frame: int

    @cached_property
    def dense(self) -> Tensor:
        """The same over tokens, `[L, L]`; made once for all layers."""
        by_row = self.frames.repeat_interleave(self.tokens_per_frame, 0)
        return by_row.repeat_interleave(self.tokens_per_frame, 1)


AttentionMask = FrameMask | Tensor


class AttentionProcessor:
    """Plain scaled dot-product attention on `[B, L, N, D]` through diffusers' dispatcher."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attention: nn.Module,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: AttentionMask | None = None,
    ) -> Tensor:
        """Attend; a `mask` that is a tensor, `[L or 1, S]`, is added to the scores."""
        weights = mask.dense if isinstance(mask, FrameMask) else mask
        out: Tensor = dispatch_attention_fn(
            query,
            keys,
            values,
            attn_mask=None if weights is None else weights[None, None],
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return out.flatten(2)


class _Attention(nn.Module, AttentionModuleMixin):
    """Projections and across-head RMS norms shared by both kinds of attention."""

    _default_processor_cls = AttentionProcessor
    _available_processors = (AttentionProcessor,)
    _supports_qkv_fusion = False
    processor: AttentionProcessor

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, eps=eps)
        self.norm_k = nn.RMSNorm(dim, eps=eps)
        self.processor = AttentionProcessor()

    def _query(self, hidden: Tensor) -> Tensor:
        return self._split(self.norm_q(self.to_q(hidden)))

    def _split(self, x: Tensor) -> Tensor:
        by_head: Tensor = x.unflatten(-1, (self.heads, -1))  # [B, L, N, D]
        return by_head


class SelfAttention(_Attention):
    """Attention of a chunk on itself and on the cached past."""

    def __init__(self, dim: int, heads: int, eps: float, layer: int) -> None:
        super().__init__(dim, heads, eps)
        self.layer = layer

    def forward(
        self,
        hidden: Tensor,
        at: Phases,
        cache: AttentionContext | None = None,
        mask: FrameMask | None = None,
    ) -> Tensor:
        """Tokens `[B, L, C]` to `[B, L, C]`; with a cache, writes this pass's keys and values into it."""
        query = rotate(self._query(hidden), at)
        keys = self._split(self.norm_k(self.to_k(hidden)))
        values = self._split(self.to_v(hidden))
        rotated = rotate(keys, at)
        if cache is None:
            attended = self.processor(self, query, rotated, values, mask)
        else:
            # In this order: the next chunk overwrites frames that a finished one still sees.
            parts = [
                self.processor(
                    self,
                    query[:, part.tokens],
                    *cache.write(part, self.layer, keys, rotated, values),
                    part.weights,
                )
                for part in cache.parts
            ]
            attended = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        out: Tensor = self.to_out[0](attended)
        return out


class CrossAttention(_Attention):
    """Attention on the prompt's tokens, plus on the image's tokens in image-to-video checkpoints."""

    def __init__(self, dim: int, heads: int, eps: float, added_kv_proj_dim: int | None = None) -> None:
        super().__init__(dim, heads, eps)
        self.add_k_proj = self.add_v_proj = self.norm_added_k = None
        if added_kv_proj_dim is not None:
            self.add_k_proj = nn.Linear(added_kv_proj_dim, dim)
            self.add_v_proj = nn.Linear(added_kv_proj_dim, dim)
            self.norm_added_k = nn.RMSNorm(dim, eps=eps)

    def text(self, text: Tensor) -> KeysValues:
        """Keys and values of embedded text `[B, tokens, C]`."""
        return self._split(self.norm_k(self.to_k(text))), self._split(self.to_v(text))

    def image(self, image: Tensor) -> KeysValues:
        """Keys and values of embedded image tokens `[B, tokens, C]`."""
        if self.add_k_proj is None or self.add_v_proj is None or self.norm_added_k is None:
            raise ValueError("encoder_hidden_states_image was given, but this model takes no image tokens")
        return self._split(self.norm_added_k(self.add_k_proj(image))), self._split(self.add_v_proj(image))

    def forward(self, hidden: Tensor, text: KeysValues, image: KeysValues | None = None) -> Tensor:
        """Tokens `[B, L, C]` attend to the prompt and, separately, to the image; the results are added."""
        query = self._query(hidden)
        attended = self.processor(self, query, *text)
        if image is not None:
            attended = torch.add(attended, self.processor(self, query, *image))
        out: Tensor = self.to_out[0](attended)
        return out
