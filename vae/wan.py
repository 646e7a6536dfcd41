"""The video VAEs of Wan 2.1 (4x8x8) and Wan 2.2 (4x16x16), with their state outside of the module.

Architecture: https://github.com/Wan-Video, `wan/modules/vae.py` and `vae2_2.py`. Key names are those of the
published `Wan2.1_VAE.pth` and `Wan2.2_VAE.pth`; `genstream.vae.wan_weights.load_wan_vae` reads them.

The original works off one latent frame per call. Here any number of frames goes through together, a stream's
first among them, since each causal convolution only asks for the frames before its input.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from genstream.shapes import check_counts
from genstream.vae.native import PENDING, NativeVAE
from genstream.vae.protocol import RGB, Direction, VAESpec, VAEState
from genstream.vae.wan_blocks import (
    SCALE,
    TIME_KERNEL,
    CausalConv3d,
    Downsample,
    DownStage,
    FrameAttention,
    Pass,
    ResidualBlock,
    RMSNorm,
    StreamingLayer,
    Upsample,
    UpStage,
)

Version = Literal["2.1", "2.2"]

STAGES = 4
ENCODER_BLOCKS = 2
"""Residual blocks of an encoder stage."""
DECODER_BLOCKS = 3

# Of the published VAEs, by latent channels: what the diffusion models' latents are normalised with.
_LATENTS_MEAN = {
    16: (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ),
    48: (
        *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
        *(-0.1382, 0.0542, 0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825),
        *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
        *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123),
        *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748),
        *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    ),
}
_LATENTS_STD = {
    16: (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916),
    ),
    48: (
        *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013),
        *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
        *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
        *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
        *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
        *(0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ),
}


def _blocks(inputs: int, outputs: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(inputs if index == 0 else outputs, outputs) for index in range(count)]


def _middle(channels: int) -> nn.ModuleList:
    blocks = [ResidualBlock(channels, channels), FrameAttention(channels), ResidualBlock(channels, channels)]
    return nn.ModuleList(blocks)


def _head(channels: int, outputs: int) -> nn.ModuleList:
    return nn.ModuleList([RMSNorm(channels), nn.SiLU(), CausalConv3d(channels, outputs)])


class WanEncoder(StreamingLayer):
    """Patches [B, 3 p^2, F, H/p, W/p] to moments [B, 2C, T, h, w]. Layers are registered as they run."""

    def __init__(
        self, inputs: int, widths: Sequence[int], outputs: int, strides: Sequence[int], version: Version
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(inputs, widths[0])
        self.downsamples = nn.ModuleList()
        for stage, (width, next_width) in enumerate(pairwise(widths)):
            blocks = _blocks(width, next_width, ENCODER_BLOCKS)
            scale, stride = (1, 1) if stage == STAGES - 1 else (SCALE, strides[stage])
            if scale == SCALE:
                blocks.append(Downsample(next_width, stride))
            self.downsamples.extend(
                blocks if version == "2.1" else [DownStage(blocks, next_width, stride, scale)]
            )
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], outputs)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """Advance by whole groups of frames."""
        return run.through((self.conv1, *self.downsamples, *self.middle, *self.head), x)


class WanDecoder(StreamingLayer):
    """Latents [B, C, T, h, w] to patches [B, 3 p^2, F, H/p, W/p]. Layers are registered as they run."""

    def __init__(
        self, inputs: int, widths: Sequence[int], outputs: int, strides: Sequence[int], version: Version
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(inputs, widths[0])
        self.middle = _middle(widths[0])
        self.upsamples = nn.ModuleList()
        width = widths[0]
        for stage, next_width in enumerate(widths[1:]):
            blocks = _blocks(width, next_width, DECODER_BLOCKS)
            scale, stride = (1, 1) if stage == STAGES - 1 else (SCALE, strides[stage])
            # Without the shortcuts of version 2.2, upsampling halves the channels.
            width = next_width if version == "2.2" or scale == 1 else next_width // 2
            if scale == SCALE:
                blocks.append(Upsample(next_width, width, stride))
            self.upsamples.extend(
                blocks if version == "2.1" else [UpStage(blocks, next_width, stride, scale)]
            )
        self.head = _head(widths[-1], outputs)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """Advance by any number of latent frames."""
        return run.through((self.conv1, *self.middle, *self.upsamples, *self.head), x)


def _to_patches(frames: Tensor, size: int) -> Tensor:
    """[B, 3, F, H, W] to [B, 3 p^2, F, H/p, W/p]; in a patch, columns come before rows."""
    patches: Tensor = frames.unflatten(4, (-1, size)).unflatten(3, (-1, size))  # [B, 3, F, H/p, p, W/p, p]
    return patches.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def _from_patches(patches: Tensor, size: int) -> Tensor:
    """The inverse of `_to_patches`."""
    frames: Tensor = patches.unflatten(1, (-1, size, size)).permute(0, 1, 4, 5, 3, 6, 2)
    return frames.flatten(5, 6).flatten(3, 4)


class WanVideoVAE(NativeVAE):
    """Video VAE of Wan 2.1 or Wan 2.2 that satisfies `StreamingVAE`, exactly for any chunking.

    Frames are [B, 3, F, H, W] in [-1, 1], latents [B, C, T, h, w] normalised, with F = 1 + 4 (T - 1).
    Encoding gives the mean of the posterior. It wants float32; bfloat16 is enough for decoding Wan 2.1
    (https://github.com/hao-ai-lab/FastVideo, 1181 and 1472).

    Args:
        version: "2.1", or "2.2" with shortcuts around the stages.
        latent_channels: channels of a latent.
        patch_size: pixels that are folded into channels on both sides; 8 * patch_size is the spatial ratio.
        encoder_widths: channels behind the first convolution and of the four encoder stages.
        decoder_widths: channels behind the first convolution and of the four decoder stages.
        temporal_strides: frames merged behind each encoder stage but the last; the decoder grows them back.
        latents_mean: per channel, of the encoder's raw output; None for those of the published VAE with as
            many latent channels.
        latents_std: per channel; encode returns (raw - mean) / std, decode undoes it.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        version: Version = "2.1",
        latent_channels: int = 16,
        patch_size: int = 1,
        encoder_widths: Sequence[int] = (96, 96, 192, 384, 384),
        decoder_widths: Sequence[int] = (384, 384, 384, 192, 96),
        temporal_strides: Sequence[int] = (1, 2, 2),
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_counts(
            latent_channels=latent_channels,
            patch_size=patch_size,
            encoder_widths=encoder_widths,
            decoder_widths=decoder_widths,
        )
        _check_config(version, encoder_widths, decoder_widths, temporal_strides)
        patch_channels = RGB * patch_size**2
        self.encoder = WanEncoder(
            patch_channels, encoder_widths, 2 * latent_channels, temporal_strides, version
        )
        self.conv1 = nn.Conv3d(2 * latent_channels, 2 * latent_channels, 1)
        self.conv2 = nn.Conv3d(latent_channels, latent_channels, 1)
        self.decoder = WanDecoder(
            latent_channels, decoder_widths, patch_channels, temporal_strides[::-1], version
        )
        for name, layer in self.named_modules():
            if isinstance(layer, CausalConv3d):
                layer.slot = name
        self._set_statistics(
            _statistic("latents_mean", latents_mean, latent_channels, _LATENTS_MEAN),
            _statistic("latents_std", latents_std, latent_channels, _LATENTS_STD),
            latent_channels,
        )
        self._spec = VAESpec(
            temporal_ratio=math.prod(temporal_strides),
            spatial_ratio=SCALE ** (STAGES - 1) * patch_size,
            latent_channels=latent_channels,
            memory_latents=self._memory_latents(),
        )

    @property
    def spec(self) -> VAESpec:
        """Ratios and channels."""
        return self._spec

    def encode_chunk(self, frames: Tensor, state: VAEState) -> Tensor:
        """Latents [B, C, T, h, w] that become complete with `frames` [B, 3, F, H, W]; the rest waits."""
        mean, _ = self.encode_chunk_moments(frames, state).chunk(2, dim=1)
        return self._normalised(mean)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode_chunk_moments(self, frames: Tensor, state: VAEState) -> Tensor:
        """`encode_chunk` as raw mean and log-variance [B, 2C, T, h, w] of the posterior."""
        waiting = self._with_pending(frames, state)
        incomplete = (waiting.shape[2] - _first_frames(state)) % self.spec.temporal_ratio
        ready = max(waiting.shape[2] - incomplete, 0)
        run = Pass(past=state.slots, at_start=state.steps == 0)
        if ready == 0:
            moments = self._no_latents(state).repeat(1, 2, 1, 1, 1)
            run.remembered.update(state.slots)
        else:
            patches = _to_patches(waiting[:, :, :ready], self.config.patch_size)
            moments = self.conv1(self.encoder(patches, run))
        run.remembered[PENDING] = waiting[:, :, ready:].detach().clone()
        state.advance(moments.shape[2], run.remembered)
        return moments

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode_chunk_unclamped(self, latents: Tensor, state: VAEState) -> Tensor:
        """`decode_chunk` before the clamp, whose gradient is zero outside the range."""
        self._check_latents(latents, state)
        if latents.shape[2] == 0:
            return self._no_frames(state)
        run = Pass(past=state.slots, at_start=state.steps == 0)
        patches = self.decoder(self.conv2(self._raw(latents)), run)
        frames = _from_patches(patches, self.config.patch_size)
        state.advance(latents.shape[2], run.remembered)
        return frames

    def encode(self, frames: Tensor, chunk_latents: int | None = 1) -> Tensor:
        """As every VAE's, one group of frames after another unless told otherwise: the network is large."""
        return super().encode(frames, chunk_latents)

    def decode(self, latents: Tensor, chunk_latents: int | None = 1) -> Tensor:
        """As every VAE's, one latent frame after another unless told otherwise."""
        return super().decode(latents, chunk_latents)

    def _first_slots(
        self, direction: Direction, batch_size: int, height: int, width: int
    ) -> dict[str, Tensor]:
        slots = {}
        for layer, ratio in self._causal_convolutions(direction):
            size = (height // ratio, width // ratio)
            shape = (batch_size, layer.in_channels, layer.memory_frames, *size)
            slots[layer.slot] = self._weight.new_zeros(shape)
        return slots

    def _causal_convolutions(self, direction: Direction) -> Iterator[tuple[CausalConv3d, int]]:
        """All of one direction in the order they run, with pixels per feature pixel."""
        stack = self.encoder if direction == "encode" else self.decoder
        ratio = self.config.patch_size if direction == "encode" else self.spec.spatial_ratio
        for layer in stack.modules():
            if isinstance(layer, CausalConv3d):
                yield layer, ratio
            elif isinstance(layer, nn.ZeroPad2d):
                ratio *= SCALE
            elif isinstance(layer, nn.Upsample):
                ratio //= SCALE

    def _memory_latents(self) -> int:
        """How many latent frames back a decoded frame reaches: the sum over all convolutions."""
        reach, rate = 0.0, 1
        for layer in self.decoder.modules():
            if not isinstance(layer, CausalConv3d):
                continue
            reach += layer.memory_frames / rate
            if layer.kernel_size == TIME_KERNEL:
                # Only upsampling convolves over time alone: behind it, frames come faster.
                rate *= layer.out_channels // layer.in_channels
        return math.ceil(reach)


def _first_frames(state: VAEState) -> int:
    """Frames of the next latent frame that are not part of a group: the stream's first one."""
    return 1 if state.steps == 0 else 0


def _check_config(
    version: str, encoder_widths: Sequence[int], decoder_widths: Sequence[int], strides: Sequence[int]
) -> None:
    if version not in ("2.1", "2.2"):
        raise ValueError(f"version must be '2.1' or '2.2', got {version!r}")
    for name, widths in (("encoder_widths", encoder_widths), ("decoder_widths", decoder_widths)):
        if len(widths) != STAGES + 1:
            raise ValueError(f"{name} must be {STAGES + 1} numbers, got {list(widths)}")
    if len(strides) != STAGES - 1 or any(stride not in (1, 2) for stride in strides):
        raise ValueError(f"temporal_strides must be {STAGES - 1} numbers of 1 or 2, got {list(strides)}")
    if version == "2.2":
        _check_shortcuts(encoder_widths, decoder_widths, strides)


def _check_shortcuts(
    encoder_widths: Sequence[int], decoder_widths: Sequence[int], strides: Sequence[int]
) -> None:
    """Shortcuts of version 2.2 average and copy whole groups of channels."""
    cells = [stride * SCALE**2 for stride in strides]
    down = zip(pairwise(encoder_widths), [*cells, 1], strict=True)
    # The last stage has no shortcut.
    up = zip(pairwise(decoder_widths[:-1]), cells[::-1], strict=True)
    for name, widths, whole in (
        ("encoder_widths", encoder_widths, all(a * cell % b == 0 for (a, b), cell in down)),
        ("decoder_widths", decoder_widths, all(b * cell % a == 0 for (a, b), cell in up)),
    ):
        if not whole:
            raise ValueError(
                f"{name} must be multiples of each other, up to factors of 2, for version '2.2', "
                f"got {list(widths)}"
            )


def _statistic(
    name: str, values: Sequence[float] | None, channels: int, published: dict[int, tuple[float, ...]]
) -> Sequence[float]:
    if values is None and channels not in published:
        raise ValueError(
            f"{name} must be given for latent_channels = {channels}, got None, "
            f"which stands for {sorted(published)} channels only"
        )
    return published[channels] if values is None else values
