"""Layers of the Wan video VAEs (https://github.com/Wan-Video), with what they remember held by the caller.

Tensors are [B, C, F, h, w]. Every convolution over time looks back only, at the last frames of its own
input; a `Pass` hands it those of the chunk before. Frames of a chunk are worked off together, and a stream's
start differs in three places only: upsampling, downsampling and the shortcuts around them let the first frame
through alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genstream.vae.layers import convolve

SCALE = 2
"""How much one resampling changes height and width."""
TIME_KERNEL = (3, 1, 1)


class CausalConv3d(nn.Conv3d):
    """3-D convolution that sees the present and the past; `slot` names its memory, once it is in a VAE."""

    def __init__(
        self, inputs: int, outputs: int, kernel_size: tuple[int, int, int] = (3, 3, 3), stride: int = 1
    ) -> None:
        padding = (0, kernel_size[1] // 2, kernel_size[2] // 2)
        super().__init__(inputs, outputs, kernel_size, stride=(stride, 1, 1), padding=padding)
        self.memory_frames = kernel_size[0] - stride
        self.slot = ""

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Advance by the frames in `x`.

        Args:
            x: [B, C, F, h, w].
            past: [B, C, memory_frames, h, w], the input before `x`, zeros at the start of a stream.

        Returns:
            Output [B, C', F / stride, h, w], and a view of the input to remember, like `past`.
        """
        both = torch.cat([past.to(x.dtype), x], dim=2)
        return convolve(self, both), both[:, :, -self.memory_frames :]


@dataclass(kw_only=True)
class Pass:
    """One chunk's way through the layers.

    Attributes:
        past: what the chunk before left behind, by slot.
        at_start: the chunk is the first of its stream.
        remembered: what this chunk leaves behind; complete when it is through.
    """

    past: Mapping[str, Tensor]
    at_start: bool
    remembered: dict[str, Tensor] = field(default_factory=dict)

    def through(self, layers: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Apply `layers` one after the other."""
        for layer in layers:
            if isinstance(layer, CausalConv3d):
                x = self.convolve(layer, x, self.past[layer.slot])
            elif isinstance(layer, StreamingLayer):
                x = layer(x, self)
            else:
                x = layer(x)
        return x

    def convolve(self, layer: CausalConv3d, x: Tensor, past: Tensor) -> Tensor:
        """Apply `layer` behind `past`; without frames in `x`, `past` is all that it remembers."""
        if x.shape[2] == 0:
            self._remember(layer, past)
            return x
        y: Tensor
        y, remembered = layer(x, past)
        self._remember(layer, remembered)
        return y

    def _remember(self, layer: CausalConv3d, frames: Tensor) -> None:
        # Detached: the memory of an endless stream must not hold an endless graph. Copied: nor whole chunks.
        dtype = self.past[layer.slot].dtype
        self.remembered[layer.slot] = frames.detach().to(dtype, copy=True)


class StreamingLayer(nn.Module):
    """A layer that holds causal convolutions: its `forward` takes the `Pass` besides the frames."""


class RMSNorm(nn.Module):
    """x / ||x|| sqrt(C) gamma over channels, for features of `dimensions` besides batch and channels."""

    def __init__(self, channels: int, dimensions: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dimensions))

    def forward(self, x: Tensor) -> Tensor:
        """Like `x`."""
        y: Tensor = F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma
        return y


class ResidualBlock(StreamingLayer):
    """Two causal convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(inputs),
            nn.SiLU(),
            CausalConv3d(inputs, outputs),
            RMSNorm(outputs),
            nn.SiLU(),
            # Dropout in the published layout.
            nn.Identity(),
            CausalConv3d(outputs, outputs),
        )
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv3d(inputs, outputs, 1)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """[B, C, F, h, w] to [B, C', F, h, w]."""
        y: Tensor = run.through(self.residual, x) + self.shortcut(x)
        return y


