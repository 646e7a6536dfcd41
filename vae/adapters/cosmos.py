"""Cosmos: factorised causal convolutions, attention over all past frames, wavelets in front."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_cosmos import (
    CosmosCausalAttention,
    CosmosCausalConv3d,
    CosmosDownsample3d,
    CosmosPatchEmbed3d,
    CosmosTemporalAttentionProcessor2_0,
    CosmosUnpatcher3d,
    CosmosUpsample3d,
)
from torch import Tensor, nn

from genstream.vae.adapters.memory import Memory
from genstream.vae.adapters.rewired import Layer, RewiredAdapter, attend
from genstream.vae.adapters.scale import LatentScale
from genstream.vae.protocol import VAESpec


class _Conv(Layer):
    def forward(self, x: Tensor) -> Tensor:
        conv = self.module
        if conv.kernel_size[0] > 1:
            x = self.extended(x, conv.temporal_pad, conv.kernel_size[0], conv.stride[0])
        x = F.pad(x, (*conv.spatial_pad, 0, 0), mode=conv.pad_mode)
        return F.conv3d(x, conv.weight, conv.bias, conv.stride, dilation=conv.dilation)


class _Attention(Layer):
    """Temporal attention of each pixel to all its frames so far; spatial attention is left alone."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        attention = self.module
        if not isinstance(attention.processor, CosmosTemporalAttentionProcessor2_0):
            spatial: Tensor = attention(x, attention_mask)
            return spatial
        size = (x.shape[0], *x.shape[3:])
        normed = attention.norm(x)
        query, key, value = (
            project(normed)
            .permute(0, 3, 4, 2, 1)
            .flatten(0, 2)
            .unflatten(-1, (attention.num_attention_heads, -1))
            .transpose(1, 2)
            for project in (attention.to_q, attention.to_k, attention.to_v)
        )  # [pixels, N, T, D]
        attended = attend(query, key, value, self.name, self.memory).transpose(1, 2).flatten(2)
        output: Tensor = attention.to_out[0](attended.unflatten(0, size).permute(0, 4, 3, 1, 2))
        return x + output


class _Downsample(Layer):
    """The first frame is doubled at a stream's start only."""

    def forward(self, x: Tensor) -> Tensor:
        layer = self.module
        if not (self.memory.started and layer.temporal_downsample):
            started: Tensor = layer(x)
            return started
        if layer.spatial_downsample:
            x = F.pad(x, (0, 1, 0, 1, 0, 0))
            x = layer.conv1(x) + F.avg_pool3d(x, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        x = layer.conv2(x) + F.avg_pool3d(x, kernel_size=(2, 1, 1), stride=(2, 1, 1))
        output: Tensor = layer.conv3(x)
        return output


class _Upsample(Layer):
    """The first latent frame is not doubled."""

    def forward(self, x: Tensor) -> Tensor:
        layer = self.module
        if not (self.memory.started and layer.temporal_upsample):
            started: Tensor = layer(x)
            return started
        x = x.repeat_interleave(2, dim=2)
        x = layer.conv1(x) + x
        if layer.spatial_upsample:
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = layer.conv2(x) + x
        output: Tensor = layer.conv3(x)
        return output


class _Patch(Layer):
    """A stream's first frame counts as a group of frames; later groups are complete."""

    def forward(self, x: Tensor) -> Tensor:
        layer = self.module
        if not self.memory.started:
            started: Tensor = layer(x)
            return started
        # A group is transformed on its own, so a stand-in for the first frame may precede it and be cut off.
        transformed: Tensor = layer(torch.cat([x[:, :, :1], x], dim=2))
        return transformed[:, :, 1:]


class _Unpatch(Layer):
    """A stream's first latent frame gives one frame; later ones give all of their group."""

    def forward(self, x: Tensor) -> Tensor:
        layer = self.module
        if not self.memory.started:
            started: Tensor = layer(x)
            return started
        frames: Tensor = layer(torch.cat([x[:, :, :1], x], dim=2))
        return frames[:, :, 1:]


class CosmosAdapter(RewiredAdapter):
    """Streams `AutoencoderKLCosmos`; its state grows by the keys and values of every frame."""

    _layers: ClassVar[Mapping[type[nn.Module], type[Layer]]] = {
        CosmosCausalConv3d: _Conv,
        CosmosCausalAttention: _Attention,
        CosmosDownsample3d: _Downsample,
        CosmosUpsample3d: _Upsample,
        CosmosPatchEmbed3d: _Patch,
        CosmosUnpatcher3d: _Unpatch,
    }

    def _layout(self) -> VAESpec:
        config = self.vae.config
        return VAESpec(
            temporal_ratio=config.temporal_compression_ratio,
            spatial_ratio=config.spatial_compression_ratio,
            latent_channels=config.latent_channels,
            memory_latents=None,
        )

    def _latent_scale(self) -> LatentScale:
        config = self.vae.config
        if config.latents_mean is None:
            return LatentScale.uniform(1.0)
        return LatentScale.per_frame(config.latents_mean, config.latents_std, config.latent_channels)

    def _encode_piece(self, frames: Tensor, memory: Memory) -> Tensor:
        latents: Tensor = self.vae.quant_conv(self._rewired(self.vae.encoder, memory)(frames))
        return latents

    def _decode_piece(self, raw: Tensor, memory: Memory) -> Tensor:
        frames: Tensor = self._rewired(self.vae.decoder, memory)(self.vae.post_quant_conv(raw))
        return frames
