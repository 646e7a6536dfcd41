"""Encoder and decoder of the causal video VAE: those of an image VAE, with causal 3-D convolutions.

Layers are named as in diffusers' AutoencoderKL, so that its weights find their place by name.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genstream.vae.layers import (
    BlendedDownsample,
    BlendedUpsample,
    CausalConv3d,
    ChannelNorm,
    FrameConv,
    FrameGroupNorm,
    Memory,
    to_images,
    to_video,
)
from genstream.vae.protocol import RGB

_NORM_EPS = 1e-6

Norm = Literal["group", "channel"]


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """What encoder and decoder are made of. Level 0 has the size of the frames, each next one half of it.

    Attributes:
        channels: of each level.
        layers_per_block: residual blocks of an encoder level; the decoder has one more.
        temporal_levels: for each level but the last, whether the frame rate halves behind it too.
        temporal_kernels: for each level, 3 for causal 3-D convolutions or 1 for 2-D ones.
        norm: "group" over each frame, as image VAEs have, or "channel", which tiles in space do not change.
        norm_groups: groups of "group".
        attention: whether the frames of the last level have self-attention.
    """

    channels: tuple[int, ...]
    layers_per_block: int
    temporal_levels: tuple[bool, ...]
    temporal_kernels: tuple[int, ...]
    norm: Norm
    norm_groups: int
    attention: bool

    def conv(self, inputs: int, outputs: int, level: int) -> nn.Module:
        """3x3 convolution of a level, causal in time where the level has a temporal kernel."""
        if self.temporal_kernels[level] == 1:
            return FrameConv(inputs, outputs, 3, padding=1)
        return CausalConv3d(inputs, outputs)

    def normalisation(self, channels: int) -> nn.Module:
        """A normalisation that keeps frames apart."""
        if self.norm == "channel":
            return ChannelNorm(channels, _NORM_EPS)
        return FrameGroupNorm(self.norm_groups, channels, eps=_NORM_EPS)


class ResnetBlock(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, settings: NetworkSettings, inputs: int, outputs: int, level: int) -> None:
        super().__init__()
        self.norm1 = settings.normalisation(inputs)
        self.conv1 = settings.conv(inputs, outputs, level)
        self.norm2 = settings.normalisation(outputs)
        self.conv2 = settings.conv(outputs, outputs, level)
        self.conv_shortcut = FrameConv(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, C, F, h, w] to [B, C', F, h, w]."""
        hidden = memory(self.conv1, F.silu(self.norm1(x)))
        hidden = memory(self.conv2, F.silu(self.norm2(hidden)))
        shortcut: Tensor = self.conv_shortcut(x)
        return shortcut + hidden


class FrameAttention(nn.Module):
    """Self-attention among the pixels of each frame."""

    def __init__(self, settings: NetworkSettings, channels: int) -> None:
        super().__init__()
        self.group_norm = settings.normalisation(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, h, w], same shape."""
        pixels = to_images(self.group_norm(x)).flatten(2).transpose(1, 2)  # [B*F, h*w, C]
        # The head axis of length 1 lets every attention backend take it.
        q, k, v = (layer(pixels).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))
        mixed = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        images = mixed.transpose(1, 2).unflatten(2, x.shape[3:])  # [B*F, C, h, w]
        return x + to_video(images, x.shape[0])


class TextAttention(nn.Module):
    """Cross-attention from pixels to the tokens of a caption (Cross-modal Video VAE, 2412.17805).

    One more key and value of zeros stand beside the tokens: with no token at all the output is the input, bit
    for bit. The last layer starts at zero, so that adding the module to a trained decoder changes nothing.
    """

    def __init__(self, settings: NetworkSettings, channels: int, text_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = settings.normalisation(channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(text_dim, channels, bias=False)
        self.to_v = nn.Linear(text_dim, channels, bias=False)
        self.to_out = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """[B, C, F, h, w], same shape; tokens [B, L, D], and a mask [B, L] that is 0 where there is none."""
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, F*h*w, C]
        q = self._split(self.to_q(pixels))
        k, v = (F.pad(self._split(layer(text)), (0, 0, 0, 1)) for layer in (self.to_k, self.to_v))
        visible = F.pad(mask != 0, (0, 1), value=True)[:, None, None]  # [B, 1, 1, L + 1]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        told: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2)).transpose(1, 2)  # [B, C, F*h*w]
        return x + told.reshape(x.shape)

    def _split(self, tokens: Tensor) -> Tensor:
        """[B, L, C] to [B, N, L, D]."""
        heads: Tensor = tokens.unflatten(2, (self.heads, -1))
        return heads.transpose(1, 2)


class MidBlock(nn.Module):
    """Residual block, attention if wanted, residual block, at the smallest size."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        last, channels = len(settings.channels) - 1, settings.channels[-1]
        self.resnets = nn.ModuleList(ResnetBlock(settings, channels, channels, last) for _ in range(2))
        attentions = [FrameAttention(settings, channels)] if settings.attention else []
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, C, F, h, w], same shape."""
        first, last = self.resnets
        x = first(x, memory)
        for attention in self.attentions:
            x = attention(x)
        y: Tensor = last(x, memory)
        return y


class HalvedSize(nn.Module):
    """Halves height and width by a strided convolution, padded at the bottom and the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FrameConv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, h, w] to [B, C, F, h/2, w/2]."""
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return y


class DoubledSize(nn.Module):
    """Doubles height and width: nearest pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FrameConv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, h, w] to [B, C, F, 2h, 2w]."""
        y: Tensor = self.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))
        return y


class DownBlock(nn.Module):
    """One level of the encoder and the way to the next."""

    def __init__(self, settings: NetworkSettings, level: int) -> None:
        super().__init__()
        channels = settings.channels[level]
        widths = [settings.channels[max(0, level - 1)]] + [channels] * settings.layers_per_block
        self.resnets = nn.ModuleList(
            ResnetBlock(settings, inputs, outputs, level) for inputs, outputs in pairwise(widths)
        )
        is_last = level == len(settings.channels) - 1
        self.downsamplers = nn.ModuleList([] if is_last else [HalvedSize(channels)])
        slower = not is_last and settings.temporal_levels[level]
        self.temporal = BlendedDownsample(channels) if slower else nn.Identity()

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, C, F, h, w] to the next level's shape."""
        for block in self.resnets:
            x = block(x, memory)
        for downsampler in self.downsamplers:
            x = downsampler(x)
        return memory(self.temporal, x)


