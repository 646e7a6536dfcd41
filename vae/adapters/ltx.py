"""LTX-Video and LTX-2: exact where the weights are causal, windowed where they are not.

Both have a causal encoder. As released their decoders look ahead (`decoder_causal=False`): those are decoded
in windows.
"""

from collections.abc import Mapping
from typing import ClassVar

from diffusers import ModelMixin
from diffusers.models.autoencoders.autoencoder_kl_ltx import (
    LTXVideoCausalConv3d,
    LTXVideoDownsampler3d,
    LTXVideoUpsampler3d,
)
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import (
    LTX2VideoCausalConv3d,
    LTX2VideoDownsampler3d,
    LTX2VideoUpsampler3d,
)
from torch import Tensor, nn

from genstream.vae.adapters.base import Measured
from genstream.vae.adapters.memory import Memory, reach
from genstream.vae.adapters.rewired import Layer, RewiredAdapter
from genstream.vae.adapters.scale import LatentScale
from genstream.vae.adapters.windowed import Window, run_window
from genstream.vae.protocol import Direction, VAESpec

_WINDOW = Window(context=2, piece=2, lookahead=2)


class _Conv(Layer):
    def forward(self, x: Tensor, causal: bool | None = None) -> Tensor:
        conv = self.module.conv
        kernel_size = conv.kernel_size[0]
        if kernel_size > 1:
            x = self.extended(x, kernel_size - 1, kernel_size, conv.stride[0])
        output: Tensor = conv(x)
        return output


class _Downsampler(Layer):
    """Folds frames and pixels into channels; the first frames are doubled at a stream's start only."""

    def forward(self, x: Tensor, causal: bool | None = None) -> Tensor:
        layer = self.module
        if not self.memory.started:
            started: Tensor = layer(x)
            return started
        pooled: Tensor = _folded(x, layer.stride).unflatten(1, (-1, layer.group_size)).mean(dim=2)
        return _folded(layer.conv(x), layer.stride) + pooled


class _Upsampler(Layer):
    """Unfolds channels into frames and pixels; the first ones are cut off at a stream's start only."""

    def forward(self, x: Tensor, causal: bool | None = None) -> Tensor:
        layer = self.module
        if not self.memory.started:
            started: Tensor = layer(x)
            return started
        output = _unfolded(layer.conv(x), layer.stride)
        if not layer.residual:
            return output
        shortcut = _unfolded(x, layer.stride)
        return output + shortcut.repeat(1, output.shape[1] // shortcut.shape[1], 1, 1, 1)


class LTXAdapter(RewiredAdapter):
    """Streams `AutoencoderKLLTXVideo` and `AutoencoderKLLTX2Video`.

    Weights that are conditioned on a noise level decode at level 0, as the pipelines do by default.

    Args:
        vae: the diffusers model.
        measured: by `probe`.
        window: for decoders that look ahead. Pieces are decoded together with their surroundings, so the cost
            is (context + piece + lookahead) / piece, and the error falls with the context and the look-ahead.
    """

    _layers: ClassVar[Mapping[type[nn.Module], type[Layer]]] = {
        LTXVideoCausalConv3d: _Conv,
        LTXVideoDownsampler3d: _Downsampler,
        LTXVideoUpsampler3d: _Upsampler,
        LTX2VideoCausalConv3d: _Conv,
        LTX2VideoDownsampler3d: _Downsampler,
        LTX2VideoUpsampler3d: _Upsampler,
    }

    def __init__(self, vae: ModelMixin, measured: Measured | None = None, window: Window = _WINDOW) -> None:
        noise = vae.config.decoder_inject_noise
        if noise if isinstance(noise, bool) else any(noise):
            raise ValueError(
                f"{type(vae).__name__} cannot stream with decoder_inject_noise={noise}: "
                f"its decoder draws noise anew in every call"
            )
        if not vae.config.encoder_causal:
            raise ValueError(
                f"{type(vae).__name__} cannot stream with encoder_causal=False: its encoder looks ahead"
            )
        self.window = None if vae.config.decoder_causal else window
        super().__init__(vae, measured)

    def _layout(self) -> VAESpec:
        window = self.window
        return VAESpec(
            temporal_ratio=self.vae.temporal_compression_ratio,
            spatial_ratio=self.vae.spatial_compression_ratio,
            latent_channels=self.vae.config.latent_channels,
            memory_latents=reach(self.vae.decoder, _growth) if window is None else window.memory,
            first_latents=1 if window is None else window.first,
            chunk_latents=1 if window is None else window.piece,
            lookahead_latents=0 if window is None else window.lookahead,
        )

    def _latent_scale(self) -> LatentScale:
        mean, std = self.vae.latents_mean.tolist(), self.vae.latents_std.tolist()
        config = self.vae.config
        return LatentScale.per_channel(mean, std, config.latent_channels, config.scaling_factor)

    def whole_decode(self, raw: Tensor) -> Tensor:
        """Frames of a whole clip of raw latents as the VAE's own class decodes it."""
        frames: Tensor = self.vae.decode(raw, self._noise_level(raw), return_dict=False)[0]
        return frames

    def _lookahead(self, direction: Direction) -> int:
        return self.spec.lookahead_latents if direction == "decode" else 0

    def _ready(self, direction: Direction, count: int, steps: int) -> list[int]:
        if self.window is None or direction == "encode":
            return super()._ready(direction, count, steps)
        return self.window.ready(count, steps)

    def _rest(self, direction: Direction, count: int, steps: int) -> list[int]:
        if self.window is None or direction == "encode":
            return super()._rest(direction, count, steps)
        return self.window.rest(count, steps)

    def _encode_piece(self, frames: Tensor, memory: Memory) -> Tensor:
        moments: Tensor = self._rewired(self.vae.encoder, memory)(frames)
        return moments[:, : self.spec.latent_channels]

    def _decode_piece(self, raw: Tensor, memory: Memory) -> Tensor:
        level = self._noise_level(raw)
        if self.window is None:
            causal: Tensor = self._rewired(self.vae.decoder, memory)(raw, level)
            return causal

        def network(window: Tensor) -> Tensor:
            frames: Tensor = self.vae.decoder(window, level)
            return frames

        return run_window(raw, memory, network, self.window, 1, self.spec.temporal_ratio)

    def _noise_level(self, raw: Tensor) -> Tensor | None:
        return raw.new_zeros(raw.shape[0]) if self.vae.config.timestep_conditioning else None


def _growth(module: nn.Module) -> int:
    return module.stride[0] if isinstance(module, LTXVideoUpsampler3d | LTX2VideoUpsampler3d) else 1


def _folded(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """[B, C, F s, h u, w v] to [B, C s u v, F, h, w], frames varying slowest among the new channels."""
    batch, channels, frames, height, width = x.shape
    t, u, v = stride
    split = x.reshape(batch, channels, frames // t, t, height // u, u, width // v, v)
    return split.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def _unfolded(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """[B, C s u v, F, h, w] to [B, C, F s, h u, w v]; undoes `_folded`."""
    split: Tensor = x.unflatten(1, (-1, *stride))
    return split.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
