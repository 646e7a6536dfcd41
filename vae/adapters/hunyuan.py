"""HunyuanVideo in the windows in which the model decodes by default, and HunyuanVideo 1.5, which is causal.

HunyuanVideo 1.0 normalises over all frames of a clip, so each frame depends on every other. Its own class
avoids that with overlapping windows; streams use the same ones.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
    HunyuanVideo15AttnBlock,
    HunyuanVideo15CausalConv3d,
    HunyuanVideo15Downsample,
    HunyuanVideo15Upsample,
)
from torch import Tensor, nn

from genstream.vae.adapters.base import Adapter
from genstream.vae.adapters.memory import Memory
from genstream.vae.adapters.rewired import Layer, RewiredAdapter, with_past
from genstream.vae.adapters.scale import LatentScale
from genstream.vae.adapters.windowed import Window, run_window
from genstream.vae.protocol import Direction, VAESpec


class HunyuanVideoAdapter(Adapter):
    """Streams `AutoencoderKLHunyuanVideo` in its own windows, one latent frame of look-ahead by default."""

    def _layout(self) -> VAESpec:
        window = self._window()
        return VAESpec(
            temporal_ratio=self.vae.temporal_compression_ratio,
            spatial_ratio=self.vae.spatial_compression_ratio,
            latent_channels=self.vae.config.latent_channels,
            memory_latents=window.memory,
            first_latents=window.first,
            chunk_latents=window.piece,
            lookahead_latents=window.lookahead,
        )

    def _latent_scale(self) -> LatentScale:
        return LatentScale.uniform(self.vae.config.scaling_factor)

    def whole_decode(self, raw: Tensor) -> Tensor:
        """Frames of a whole clip of raw latents, decoded in one window."""
        frames: Tensor = self.vae.decoder(self.vae.post_quant_conv(raw))
        return frames

    def whole_encode(self, frames: Tensor) -> Tensor:
        """Raw latents of a whole clip, encoded in one window."""
        return self._moments(frames)[:, : self.spec.latent_channels]

    def _window(self) -> Window:
        ratio = self.vae.temporal_compression_ratio
        stride = self.vae.tile_sample_stride_num_frames // ratio
        return Window(
            context=1, piece=stride, lookahead=self.vae.tile_sample_min_num_frames // ratio - stride
        )

    def _lookahead(self, direction: Direction) -> int:
        return self.spec.lookahead_latents

    def _ready(self, direction: Direction, count: int, steps: int) -> list[int]:
        return self._window().ready(count, steps)

    def _rest(self, direction: Direction, count: int, steps: int) -> list[int]:
        return self._window().rest(count, steps)

    def _encode_piece(self, frames: Tensor, memory: Memory) -> Tensor:
        ratio = self.spec.temporal_ratio
        moments = run_window(frames, memory, self._moments, self._window(), ratio, 1)
        return moments[:, : self.spec.latent_channels]

    def _decode_piece(self, raw: Tensor, memory: Memory) -> Tensor:
        return run_window(raw, memory, self.whole_decode, self._window(), 1, self.spec.temporal_ratio)

    def _moments(self, frames: Tensor) -> Tensor:
        moments: Tensor = self.vae.quant_conv(self.vae.encoder(frames))
        return moments


class _Conv(Layer):
    def forward(self, x: Tensor) -> Tensor:
        conv, padding = self.module.conv, self.module.time_causal_padding
        if conv.kernel_size[0] > 1:
            x = self.extended(x, padding[4], conv.kernel_size[0], conv.stride[0])
        output: Tensor = conv(F.pad(x, (*padding[:4], 0, 0), mode=self.module.pad_mode))
        return output


class _Attention(Layer):
    """Attention of each frame to all pixels of itself and of every frame before it.

    Frame by frame, so that no mask over all pairs of pixels is needed.
    """

    def forward(self, x: Tensor) -> Tensor:
        block = self.module
        normed = block.norm(x)
        query, key, value = (
            project(normed).permute(0, 2, 3, 4, 1).flatten(2, 3)
            for project in (block.to_q, block.to_k, block.to_v)
        )  # [B, F, h w, C]
        key, value = with_past(key, value, 1, self.name, self.memory)
        before = key.shape[1] - query.shape[1]
        attended = [
            F.scaled_dot_product_attention(
                query[:, None, frame],
                key[:, None, : before + frame + 1].flatten(2, 3),
                value[:, None, : before + frame + 1].flatten(2, 3),
            )
            for frame in range(query.shape[1])
        ]  # [B, 1, h w, C]
        stacked = torch.cat(attended, dim=1).unflatten(2, (x.shape[3], x.shape[4])).permute(0, 4, 1, 2, 3)
        output: Tensor = block.proj_out(stacked) + x
        return output


class _Downsample(Layer):
    """A stream's first frame has a group of its own; later groups are complete."""

    def forward(self, x: Tensor) -> Tensor:
        layer = self.module
        if not (self.memory.started and layer.add_temporal_downsample):
            started: Tensor = layer(x)
            return started
        pooled = layer._dcae_downsample_rearrange(x, r1=2).unflatten(1, (-1, layer.group_size)).mean(dim=2)
        output: Tensor = layer._dcae_downsample_rearrange(layer.conv(x), r1=2) + pooled
        return output


class _Upsample(Layer):
    """A stream's first latent frame gives one frame; later ones give two."""

    def forward(self, x: Tensor) -> Tensor:
        layer = self.module
        if not (self.memory.started and layer.add_temporal_upsample):
            started: Tensor = layer(x)
            return started
        shortcut = layer._dcae_upsample_rearrange(x, r1=2).repeat_interleave(layer.repeats, dim=1)
        output: Tensor = layer._dcae_upsample_rearrange(layer.conv(x), r1=2) + shortcut
        return output


class HunyuanVideo15Adapter(RewiredAdapter):
    """Streams `AutoencoderKLHunyuanVideo15`; its state grows by the keys and values of every latent frame.

    Batches stream, although the model's own mask fits a batch of one only.
    """

    _layers: ClassVar[Mapping[type[nn.Module], type[Layer]]] = {
        HunyuanVideo15CausalConv3d: _Conv,
        HunyuanVideo15AttnBlock: _Attention,
        HunyuanVideo15Downsample: _Downsample,
        HunyuanVideo15Upsample: _Upsample,
    }

    def _layout(self) -> VAESpec:
        return VAESpec(
            temporal_ratio=self.vae.temporal_compression_ratio,
            spatial_ratio=self.vae.spatial_compression_ratio,
            latent_channels=self.vae.config.latent_channels,
            memory_latents=None,
        )

    def _latent_scale(self) -> LatentScale:
        return LatentScale.uniform(self.vae.config.scaling_factor)

    def whole_decode(self, raw: Tensor) -> Tensor:
        """Frames of a whole clip of raw latents as the VAE's own class decodes it, one clip at a time."""
        return torch.cat([self.vae.decode(clip, return_dict=False)[0] for clip in raw.split(1)])

    def whole_encode(self, frames: Tensor) -> Tensor:
        """Raw latents of a whole clip as the VAE's own class encodes it, one clip at a time."""
        return torch.cat([self.vae.encode(clip, return_dict=False)[0].mode() for clip in frames.split(1)])

    def _encode_piece(self, frames: Tensor, memory: Memory) -> Tensor:
        moments: Tensor = self._rewired(self.vae.encoder, memory)(frames)
        return moments[:, : self.spec.latent_channels]

    def _decode_piece(self, raw: Tensor, memory: Memory) -> Tensor:
        frames: Tensor = self._rewired(self.vae.decoder, memory)(raw)
        return frames
