"""CogVideoX and KVAE: a clip is defined by the pieces in which the model works it off.

Both normalise over all frames of a piece, so another partition gives other frames. Streams are cut exactly as
the models cut a clip; the memory of their convolutions goes into the stream's state.
"""

from typing import Any

import torch
from torch import Tensor

from genstream.vae.adapters.base import Adapter
from genstream.vae.adapters.memory import Memory
from genstream.vae.adapters.scale import LatentScale
from genstream.vae.protocol import Direction, VAESpec

# Convolutions over one frame hand back their whole input, which nothing reads.
_WITHOUT_MEMORY = ("conv_y", "conv_b")
_KVAE_SEGMENT_FRAMES = 16
_SEPARATOR = "/"

_Tree = dict[Any, Any] | list[Any]


class PartitionAdapter(Adapter):
    """Streams in pieces of `first_latents`, then of `chunk_latents`."""

    def _ready(self, direction: Direction, count: int, steps: int) -> list[int]:
        pieces: list[int] = []
        size = self.spec.chunk_latents if steps else self.spec.first_latents
        while count >= size:
            pieces.append(size)
            count, size = count - size, self.spec.chunk_latents
        return pieces


class CogVideoXAdapter(PartitionAdapter):
    """Streams `AutoencoderKLCogVideoX`, 3 latent frames first and 2 at a time after that.

    How the model's own `decode` and `encode` cut a clip depends on its length, unless that is an odd number
    of latent frames or 8n + 1 frames; for an even number the first latent frame gives r frames. A stream does
    not know its length: it always begins alike, and an incomplete last piece is filled up for decoding.
    """

    def _layout(self) -> VAESpec:
        config = self.vae.config
        size = self.vae.num_latent_frames_batch_size
        return VAESpec(
            temporal_ratio=int(config.temporal_compression_ratio),
            spatial_ratio=2 ** (len(config.block_out_channels) - 1),
            latent_channels=config.latent_channels,
            memory_latents=None,
            first_latents=size + 1,
            chunk_latents=size,
        )

    def _latent_scale(self) -> LatentScale:
        return LatentScale.uniform(self.vae.config.scaling_factor)

    def _rest(self, direction: Direction, count: int, steps: int) -> list[int]:
        if direction == "encode" or count == 0 or (count == 1 and steps == 0):
            return super()._rest(direction, count, steps)
        return [self.spec.chunk_latents if steps else self.spec.first_latents]

    def _encode_piece(self, frames: Tensor, memory: Memory) -> Tensor:
        moments: Tensor
        moments, cache = self.vae.encoder(frames, conv_cache=_nested(memory.past))
        _remember_nested(cache, memory)
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        return moments[:, : self.spec.latent_channels]

    def _decode_piece(self, raw: Tensor, memory: Memory) -> Tensor:
        if self.vae.post_quant_conv is not None:
            raw = self.vae.post_quant_conv(raw)
        frames: Tensor
        frames, cache = self.vae.decoder(raw, conv_cache=_nested(memory.past))
        _remember_nested(cache, memory)
        return frames


class KVAEAdapter(PartitionAdapter):
    """Streams `AutoencoderKLKVAEVideo` in its segments of 16 frames, the first with one frame more."""

    def _layout(self) -> VAESpec:
        config = self.vae.config
        ratio = config.temporal_compress_times
        return VAESpec(
            temporal_ratio=ratio,
            spatial_ratio=2 ** (len(config.ch_mult) - 1),
            latent_channels=config.z_channels,
            memory_latents=None,
            first_latents=1 + _KVAE_SEGMENT_FRAMES // ratio,
            chunk_latents=_KVAE_SEGMENT_FRAMES // ratio,
        )

    def _latent_scale(self) -> LatentScale:
        # Its class has no such setting; a published configuration may.
        return LatentScale.uniform(self.vae.config.get("scaling_factor", 1.0))

    def _rest(self, direction: Direction, count: int, steps: int) -> list[int]:
        # The model cannot work off a later segment of a single latent frame.
        return [max(count, 2) if steps else count] if count else []

    def _encode_piece(self, frames: Tensor, memory: Memory) -> Tensor:
        cache = _segment_cache(self.vae._make_encoder_cache(), memory)
        moments: Tensor = self.vae.encoder(frames, cache)
        _remember_segment(cache, memory)
        return moments[:, : self.spec.latent_channels]

    def _decode_piece(self, raw: Tensor, memory: Memory) -> Tensor:
        cache = _segment_cache(self.vae._make_decoder_cache(), memory)
        frames: Tensor = self.vae.decoder(raw, cache)
        _remember_segment(cache, memory)
        return frames


def _nested(slots: dict[str, Tensor]) -> dict[str, Any]:
    """The tree of caches whose leaves are `slots`, named by their path."""
    tree: dict[str, Any] = {}
    for path, slot in slots.items():
        *parents, leaf = path.split(_SEPARATOR)
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = slot
    return tree


def _remember_nested(tree: dict[str, Any], memory: Memory, path: str = "") -> None:
    for name, entry in tree.items():
        if isinstance(entry, dict):
            _remember_nested(entry, memory, f"{path}{name}{_SEPARATOR}")
        elif entry is not None and name not in _WITHOUT_MEMORY:
            memory.remember(f"{path}{name}", entry)


def _segment_cache(tree: _Tree, memory: Memory, path: str = "") -> _Tree:
    """Fill an empty cache of KVAE: frames to look back at, and marks that the first segment is past."""
    for name, entry in _entries(tree):
        if isinstance(entry, dict | list):
            _segment_cache(entry, memory, f"{path}{name}{_SEPARATOR}")
        elif name == "padding":
            tree[name] = memory.recall(f"{path}{name}")
        elif memory.started:
            tree[name] = 1
    return tree


def _remember_segment(tree: _Tree, memory: Memory, path: str = "") -> None:
    for name, entry in _entries(tree):
        if isinstance(entry, dict | list):
            _remember_segment(entry, memory, f"{path}{name}{_SEPARATOR}")
        elif isinstance(entry, torch.Tensor):
            memory.remember(f"{path}{name}", entry)


def _entries(tree: _Tree) -> list[tuple[Any, Any]]:
    return list(tree.items() if isinstance(tree, dict) else enumerate(tree))
