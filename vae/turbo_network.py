"""The decoder network of Turbo-VAED, layer by layer under its published names."""

import math

import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from genstream.vae.layers import CausalConv3d, CentredConv3d, Memory, rms_normalised, to_images, to_video
from genstream.vae.protocol import RGB

_RMS_EPS = 1e-8


def _over_time(inputs: int, outputs: int, kernel: int, causal: bool, groups: int = 1) -> nn.Module:
    """Convolution over space and time; a kernel of 1 sees no other frame either way."""
    if kernel == 1:
        return nn.Conv3d(inputs, outputs, 1, groups=groups)
    layer = CausalConv3d if causal else CentredConv3d
    return layer(inputs, outputs, kernel, groups=groups)


class DenseConv(nn.Module):
    """3-D convolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int, causal: bool) -> None:
        super().__init__()
        self.conv = _over_time(inputs, outputs, kernel, causal)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, C, F, h, w] to [B, C', F, h, w]."""
        return memory(self.conv, x)


class SeparableConv(nn.Module):
    """3-D convolution of each channel by itself, then one over channels."""

    def __init__(self, inputs: int, outputs: int, kernel: int, causal: bool) -> None:
        super().__init__()
        self.depthwise_conv = _over_time(inputs, inputs, kernel, causal, groups=inputs)
        self.pointwise_conv = nn.Conv3d(inputs, outputs, 1)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, C, F, h, w] to [B, C', F, h, w]."""
        y: Tensor = self.pointwise_conv(memory(self.depthwise_conv, x))
        return y


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels of every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, h, w], same shape."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ResnetBlock(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(
        self, config: FrozenDict, inputs: int, outputs: int, separable: bool, first: nn.Module
    ) -> None:
        super().__init__()
        self.activation = first
        self.conv1 = _conv(config, inputs, outputs, separable)
        self.conv2 = _conv(config, outputs, outputs, separable)
        self.widens = inputs != outputs
        if self.widens:
            self.norm3 = ChannelLayerNorm(inputs, eps=config.resnet_norm_eps)
            layer = SeparableConv if separable else DenseConv
            self.conv_shortcut = layer(inputs, outputs, 1, causal=False)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, C, F, h, w] to [B, C', F, h, w]."""
        first = self.conv1(self.activation(rms_normalised(x, _RMS_EPS)), memory)
        hidden: Tensor = self.conv2(F.silu(rms_normalised(first, _RMS_EPS)), memory)
        shortcut: Tensor = self.conv_shortcut(self.norm3(x), memory) if self.widens else x
        return shortcut + hidden


class DecoupledPixelShuffle(nn.Module):
    """Doubles height and width, and multiplies frames by `frames`: over time by a reshape, then in space."""

    def __init__(self, config: FrozenDict, channels: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.surplus = 0 if config.is_video_dc_ae else frames - 1
        self.conv = DenseConv(channels, channels * frames * 4, 3, config.decoder_causal)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, C, F, h, w] to [B, C, frames * F, 2h, 2w], less the surplus at the start of a stream."""
        channels: Tensor = self.conv(x, memory).unflatten(1, (-1, self.frames))  # [B, 4C, s, F, h, w]
        images = channels.permute(0, 3, 2, 1, 4, 5).flatten(1, 2)  # [B, F*s, 4C, h, w]
        video = F.pixel_shuffle(images, 2).transpose(1, 2)
        return video[:, :, self.surplus if memory.at_start else 0 :]


class MidBlock(nn.Module):
    """Residual blocks at the smallest size."""

    def __init__(self, config: FrozenDict, channels: int) -> None:
        super().__init__()
        separable = config.decoder_is_dw_conv[-1]
        self.resnets = nn.ModuleList(
            ResnetBlock(config, channels, channels, separable, nn.SiLU())
            for _ in range(config.decoder_layers_per_block[-1])
        )

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, C, T, h, w], same shape."""
        for block in self.resnets:
            x = block(x, memory)
        return x


class UpBlock(nn.Module):
    """One level of the decoder; `level` counts from the frames, as the configuration's lists do."""

    def __init__(self, config: FrozenDict, level: int) -> None:
        super().__init__()
        widths = config.decoder_block_out_channels
        inputs, channels = widths[min(level + 1, len(widths) - 1)], widths[level]
        separable, grows = config.decoder_is_dw_conv[level], config.spatio_temporal_scaling[level]
        self.has_conv_in = inputs != channels
        if self.has_conv_in:
            self.conv_in = ResnetBlock(config, inputs, channels, separable, nn.SiLU())
        frames = 1 if config.decoder_spatio_only[level] else 2
        upsamplers = [DecoupledPixelShuffle(config, channels, frames)] if grows else []
        self.upsamplers = nn.ModuleList(upsamplers)
        self.resnets = nn.ModuleList(
            ResnetBlock(config, channels, channels, separable, nn.ReLU() if grows else nn.SiLU())
            for _ in range(config.decoder_layers_per_block[level])
        )

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, C, F, h, w] to the next level's shape."""
        if self.has_conv_in:
            x = self.conv_in(x, memory)
        for layer in (*self.upsamplers, *self.resnets):
            x = layer(x, memory)
        return x


