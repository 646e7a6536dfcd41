"""Layers of causal video networks. Those that look back in time get their past and return the next one.

Video is [B, C, F, h, w]. The past of a layer is empty at the start of a stream; the first frame then stands
in for the missing ones, as if the video had stood still before (OD-VAE, 2409.01199). An image is the first
frame of such a video.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SLOW_IN_3D = 20480
_FIRST_BLEND = 2.0  # sigmoid(2) = 0.88 of the average, as in OD-VAE


class Remembering(nn.Module):
    """Marks layers with forward(x, past) -> (y, next past)."""


def remembering_layers(network: nn.Module) -> dict[nn.Module, str]:
    """The layers of a network that have a past, with their names."""
    return {layer: name for name, layer in network.named_modules() if isinstance(layer, Remembering)}


class Memory:
    """The pasts of one network during one step: handed to the layers, collected from them.

    Attributes:
        slots: what the layers that have run remember, by name.
        at_start: whether no layer has a past.
    """

    def __init__(self, network: nn.Module, past: Mapping[str, Tensor]) -> None:
        self._names = remembering_layers(network)
        self._past = past
        self.slots: dict[str, Tensor] = {}
        self.at_start = all(past[name].numel() == 0 for name in self._names.values())

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The output of a layer, with its past if it has one."""
        name = self._names.get(layer)
        if name is None:
            y: Tensor = layer(x)
            return y
        y, self.slots[name] = layer(x, self._past[name])
        return y


