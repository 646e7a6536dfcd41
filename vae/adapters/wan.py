"""Wan 2.1, Wan 2.2 and Qwen-Image: the model's own feature cache, held in the stream's state."""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageResample
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from torch import Tensor, nn

from genstream.vae.adapters.base import Adapter
from genstream.vae.adapters.memory import Memory, reach
from genstream.vae.adapters.scale import LatentScale
from genstream.vae.protocol import Direction, VAESpec

# What the model writes into its cache for an upsampler that has seen the first latent frame only.
_SEEN_FIRST = "Rep"
_RESAMPLERS = (WanResample, QwenImageResample)


class WanAdapter(Adapter):
    """Streams `AutoencoderKLWan`, one latent frame at a time like the model's own loop.

    Any chunking is bit-equal to any other. From the model's own result it differs by the rounding of its
    1x1x1 convolutions, which that loop runs on the whole clip.
    """

    def _layout(self) -> VAESpec:
        config = self.vae.config
        patch_size = config.patch_size or 1
        return VAESpec(
            temporal_ratio=2 ** sum(config.temperal_downsample),
            spatial_ratio=2 ** (len(config.dim_mult) - 1) * patch_size,
            latent_channels=config.z_dim,
            memory_latents=reach(self.vae.decoder, _growth),
        )

    def _latent_scale(self) -> LatentScale:
        config = self.vae.config
        return LatentScale.per_channel(config.latents_mean, config.latents_std, config.z_dim)

    def _ready(self, direction: Direction, count: int, steps: int) -> list[int]:
        return [1] * count

    def _encode_piece(self, frames: Tensor, memory: Memory) -> Tensor:
        moments: Tensor = self.vae.quant_conv(self._encoded(self._patched(frames), memory))
        return moments[:, : self.spec.latent_channels]

    def _decode_piece(self, raw: Tensor, memory: Memory) -> Tensor:
        return self._unpatched(self._decoded(self.vae.post_quant_conv(raw), memory))

    def _encoded(self, x: Tensor, memory: Memory) -> Tensor:
        cache = _cache(memory, self.vae.encoder)
        encoded: Tensor = self.vae.encoder(x, feat_cache=cache, feat_idx=[0])
        _keep(cache, memory)
        return encoded

    def _decoded(self, x: Tensor, memory: Memory) -> Tensor:
        cache = _cache(memory, self.vae.decoder)
        decoded: Tensor = self.vae.decoder(x, feat_cache=cache, feat_idx=[0], first_chunk=not memory.started)
        _keep(cache, memory)
        return decoded

    def _patched(self, frames: Tensor) -> Tensor:
        patched: Tensor = patchify(frames, patch_size=self.vae.config.patch_size or 1)
        return patched

    def _unpatched(self, x: Tensor) -> Tensor:
        frames: Tensor = unpatchify(x, patch_size=self.vae.config.patch_size or 1)
        return frames


class QwenImageAdapter(WanAdapter):
    """Streams `AutoencoderKLQwenImage`: the same network without patches."""

    def _layout(self) -> VAESpec:
        config = self.vae.config
        return VAESpec(
            temporal_ratio=2 ** sum(config.temperal_downsample),
            spatial_ratio=2 ** (len(config.dim_mult) - 1),
            latent_channels=config.z_dim,
            memory_latents=reach(self.vae.decoder, _growth),
        )

    def _decoded(self, x: Tensor, memory: Memory) -> Tensor:
        cache = _cache(memory, self.vae.decoder)
        decoded: Tensor = self.vae.decoder(x, feat_cache=cache, feat_idx=[0])
        _keep(cache, memory)
        return decoded

    def _patched(self, frames: Tensor) -> Tensor:
        return frames

    def _unpatched(self, x: Tensor) -> Tensor:
        return x


def _cache(memory: Memory, network: nn.Module) -> list[Any]:
    """The cache that the network works on; it has a place for every convolution, not all are used."""
    cache: list[Any] = [None] * sum(isinstance(module, nn.Conv3d) for module in network.modules())
    for name, slot in memory.past.items():
        cache[int(name)] = slot if slot.numel() else _SEEN_FIRST
    return cache


def _keep(cache: list[Any], memory: Memory) -> None:
    """Remember what the network wrote; a slot without elements stands for the marker."""
    for index, entry in enumerate(cache):
        if entry is not None:
            memory.remember(str(index), torch.zeros(0) if isinstance(entry, str) else entry)


def _growth(module: nn.Module) -> int:
    return 2 if isinstance(module, _RESAMPLERS) and module.mode == "upsample3d" else 1