def _each_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2-D layer to [B, C, F, h, w]."""
    images = layer(x.transpose(1, 2).flatten(0, 1))
    video: Tensor = images.unflatten(0, (x.shape[0], -1))
    return video.transpose(1, 2)


class FrameAttention(nn.Module):
    """Single-head self-attention over the pixels of each frame alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, dimensions=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Like `x` [B, C, F, h, w]."""
        return x + _each_frame(nn.Sequential(self.norm, self.to_qkv, _Attend(), self.proj), x)


class _Attend(nn.Module):
    def forward(self, qkv: Tensor) -> Tensor:
        """[N, 3C, h, w] to [N, C, h, w]."""
        tokens = qkv.flatten(2).transpose(1, 2).unsqueeze(1)  # [N, 1, L, 3C]
        q, k, v = tokens.chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # [N, L, C]
        images: Tensor = attended.transpose(1, 2).unflatten(2, (*qkv.shape[2:],))
        return images


class Downsample(StreamingLayer):
    """Halves height and width, and with `stride` 2 the frames that follow a stream's first."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=SCALE)
        )
        self.time_conv = None if stride == 1 else CausalConv3d(channels, channels, TIME_KERNEL, stride)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """[B, C, F, h, w] to [B, C, F', h/2, w/2]; F is 1 + a multiple of `stride` at the start."""
        x = _each_frame(self.resample, x)
        if self.time_conv is None:
            return x
        if not run.at_start:
            return run.convolve(self.time_conv, x, run.past[self.time_conv.slot])
        # The first frame passes as it is, and is the past of those that follow.
        first = x[:, :, :1]
        return torch.cat([first, run.convolve(self.time_conv, x[:, :, 1:], first)], dim=2)


class Upsample(StreamingLayer):
    """Doubles height and width, and with `stride` 2 the frames that follow a stream's first."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.time_conv = None if stride == 1 else CausalConv3d(channels, stride * channels, TIME_KERNEL)
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=float(SCALE)), nn.Conv2d(channels, outputs, 3, padding=1)
        )

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """[B, C, F, h, w] to [B, C', F', 2h, 2w]."""
        if self.time_conv is not None:
            x = self._grow(self.time_conv, x, run)
        return _each_frame(self.resample, x)

    def _grow(self, time_conv: CausalConv3d, x: Tensor, run: Pass) -> Tensor:
        # The first frame passes as it is, and the frames that follow never see it: their past is zeros.
        passed, x = (x[:, :, :1], x[:, :, 1:]) if run.at_start else (x[:, :, :0], x)
        grown = run.convolve(time_conv, x, run.past[time_conv.slot])
        stride = time_conv.out_channels // time_conv.in_channels
        if x.shape[2] > 0:
            grown = grown.unflatten(1, (stride, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return torch.cat([passed, grown], dim=2)


def average_down(x: Tensor, outputs: int, stride: int, scale: int) -> Tensor:
    """Shortcut without weights: [B, C, F, h, w] to [B, outputs, F/stride, h/scale, w/scale] by means.

    Missing frames in front of a stream's first count as zeros.
    """
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % stride, 0))
    x = x.unflatten(4, (-1, scale)).unflatten(3, (-1, scale)).unflatten(2, (-1, stride))
    stacked = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)  # [B, C*stride*scale^2, F', h', w']
    groups: Tensor = stacked.unflatten(1, (outputs, -1))
    return groups.mean(dim=2)


def duplicate_up(x: Tensor, outputs: int, stride: int, scale: int) -> Tensor:
    """Shortcut without weights: [B, C, F, h, w] to [B, outputs, stride F, scale h, scale w] by copies."""
    x = x.repeat_interleave(outputs * stride * scale**2 // x.shape[1], dim=1)
    x = x.unflatten(1, (outputs, stride, scale, scale)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class DownStage(StreamingLayer):
    """Encoder stage of Wan 2.2: residual blocks, then downsampling but in the last, around a shortcut."""

    def __init__(self, blocks: list[nn.Module], outputs: int, stride: int, scale: int) -> None:
        super().__init__()
        self.outputs, self.stride, self.scale = outputs, stride, scale
        self.downsamples = nn.ModuleList(blocks)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """[B, C, F, h, w] to [B, C', F', h/scale, w/scale]."""
        return run.through(self.downsamples, x) + average_down(x, self.outputs, self.stride, self.scale)


class UpStage(StreamingLayer):
    """Decoder stage of Wan 2.2: residual blocks, then upsampling around a shortcut, neither in the last."""

    def __init__(self, blocks: list[nn.Module], outputs: int, stride: int, scale: int) -> None:
        super().__init__()
        self.outputs, self.stride, self.scale = outputs, stride, scale
        self.upsamples = nn.ModuleList(blocks)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """[B, C, F, h, w] to [B, C', F', scale h, scale w]."""
        y = run.through(self.upsamples, x)
        if self.scale == 1:
            return y
        copies = duplicate_up(x, self.outputs, self.stride, self.scale)
        # A stream's first frame is one frame, not a group of them.
        return y + (copies[:, :, self.stride - 1 :] if run.at_start else copies)
