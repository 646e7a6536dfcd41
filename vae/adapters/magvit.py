"""EasyAnimate (Magvit): causal convolutions that keep their past on the module, redirected into the state."""

from collections.abc import Mapping
from typing import ClassVar

from diffusers.models.autoencoders.autoencoder_kl_magvit import (
    EasyAnimateCausalConv3d,
    EasyAnimateUpsampler3D,
)
from torch import Tensor, nn

from genstream.vae.adapters.memory import Memory, reach
from genstream.vae.adapters.rewired import Layer, RewiredAdapter
from genstream.vae.adapters.scale import LatentScale
from genstream.vae.protocol import Direction, VAESpec


class _Conv(Layer):
    """The model's convolution with `prev_features` taken from and put into the stream's memory."""

    def forward(self, x: Tensor) -> Tensor:
        self.module.prev_features = self.memory.recall(self.name)
        output: Tensor = self.module(x)
        self.memory.remember(self.name, self.module.prev_features)
        return output


class _Upsampler(Layer):
    """Doubles frames but those of a stream's first latent frame."""

    def forward(self, x: Tensor) -> Tensor:
        self.module.prev_features = x if self.memory.started else None
        output: Tensor = self.module(x)
        return output


class MagvitAdapter(RewiredAdapter):
    """Streams `AutoencoderKLMagvit`, one latent frame at a time like the model's own loop."""

    _layers: ClassVar[Mapping[type[nn.Module], type[Layer]]] = {
        EasyAnimateCausalConv3d: _Conv,
        EasyAnimateUpsampler3D: _Upsampler,
    }

    def _layout(self) -> VAESpec:
        return VAESpec(
            temporal_ratio=self.vae.temporal_compression_ratio,
            spatial_ratio=self.vae.spatial_compression_ratio,
            latent_channels=self.vae.config.latent_channels,
            memory_latents=reach(self.vae.decoder, _growth),
        )

    def _latent_scale(self) -> LatentScale:
        return LatentScale.uniform(self.vae.config.scaling_factor)

    def _ready(self, direction: Direction, count: int, steps: int) -> list[int]:
        return [1] * count

    def _encode_piece(self, frames: Tensor, memory: Memory) -> Tensor:
        moments: Tensor = self.vae.quant_conv(self._rewired(self.vae.encoder, memory)(frames))
        return moments[:, : self.spec.latent_channels]

    def _decode_piece(self, raw: Tensor, memory: Memory) -> Tensor:
        frames: Tensor = self._rewired(self.vae.decoder, memory)(self.vae.post_quant_conv(raw))
        return frames


def _growth(module: nn.Module) -> int:
    return 2 if isinstance(module, EasyAnimateUpsampler3D) and module.temporal_upsample else 1
