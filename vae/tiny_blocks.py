"""Layers of the TAEHV architecture and how its published variants stack them.

Everything works on images [B*F, C, h, w] in channels last order: 4 times faster on CPU than contiguous.
The position of a layer in its stack is its published key name.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genstream.vae.protocol import RGB

STAGES = 3
BLOCKS_PER_STAGE = 3
HALVING = 2
"""How much an encoder stage shrinks height and width."""

BlockKind = Literal["base", "wide", "super"]


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class SoftClamp(nn.Module):
    """Bounds latents smoothly to [-3, 3]."""

    def forward(self, x: Tensor) -> Tensor:
        """3 tanh(x / 3), elementwise."""
        return 3 * torch.tanh(x / 3)


class MemBlock(nn.Module):
    """Residual block over a frame and the frame before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = self._layers(channels)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Advance by the frames in `x`.

        Args:
            x: [B*F, C, h, w].
            past: [B, C, h, w], the input frame before `x`, zeros at the start of a stream.

        Returns:
            Output like `x`, and the input frame to remember, like `past`.
        """
        # Channels last all along, so that both concatenations copy whole contiguous rows.
        now = x.permute(0, 2, 3, 1).unflatten(0, (past.shape[0], -1))  # [B, F, h, w, C]
        first = past.to(x.dtype).permute(0, 2, 3, 1).unsqueeze(1)  # [B, 1, h, w, C]
        before = torch.cat([first, now[:, :-1]], dim=1)
        both = torch.cat([now, before], dim=-1).flatten(0, 1).permute(0, 3, 1, 2)  # [B*F, 2C, h, w]
        # Detached: the memory of an endless stream must not hold an endless graph.
        remembered = now[:, -1].detach().to(past.dtype, copy=True).permute(0, 3, 1, 2)
        return self._activate(self.conv(both) + x), remembered

    def _layers(self, channels: int) -> nn.Sequential:
        return nn.Sequential(
            _conv(2 * channels, channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels),
        )

    def _activate(self, x: Tensor) -> Tensor:
        return F.relu(x)


class WideMemBlock(MemBlock):
    """`MemBlock` of the wide variant: 1x1 convolutions mix channels, grouped 3x3 ones mix pixels."""

    def _layers(self, channels: int) -> nn.Sequential:
        groups = max(1, channels // 64)
        return nn.Sequential(
            nn.Conv2d(2 * channels, channels, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, groups=groups),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, groups=groups),
        )


class SuperMemBlock(MemBlock):
    """`MemBlock` of the super variant: depthwise 7x7, then two 1x1 around the only rectifier."""

    def _layers(self, channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(2 * channels, 2 * channels, 7, padding=3, groups=2 * channels, bias=False),
            nn.Conv2d(2 * channels, 4 * channels, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * channels, channels, 1, bias=False),
        )

    def _activate(self, x: Tensor) -> Tensor:
        return x


_BLOCKS: dict[BlockKind, type[MemBlock]] = {"base": MemBlock, "wide": WideMemBlock, "super": SuperMemBlock}


class TemporalPool(nn.Module):
    """Merges each group of `stride` frames into one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels * stride, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B*F, C, h, w] to [B*F/stride, C, h, w]; the oldest frame's channels come first."""
        groups = x.permute(0, 2, 3, 1).unflatten(0, (-1, self.stride))  # [N, s, h, w, C]
        stacked = groups.permute(0, 2, 3, 1, 4).flatten(3).permute(0, 3, 1, 2)  # [N, s*C, h, w]
        pooled: Tensor = self.conv(stacked)
        return pooled


class TemporalGrow(nn.Module):
    """Turns one frame into `stride` frames, each `spatial_stride` times as high and wide.

    Published weights come from a nearest upsampling followed by a 1x1 convolution. Both commute exactly, and
    the convolution costs a quarter when it goes first.
    """

    def __init__(self, channels: int, stride: int, spatial_stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.spatial_stride = spatial_stride
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B*F, C, h, w] to [B*F*stride, C, s*h, s*w]; the oldest frame's channels come first."""
        grown = self.conv(x).permute(0, 2, 3, 1).unflatten(3, (self.stride, -1))  # [N, h, w, s, C]
        frames: Tensor = grown.permute(0, 3, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)  # [N*s, C, h, w]
        if self.spatial_stride == 1:
            return frames
        return F.interpolate(frames, scale_factor=float(self.spatial_stride), mode="nearest")


def encoder_layers(
    patch_size: int, width: int, latent_channels: int, strides: Sequence[int], kind: BlockKind
) -> nn.Sequential:
    """Images [B*F, 3 p^2, H/p, W/p] to latents [B*T, C, h, w]."""
    layers: list[nn.Module] = [_conv(RGB * patch_size**2, width), nn.ReLU(inplace=True)]
    for stride in strides:
        layers.append(TemporalPool(width, stride))
        layers.append(nn.Conv2d(width, width, 3, stride=HALVING, padding=1, bias=False))
        layers.extend(_BLOCKS[kind](width) for _ in range(BLOCKS_PER_STAGE))
    layers.append(_conv(width, latent_channels))
    return nn.Sequential(*layers)


def decoder_layers(
    patch_size: int,
    widths: Sequence[int],
    latent_channels: int,
    strides: Sequence[int],
    spatial_strides: Sequence[int],
    blocks: Sequence[int],
    kind: BlockKind,
) -> nn.Sequential:
    """Latents [B*T, C, h, w] to images [B*F, 3 p^2, H/p, W/p]."""
    layers: list[nn.Module] = []
    if kind == "super":
        layers.append(nn.Conv2d(latent_channels, widths[0], 1, bias=False))
    else:
        layers += [SoftClamp(), _conv(latent_channels, widths[0]), nn.ReLU(inplace=True)]
    for stage, (stride, spatial_stride) in enumerate(zip(strides, spatial_strides, strict=True)):
        width, next_width = widths[stage], widths[stage + 1]
        layers.extend(_BLOCKS[kind](width) for _ in range(blocks[stage]))
        if kind == "super":
            layers += [_conv(width, spatial_stride**2 * next_width), nn.ReLU(inplace=True)]
            layers += [nn.PixelShuffle(spatial_stride), TemporalGrow(next_width, stride, 1)]
        else:
            # The published layout has its upsampling at the first of these places.
            layers += [nn.Identity(), TemporalGrow(width, stride, spatial_stride)]
            layers.append(nn.Conv2d(width, next_width, 3, padding=1, bias=False))
    if kind != "super":
        layers.append(nn.ReLU(inplace=True))
    layers.append(_conv(widths[-1], RGB * patch_size**2))
    return nn.Sequential(*layers)