class UpBlock(nn.Module):
    """One level of the decoder and the way to the next larger one."""

    def __init__(self, settings: NetworkSettings, level: int) -> None:
        super().__init__()
        last = len(settings.channels) - 1
        channels = settings.channels[level]
        widths = [settings.channels[min(last, level + 1)]] + [channels] * (settings.layers_per_block + 1)
        self.resnets = nn.ModuleList(
            ResnetBlock(settings, inputs, outputs, level) for inputs, outputs in pairwise(widths)
        )
        # Time before space, which is where the convolution in time costs a quarter.
        faster = level > 0 and settings.temporal_levels[level - 1]
        self.temporal = nn.ModuleList([BlendedUpsample(channels)] if faster else [])
        self.upsamplers = nn.ModuleList([] if level == 0 else [DoubledSize(channels)])

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, C, F, h, w] to the next level's shape."""
        for block in self.resnets:
            x = block(x, memory)
        for temporal in self.temporal:
            x = temporal(x, memory)
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


class Encoder(nn.Module):
    """Frames to the moments of latents."""

    def __init__(self, settings: NetworkSettings, outputs: int) -> None:
        super().__init__()
        last = len(settings.channels) - 1
        self.conv_in = settings.conv(RGB, settings.channels[0], 0)
        self.down_blocks = nn.ModuleList(DownBlock(settings, level) for level in range(last + 1))
        self.mid_block = MidBlock(settings)
        self.conv_norm_out = settings.normalisation(settings.channels[-1])
        self.conv_out = settings.conv(settings.channels[-1], outputs, last)

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last layer, where the gradients of losses are compared."""
        weight = self.conv_out.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, frames: Tensor, memory: Memory) -> Tensor:
        """[B, 3, F, H, W] to [B, outputs, T, h, w]."""
        x = memory(self.conv_in, frames)
        for block in self.down_blocks:
            x = block(x, memory)
        x = self.mid_block(x, memory)
        return memory(self.conv_out, F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents to frames, following a caption where it has the module for one."""

    def __init__(
        self, settings: NetworkSettings, inputs: int, text_dim: int | None = None, text_heads: int = 4
    ) -> None:
        super().__init__()
        last, channels = len(settings.channels) - 1, settings.channels[-1]
        self.conv_in = settings.conv(inputs, channels, last)
        self.mid_block = MidBlock(settings)
        attentions = [] if text_dim is None else [TextAttention(settings, channels, text_dim, text_heads)]
        self.text_attentions = nn.ModuleList(attentions)
        self.up_blocks = nn.ModuleList(UpBlock(settings, level) for level in range(last, -1, -1))
        self.conv_norm_out = settings.normalisation(settings.channels[0])
        self.conv_out = settings.conv(settings.channels[0], RGB, 0)

    def forward(self, latents: Tensor, memory: Memory, text: Tensor, mask: Tensor) -> Tensor:
        """[B, C, T, h, w] to [B, 3, F, H, W]; tokens [B, L, D] and their mask [B, L]."""
        x = self.mid_block(memory(self.conv_in, latents), memory)
        for attention in self.text_attentions:
            x = attention(x, text, mask)
        for block in self.up_blocks:
            x = block(x, memory)
        return memory(self.conv_out, F.silu(self.conv_norm_out(x)))


@torch.no_grad()
def inflate(image_network: nn.Module, video_network: nn.Module) -> list[str]:
    """Tail initialisation (OD-VAE): a 2-D kernel becomes the last time slice of the 3-D one, zeros before.

    Returns:
        Names of the video network's weights that the image network has none for.
    """
    values = video_network.state_dict()
    for name, weight in image_network.state_dict().items():
        if name not in values:
            raise ValueError(f"image_vae has weights that the video VAE has no place for: {name}")
        tail = values[name][:, :, -1] if values[name].dim() > weight.dim() else values[name]
        if tail.shape != weight.shape:
            raise ValueError(f"{name} must have the shape {list(tail.shape)}, got {list(weight.shape)}")
        values[name].zero_()
        tail.copy_(weight)
    return sorted(set(values) - set(image_network.state_dict()))