def with_past(x: Tensor, past: Tensor, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    """Put in front of `x` [B, C, F, h, w] what a causal kernel over `kernel` frames needs.

    Returns:
        The longer video, and its last kernel - stride frames for the next step, in the dtype of `past`.
    """
    before = x[:, :, :1].expand(-1, -1, kernel - 1, -1, -1) if past.numel() == 0 else past.to(x.dtype)
    video = torch.cat([before, x], dim=2)
    kept = video[:, :, video.shape[2] - (kernel - stride) :]
    # A copy, because a view would keep the whole video alive.
    return video, kept.to(past.dtype, copy=True)


def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """`conv`, which does not pad in time, of [B, C, F, h, w].

    On CPUs PyTorch runs small 3-D convolutions without oneDNN: a chunk of 16 channels at 64x64 takes 33 ms,
    4 times as long as a 2-D convolution whose channels are all that the kernel sees of time (torch 2.13).
    """
    if not _is_slow_in_3d(conv, x):
        return nn.Conv3d.forward(conv, x)
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    ends = x.shape[2] - kernel + 1
    seen = torch.cat([x[:, :, first : first + ends : stride] for first in range(kernel)], dim=1)
    weight = conv.weight.transpose(1, 2).flatten(1, 2)  # [C', kernel * C, k, k]
    side = conv.kernel_size[1] // 2
    return to_video(F.conv2d(to_images(seen), weight, conv.bias, padding=side), x.shape[0])


def _is_slow_in_3d(conv: nn.Conv3d, x: Tensor) -> bool:
    """PyTorch's own rule for leaving oneDNN out (`use_mkldnn` in aten/src/ATen/native/Convolution.cpp)."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and conv.groups == 1
        and x.shape[0] == 1
        and x.shape[1] * x.shape[2] * x.shape[3] <= _SLOW_IN_3D
    )


class CausalConv3d(Remembering, nn.Conv3d):
    """3-D convolution that never looks ahead in time; zero padding in space keeps height and width."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, *, groups: int = 1) -> None:
        side = kernel // 2
        super().__init__(inputs, outputs, kernel, padding=(0, side, side), groups=groups)

    def forward(  # type: ignore[override]
        self, x: Tensor, past: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[B, C, F, h, w] to the same number of frames, and the last `kernel - 1` inputs."""
        video, kept = with_past(x, past, self.kernel_size[0], stride=1)
        return convolve(self, video), kept


class CentredConv3d(nn.Conv3d):
    """3-D convolution that looks as far ahead as back in time; copies of the outer frames stand in beyond."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, *, groups: int = 1) -> None:
        side = kernel // 2
        super().__init__(inputs, outputs, kernel, padding=(0, side, side), groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, h, w] to the same number of frames."""
        beyond = self.kernel_size[0] // 2
        return convolve(self, F.pad(x, (0, 0, 0, 0, beyond, beyond), mode="replicate"))


class FrameConv(nn.Conv2d):
    """2-D convolution of every frame by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, h, w] to [B, C', F, h', w']."""
        return to_video(super().forward(to_images(x)), x.shape[0])


class FrameGroupNorm(nn.GroupNorm):
    """Group normalisation of every frame by itself: over time it would let the past see the future."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, h, w], same shape."""
        return to_video(super().forward(to_images(x)), x.shape[0])


class ChannelNorm(nn.Module):
    """RMS normalisation over the channels of every pixel by itself, which tiles in space do not change."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, h, w], same shape."""
        return rms_normalised(x, self.eps) * self.weight.view(-1, 1, 1, 1)


class CausalInterpolation(Remembering):
    """Doubles the frame rate linearly between a frame and the one before it; the first frame stays one."""

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, F, h, w] to 2F frames, at the start of a stream 2F - 1, and the last input frame."""
        video, kept = with_past(x, past, kernel=2, stride=1)
        between = (video[:, :, :-1] + video[:, :, 1:]) / 2
        frames = torch.stack([between, x], dim=3).flatten(2, 3)
        return frames[:, :, 1 if past.numel() == 0 else 0 :], kept


class BlendedDownsample(Remembering):
    """Halves the frame rate by a learned blend of average and convolution over three frames (OD-VAE).

    1 + 2k frames become 1 + k at the start of a stream, 2k become k afterwards.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blend = nn.Parameter(torch.tensor([_FIRST_BLEND]))
        self.conv = nn.Conv3d(channels, channels, 3, stride=(2, 1, 1), padding=(0, 1, 1))
        pass_last_frame(self.conv)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, F, h, w] to half the frames, and the last input frame."""
        video, kept = with_past(x, past, kernel=3, stride=2)
        average = (video[:, :, :-2:2] + video[:, :, 1:-1:2] + video[:, :, 2::2]) / 3
        return _blended(average, convolve(self.conv, video), self.blend), kept


class BlendedUpsample(nn.Module):
    """Doubles the frame rate by a learned blend of interpolation and a convolution over it (OD-VAE)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blend = nn.Parameter(torch.tensor([_FIRST_BLEND]))
        self.interpolation = CausalInterpolation()
        self.conv = CausalConv3d(channels, channels)
        pass_last_frame(self.conv)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """[B, C, F, h, w] to 2F frames, at the start of a stream 2F - 1."""
        smooth = memory(self.interpolation, x)
        sharp = memory(self.conv, smooth)
        return _blended(smooth, sharp, self.blend)


def _blended(average: Tensor, detail: Tensor, logit: Tensor) -> Tensor:
    # In this form the blend of two equal frames is that frame, bit for bit.
    return detail + torch.sigmoid(logit) * (average - detail)


@torch.no_grad()
def pass_last_frame(conv: nn.Conv3d) -> None:
    """Set a convolution's weights such that its output is the last frame it sees."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    _, _, _, height, width = conv.weight.shape
    conv.weight[:, :, -1, height // 2, width // 2] = torch.eye(*conv.weight.shape[:2])


def rms_normalised(x: Tensor, eps: float) -> Tensor:
    """Divide by sqrt(mean of squares over channels + eps); [B, C, ...], same shape."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps)


def to_images(video: Tensor) -> Tensor:
    """[B, C, F, h, w] to [B*F, C, h, w]."""
    return video.transpose(1, 2).flatten(0, 1)


def to_video(images: Tensor, batch_size: int) -> Tensor:
    """[B*F, C, h, w] to [B, C, F, h, w]."""
    video: Tensor = images.unflatten(0, (batch_size, -1))
    return video.transpose(1, 2)
