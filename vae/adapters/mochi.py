"""Mochi: causal convolutions with replicated padding, and attention over all past frames in the encoder."""

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_mochi import MochiUpBlock3D
from torch import Tensor, nn

from genstream.vae.adapters.base import Measured
from genstream.vae.adapters.memory import Memory, reach
from genstream.vae.adapters.rewired import Layer, RewiredAdapter, attend
from genstream.vae.adapters.scale import LatentScale
from genstream.vae.protocol import VAESpec


class _Conv(Layer):
    """The model hands caches through its blocks and drops them; the signature stays."""

    def forward(self, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, None]:
        conv = self.module
        x = self.extended(inputs, conv.time_pad, conv.time_kernel_size, conv.conv.stride[0])
        spatial = (conv.width_pad, conv.width_pad, conv.height_pad, conv.height_pad, 0, 0)
        return conv.conv(F.pad(x, spatial, mode="replicate")), None


class _Attention(Layer):
    """Attention of each pixel to itself in all frames so far.

    The model splits pixels into several calls when there are many, so each call has a name of its own.
    """

    def __init__(self, module: nn.Module, name: str, memory: Memory) -> None:
        super().__init__(module, name, memory)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        attention = self.module
        name, self.calls = f"{self.name}.{self.calls}", self.calls + 1
        query, key, value = (
            project(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for project in (attention.to_q, attention.to_k, attention.to_v)
        )  # [pixels, N, T, D]
        query, key = attention.norm_q(query), attention.norm_k(key)
        attended = attend(query, key, value, name, self.memory).transpose(1, 2).flatten(2)
        output: Tensor = attention.to_out[0](attended) / attention.rescale_output_factor
        return output


class MochiAdapter(RewiredAdapter):
    """Streams `AutoencoderKLMochi`; its encoder remembers all past frames, its decoder a few."""

    _layers: ClassVar[Mapping[type[nn.Module], type[Layer]]] = {
        CogVideoXCausalConv3d: _Conv,
        Attention: _Attention,
    }

    def __init__(self, vae: ModelMixin, measured: Measured | None = None) -> None:
        if not vae.drop_last_temporal_frames:
            raise ValueError("AutoencoderKLMochi.drop_last_temporal_frames must be True to stream, got False")
        super().__init__(vae, measured)

    def _layout(self) -> VAESpec:
        return VAESpec(
            temporal_ratio=self.vae.temporal_compression_ratio,
            spatial_ratio=self.vae.spatial_compression_ratio,
            latent_channels=self.vae.config.latent_channels,
            memory_latents=reach(self.vae.decoder, _growth),
        )

    def _latent_scale(self) -> LatentScale:
        config = self.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return LatentScale.uniform(config.scaling_factor)
        return LatentScale.per_channel(
            config.latents_mean, config.latents_std, config.latent_channels, config.scaling_factor
        )

    def _encode_piece(self, frames: Tensor, memory: Memory) -> Tensor:
        moments: Tensor = self._rewired(self.vae.encoder, memory)(frames)[0]
        return moments[:, : self.spec.latent_channels]

    def _decode_piece(self, raw: Tensor, memory: Memory) -> Tensor:
        frames: Tensor = self._rewired(self.vae.decoder, memory)(raw)[0]
        return frames if memory.started else frames[:, :, self.spec.temporal_ratio - 1 :]


def _growth(module: nn.Module) -> int:
    return module.temporal_expansion if isinstance(module, MochiUpBlock3D) else 1