class PixelShuffle2d(nn.Module):
    """Doubles height and width for a quarter of the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, h, w] to [B, C/4, F, 2h, 2w]."""
        return to_video(F.pixel_shuffle(self.conv(to_images(x)), 2), x.shape[0])


class TurboDecoder(nn.Module):
    """Raw latents to frames."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        widths = config.decoder_block_out_channels
        self.conv_in = DenseConv(config.latent_channels, widths[-1], 3, config.decoder_causal)
        self.mid_block = MidBlock(config, widths[-1])
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(range(len(widths))))
        self.has_patches = config.patch_size == 4
        if self.has_patches:
            self.upsampler2d_1 = PixelShuffle2d(widths[0])
            self.upsampler2d_2 = PixelShuffle2d(widths[0] // 4)
        self.conv_out = DenseConv(widths[0] // config.patch_size**2, RGB, 3, config.decoder_causal)

    def forward(self, latents: Tensor, memory: Memory) -> Tensor:
        """[B, C, T, h, w] to [B, 3, F, H, W]."""
        x = self.mid_block(self.conv_in(latents, memory), memory)
        for block in self.up_blocks:
            x = block(x, memory)
        if self.has_patches:
            x = self.upsampler2d_1(F.silu(rms_normalised(x, _RMS_EPS)))
            x = self.upsampler2d_2(F.silu(rms_normalised(x, _RMS_EPS)))
        y: Tensor = self.conv_out(F.silu(rms_normalised(x, _RMS_EPS)), memory)
        return y


def _conv(config: FrozenDict, inputs: int, outputs: int, separable: bool) -> nn.Module:
    """A residual block's convolution."""
    if separable:
        return SeparableConv(inputs, outputs, config.decoder_dw_kernel_size, config.depthwise_causal)
    return DenseConv(inputs, outputs, 3, config.decoder_causal)


def reach_latents(decoder: nn.Module) -> tuple[int, int]:
    """Latent frames back and ahead that a frame depends on. Layers are registered in their order."""
    back, ahead, rate, growth = 0.0, 0.0, 1, 1
    for layer in decoder.modules():
        if isinstance(layer, DecoupledPixelShuffle):
            growth = layer.frames
        elif isinstance(layer, CausalConv3d | CentredConv3d):
            side = layer.kernel_size[0] // 2 / rate
            back += side if isinstance(layer, CentredConv3d) else 2 * side
            ahead += side if isinstance(layer, CentredConv3d) else 0
            # A shuffle's frames come out of the convolution in it, which is the next one.
            rate, growth = rate * growth, 1
    return math.ceil(back), math.ceil(ahead)
