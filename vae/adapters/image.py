"""Image VAEs: each frame on its own. Exact, but nothing holds neighbouring frames together."""

import torch
from torch import Tensor

from genstream.vae.adapters.base import Adapter
from genstream.vae.adapters.memory import Memory
from genstream.vae.adapters.scale import LatentScale
from genstream.vae.layers import to_images, to_video
from genstream.vae.protocol import VAESpec


class ImageAdapter(Adapter):
    """Streams `AutoencoderKL`: one latent frame per frame."""

    def _layout(self) -> VAESpec:
        config = self.vae.config
        return VAESpec(
            temporal_ratio=1,
            spatial_ratio=2 ** (len(config.block_out_channels) - 1),
            latent_channels=config.latent_channels,
            memory_latents=0,
        )

    def _latent_scale(self) -> LatentScale:
        config = self.vae.config
        if config.latents_mean is not None and config.latents_std is not None:
            channels, factor = config.latent_channels, config.scaling_factor
            return LatentScale.per_channel(config.latents_mean, config.latents_std, channels, factor)
        return LatentScale.uniform(config.scaling_factor, config.shift_factor or 0.0)

    def whole_encode(self, frames: Tensor) -> Tensor:
        """Raw latents of a clip, frame by frame."""
        return torch.stack([self._encoded(frame) for frame in frames.unbind(dim=2)], dim=2)

    def whole_decode(self, raw: Tensor) -> Tensor:
        """Frames of a clip of raw latents, frame by frame."""
        return torch.stack([self._decoded(frame) for frame in raw.unbind(dim=2)], dim=2)

    def _encode_piece(self, frames: Tensor, memory: Memory) -> Tensor:
        return to_video(self._encoded(to_images(frames)), frames.shape[0])

    def _decode_piece(self, raw: Tensor, memory: Memory) -> Tensor:
        return to_video(self._decoded(to_images(raw)), raw.shape[0])

    def _encoded(self, images: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(images, return_dict=False)[0].mode()
        return latents

    def _decoded(self, latents: Tensor) -> Tensor:
        images: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return images


class TinyImageAdapter(ImageAdapter):
    """Streams `AutoencoderTiny`, whose latents have no distribution."""

    def _layout(self) -> VAESpec:
        config = self.vae.config
        return VAESpec(
            temporal_ratio=1,
            spatial_ratio=2 ** (len(config.encoder_block_out_channels) - 1),
            latent_channels=config.latent_channels,
            memory_latents=0,
        )

    def _latent_scale(self) -> LatentScale:
        return LatentScale.uniform(self.vae.config.scaling_factor, self.vae.config.shift_factor)

    def _encoded(self, images: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(images, return_dict=False)[0]
        return latents
