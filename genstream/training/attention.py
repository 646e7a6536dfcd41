"""Attention for training, which has masks: on CPUs and on GPUs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from genstream.transformer.attention import AttentionMask, AttentionProcessor, FrameMask

_BLOCK_TOKENS = 128
"""Side of the blocks that FlexAttention computes, or leaves out, as a whole."""


class MatmulAttention(AttentionProcessor):
    """Attention as two matrix products, one pair for each run of queries that see the same keys.

    With gradient, on CPUs and sequences of a few hundred tokens, it takes a third of the time of torch's own
    scaled dot-product attention, whose backward pass is made for long sequences. What a mask hides is not
    computed.
    """

    def __call__(
        self,
        attention: nn.Module,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: AttentionMask | None = None,
    ) -> Tensor:
        """Attend on `[B, L, N, D]`; weights on keys are left to torch."""
        if mask is None:
            return _attend(query, keys, values)
        if not isinstance(mask, FrameMask):
            return super().__call__(attention, query, keys, values, mask)
        frames, tokens = mask.frames, mask.tokens_per_frame
        changes = (frames[1:] != frames[:-1]).any(1).nonzero().flatten() + 1
        attended = []
        for first, last in itertools.pairwise([0, *changes.tolist(), len(frames)]):
            seen = frames[first].repeat_interleave(tokens).nonzero().flatten()
            queries = query[:, first * tokens : last * tokens]
            attended.append(_attend(queries, _chosen(keys, seen), _chosen(values, seen)))
        return torch.cat(attended, dim=1)


class FlexAttention(AttentionProcessor):
    """FlexAttention (arXiv 2412.05496) where there is a mask of frames, and torch's own attention elsewhere.

    A dense mask over the tokens of two clips of 21 Wan frames has 4.3 billion entries and rules out the fast
    kernels. Here blocks of tokens that a mask hides are left out, and only where a block is partly hidden is
    each of its tokens looked up. On CPUs it is not compiled and slow: for tests.
    """

    def __init__(self) -> None:
        # A mask is asked for by every layer, once more where blocks are checkpointed, and never again.
        self._blocks: WeakKeyDictionary[FrameMask, BlockMask] = WeakKeyDictionary()

    def __call__(
        self,
        attention: nn.Module,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: AttentionMask | None = None,
    ) -> Tensor:
        """Attend on `[B, L, N, D]`."""
        if not isinstance(mask, FrameMask):
            return super().__call__(attention, query, keys, values, mask)
        if mask not in self._blocks:
            self._blocks[mask] = block_mask(mask)
        # Autocast knows nothing of it, and norms leave queries and keys in float32.
        q, k, v = (x.to(values.dtype).transpose(1, 2) for x in (query, keys, values))
        attend = _compiled() if query.is_cuda else _flex
        return attend(q, k, v, self._blocks[mask]).transpose(1, 2).flatten(2)


def block_mask(mask: FrameMask) -> BlockMask:
    """A mask of frames for FlexAttention, by way of blocks of 128 tokens and never of all tokens."""
    tokens, length = mask.tokens_per_frame, len(mask.frames) * mask.tokens_per_frame
    # Places behind the last token are those of one more frame, which neither sees nor is seen.
    frames = pad(mask.frames, (0, 1, 0, 1))
    blocks = -(-length // _BLOCK_TOKENS)
    places = torch.arange(blocks * _BLOCK_TOKENS, device=frames.device) // tokens
    owners = places.clamp(max=len(mask.frames)).unflatten(0, (blocks, _BLOCK_TOKENS))
    has = torch.zeros(blocks, len(frames), device=frames.device).scatter_(1, owners, 1.0)  # [blocks, T + 1]
    seen, hidden = (has @ each.float() @ has.T > 0 for each in (frames, ~frames))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        return frames[query // tokens, key // tokens]

    return BlockMask.from_kv_blocks(
        *_listed(seen & hidden),
        *_listed(seen & ~hidden),
        BLOCK_SIZE=_BLOCK_TOKENS,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are chosen, `[1, 1, rows]`, and which, before all others."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1).int()[None, None], order.int()[None, None]


def _flex(query: Tensor, keys: Tensor, values: Tensor, blocks: BlockMask) -> Tensor:
    return flex_attention(query, keys, values, block_mask=blocks)


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]:
    """One for all models; lengths are dynamic, as a compilation for each would soon reach torch's limit."""
    return torch.compile(_flex, dynamic=True, fullgraph=True)


def _chosen(tokens: Tensor, seen: Tensor) -> Tensor:
    """Those of `[B, S, N, D]` that are seen; a run of them is not copied, nor is its gradient added up."""
    start, end = int(seen[0]), int(seen[-1]) + 1
    return tokens[:, start:end] if end - start == len(seen) else tokens.index_select(1, seen)


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, keys, values))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    out: Tensor = scores.softmax(-1).to(v.dtype) @ v
    return out.transpose(1, 2).flatten(2)
