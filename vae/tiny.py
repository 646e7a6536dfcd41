"""A tiny causal video VAE in the TAEHV architecture that streams exactly.

The network is a 2-D CNN over single frames. Its only memory is one feature map per `MemBlock`, its only
mixing of frames apart from that the 1x1 convolutions of `TemporalPool` and `TemporalGrow`. A chunk is worked
off as one batch of images, so kernels stay few and large, and one remembered frame per block carries over
to the next chunk: chunked and whole results are the same.

Key names follow the published weights (https://github.com/madebyollin/taehv), which load unchanged.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from genstream.vae.protocol import Direction, VAESpec, VAEState

_RGB = 3
_STAGES = 3
_BLOCKS_PER_STAGE = 3
_STAGE_SPATIAL_RATIO = 2
_PENDING = "pending"


def _to_images(video: Tensor) -> Tensor:
    """[B, C, F, H, W] to [B*F, C, H, W], channels last: 4 times faster on CPU than contiguous."""
    images = video.transpose(1, 2).flatten(0, 1)
    return images.contiguous(memory_format=torch.channels_last)


def _to_video(images: Tensor, batch_size: int) -> Tensor:
    """[B*F, C, H, W] to [B, C, F, H, W]."""
    video: Tensor = images.unflatten(0, (batch_size, -1))
    return video.transpose(1, 2).contiguous()


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
        self.conv = nn.Sequential(
            _conv(2 * channels, channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels),
        )

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
        return F.relu(self.conv(both) + x), remembered


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
    """Turns one frame into `stride` frames and doubles height and width.

    Published weights come from a nearest upsampling followed by a 1x1 convolution. Both commute exactly, and
    the convolution costs a quarter when it goes first.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B*F, C, h, w] to [B*F*stride, C, 2h, 2w]; the oldest frame's channels come first."""
        grown = self.conv(x).permute(0, 2, 3, 1).unflatten(3, (self.stride, -1))  # [N, h, w, s, C]
        frames = grown.permute(0, 3, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)  # [N*s, C, h, w]
        return F.interpolate(frames, scale_factor=float(_STAGE_SPATIAL_RATIO), mode="nearest")


def _encoder(patch_size: int, width: int, latent_channels: int, strides: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = [_conv(_RGB * patch_size**2, width), nn.ReLU(inplace=True)]
    for stride in strides:
        layers.append(TemporalPool(width, stride))
        layers.append(nn.Conv2d(width, width, 3, stride=_STAGE_SPATIAL_RATIO, padding=1, bias=False))
        layers.extend(MemBlock(width) for _ in range(_BLOCKS_PER_STAGE))
    layers.append(_conv(width, latent_channels))
    return nn.Sequential(*layers)


def _decoder(
    patch_size: int, widths: Sequence[int], latent_channels: int, strides: Sequence[int]
) -> nn.Sequential:
    layers: list[nn.Module] = [SoftClamp(), _conv(latent_channels, widths[0]), nn.ReLU(inplace=True)]
    for stage, stride in enumerate(strides):
        width, next_width = widths[stage], widths[stage + 1]
        layers.extend(MemBlock(width) for _ in range(_BLOCKS_PER_STAGE))
        # The published layout has its upsampling at this index.
        layers.append(nn.Identity())
        layers.append(TemporalGrow(width, stride))
        layers.append(nn.Conv2d(width, next_width, 3, padding=1, bias=False))
    layers.extend([nn.ReLU(inplace=True), _conv(widths[-1], _RGB * patch_size**2)])
    return nn.Sequential(*layers)


def _run(layers: nn.Sequential, x: Tensor, state: VAEState) -> tuple[Tensor, dict[str, Tensor]]:
    """Apply `layers` to images [B*F, ...]; returns the images and what the state remembers next."""
    slots: dict[str, Tensor] = {}
    for name, layer in layers.named_children():
        if isinstance(layer, MemBlock):
            x, slots[name] = layer(x, state.slots[name])
        else:
            x = layer(x)
    return x, slots


class TinyVideoVAE(ModelMixin, ConfigMixin):
    """Tiny causal video VAE (TAEHV architecture) that satisfies `StreamingVAE`.

    Frames are [B, 3, F, H, W] in [-1, 1], latents [B, C, T, h, w], with F = 1 + r (T - 1) on decoding.

    Args:
        latent_channels: channels of a latent.
        patch_size: pixels that are folded into channels on both sides; 8 * patch_size is the spatial ratio.
        encoder_width: channels of every encoder stage.
        decoder_widths: channels of the three decoder stages and of the last layer.
        encoder_temporal_strides: frames merged at each encoder stage.
        decoder_temporal_strides: frames grown at each decoder stage; same product r as the encoder's.
        first_frame_copies: copies of a stream's first frame put in front of it. r - 1 lets 1 + r (T - 1)
            frames become T latent frames, so that encoding and decoding align; published weights use 0.
        latents_mean: per channel, of the encoder's raw output; None for weights that are normalised already.
        latents_std: per channel; encode returns (raw - mean) / std, decode undoes it.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        latent_channels: int = 16,
        patch_size: int = 1,
        encoder_width: int = 64,
        decoder_widths: Sequence[int] = (256, 128, 64, 64),
        encoder_temporal_strides: Sequence[int] = (2, 2, 1),
        decoder_temporal_strides: Sequence[int] = (1, 2, 2),
        first_frame_copies: int = 0,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check_strides(encoder_temporal_strides, decoder_temporal_strides)
        if len(decoder_widths) != _STAGES + 1:
            raise ValueError(f"decoder_widths must be {_STAGES + 1} numbers, got {list(decoder_widths)}")
        ratio = math.prod(encoder_temporal_strides)
        if first_frame_copies not in (0, ratio - 1):
            raise ValueError(f"first_frame_copies must be 0 or {ratio - 1}, got {first_frame_copies}")
        self.encoder = _encoder(patch_size, encoder_width, latent_channels, encoder_temporal_strides)
        self.decoder = _decoder(patch_size, decoder_widths, latent_channels, decoder_temporal_strides)
        mean = _channel_values("latents_mean", latents_mean, latent_channels, 0.0)
        std = _channel_values("latents_std", latents_std, latent_channels, 1.0)
        self.register_buffer("_latents_mean", mean, persistent=False)
        self.register_buffer("_latents_std", std, persistent=False)

    @property
    def spec(self) -> VAESpec:
        """Ratios and channels."""
        strides = self.config.decoder_temporal_strides
        rates = [math.prod(strides[:stage]) for stage in range(_STAGES)]
        return VAESpec(
            temporal_ratio=math.prod(strides),
            spatial_ratio=_STAGE_SPATIAL_RATIO**_STAGES * self.config.patch_size,
            latent_channels=self.config.latent_channels,
            memory_latents=math.ceil(sum(_BLOCKS_PER_STAGE / rate for rate in rates)),
        )

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def init_state(self, direction: Direction, batch_size: int, height: int, width: int) -> VAEState:
        """State of a stream that has not started; `height` and `width` in pixels."""
        _check_size(height, width, self.spec.spatial_ratio)
        state = VAEState(
            direction=direction, vae=self._describe(), batch_size=batch_size, height=height, width=width
        )
        weight = next(self.parameters())
        for name, (channels, ratio) in self._memories(direction).items():
            shape = (batch_size, channels, height // ratio, width // ratio)
            state.slots[name] = weight.new_zeros(shape)
        if direction == "encode":
            state.slots[_PENDING] = weight.new_zeros((batch_size, _RGB, 0, height, width))
        return state

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode_chunk(self, frames: Tensor, state: VAEState) -> Tensor:
        """Latents [B, C, T, h, w] that become complete with `frames` [B, 3, F, H, W]; the rest waits."""
        self._check_state(state, "encode")
        _check_shape("frames", frames, (state.batch_size, _RGB, None, state.height, state.width))
        waiting = torch.cat([state.slots[_PENDING], frames], dim=2)
        if _at_start(state) and frames.shape[2] > 0:
            first = frames[:, :, :1].expand(-1, -1, self.config.first_frame_copies, -1, -1)
            waiting = torch.cat([first, waiting], dim=2)
        ready = waiting.shape[2] - waiting.shape[2] % self.spec.temporal_ratio
        latents, slots = self._encode_groups(waiting[:, :, :ready], state)
        slots[_PENDING] = waiting[:, :, ready:].detach().clone()
        state.advance(latents.shape[2], slots)
        return latents

    def decode_chunk(self, latents: Tensor, state: VAEState) -> Tensor:
        """Frames [B, 3, F, H, W] in [-1, 1] of `latents` [B, C, T, h, w]; the stream's first gives one."""
        frames: Tensor = self.decode_chunk_unclamped(latents, state)
        return frames.clamp(-1, 1)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode_chunk_unclamped(self, latents: Tensor, state: VAEState) -> Tensor:
        """`decode_chunk` before the clamp, whose gradient is zero outside the range."""
        self._check_state(state, "decode")
        spec = self.spec
        size = (state.height // spec.spatial_ratio, state.width // spec.spatial_ratio)
        _check_shape("latents", latents, (state.batch_size, spec.latent_channels, None, *size))
        if latents.shape[2] == 0:
            return latents.new_zeros((state.batch_size, _RGB, 0, state.height, state.width))
        raw = latents * self._per_channel(self._latents_std) + self._per_channel(self._latents_mean)
        images, slots = _run(self.decoder, _to_images(raw), state)
        frames = _to_video(F.pixel_shuffle(images, self.config.patch_size), state.batch_size)
        # A first latent frame grows into r frames like every other, of which only the last is real.
        surplus = spec.temporal_ratio - 1 if state.steps == 0 else 0
        state.advance(latents.shape[2], slots)
        return frames[:, :, surplus:] * 2 - 1

    def flush(self, state: VAEState) -> Tensor:
        """The last, incomplete group as one latent frame, filled up with its last frame; else length 0.

        A decoding state never holds frames back: its result has length 0.
        """
        if state.direction == "decode":
            size = (state.height // self.spec.spatial_ratio, state.width // self.spec.spatial_ratio)
            shape = (state.batch_size, self.spec.latent_channels, 0, *size)
            return self.decode_chunk(next(self.parameters()).new_zeros(shape), state)
        pending = state.slots[_PENDING]
        missing = -pending.shape[2] % self.spec.temporal_ratio
        latents: Tensor = self.encode_chunk(pending[:, :, -1:].expand(-1, -1, missing, -1, -1), state)
        return latents

    def encode(self, frames: Tensor) -> Tensor:
        """Latents [B, C, T, h, w] of a whole clip [B, 3, F, H, W].

        With `first_frame_copies` F must be 1 + r (T - 1). Without, T = ceil(F / r).
        """
        count, ratio = frames.shape[2], self.spec.temporal_ratio
        if self.config.first_frame_copies and count % ratio != 1:
            raise ValueError(f"frames must be {ratio}n + 1 along dimension 2, got {count}")
        state = self.init_state("encode", frames.shape[0], frames.shape[3], frames.shape[4])
        return torch.cat([self.encode_chunk(frames, state), self.flush(state)], dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B, 3, 1 + r (T - 1), H, W] in [-1, 1] of a whole clip [B, C, T, h, w]."""
        return self.decode_unclamped(latents).clamp(-1, 1)

    def decode_unclamped(self, latents: Tensor) -> Tensor:
        """`decode` before the clamp."""
        ratio = self.spec.spatial_ratio
        batch_size, _, _, height, width = latents.shape
        state = self.init_state("decode", batch_size, height * ratio, width * ratio)
        frames: Tensor = self.decode_chunk_unclamped(latents, state)
        return frames

    def forward(self, sample: Tensor) -> Tensor:
        """Reconstruction of a clip."""
        return self.decode(self.encode(sample))

    def _encode_groups(self, frames: Tensor, state: VAEState) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents of whole groups of frames, and the next slots."""
        if frames.shape[2] == 0:
            ratio = self.spec.spatial_ratio
            size = (state.height // ratio, state.width // ratio)
            shape = (state.batch_size, self.spec.latent_channels, 0, *size)
            return frames.new_zeros(shape), dict(state.slots)
        images = F.pixel_unshuffle(_to_images((frames + 1) / 2), self.config.patch_size)
        raw, slots = _run(self.encoder, images.contiguous(memory_format=torch.channels_last), state)
        latents = _to_video(raw, state.batch_size)
        mean, std = self._per_channel(self._latents_mean), self._per_channel(self._latents_std)
        return (latents - mean) / std, slots

    def _memories(self, direction: Direction) -> dict[str, tuple[int, int]]:
        """For each MemBlock of one direction: channels and pixels per feature pixel."""
        memories: dict[str, tuple[int, int]] = {}
        layers = self.encoder if direction == "encode" else self.decoder
        ratio = self.config.patch_size if direction == "encode" else self.spec.spatial_ratio
        for name, layer in layers.named_children():
            if isinstance(layer, MemBlock):
                memories[name] = (layer.channels, ratio)
            elif isinstance(layer, TemporalPool):
                ratio *= _STAGE_SPATIAL_RATIO
            elif isinstance(layer, TemporalGrow):
                ratio //= _STAGE_SPATIAL_RATIO
        return memories

    def _per_channel(self, values: Tensor) -> Tensor:
        # Loading in half precision casts parameters, but no buffers that are not stored.
        return values.to(next(self.parameters()).dtype).view(1, -1, 1, 1, 1)

    def _describe(self) -> str:
        """Names the architecture, so that a state tells which VAE it belongs to."""
        config = self.config
        return (
            f"{type(self).__name__}(latent_channels={config.latent_channels}, "
            f"patch_size={config.patch_size}, encoder_width={config.encoder_width}, "
            f"decoder_widths={list(config.decoder_widths)}, "
            f"encoder_temporal_strides={list(config.encoder_temporal_strides)}, "
            f"decoder_temporal_strides={list(config.decoder_temporal_strides)}, "
            f"first_frame_copies={config.first_frame_copies})"
        )

    def _check_state(self, state: VAEState, direction: Direction) -> None:
        if state.direction != direction:
            raise ValueError(f"state must be for {direction!r}, got one for {state.direction!r}")
        if state.vae != self._describe():
            raise ValueError(f"state must come from {self._describe()}, got one from {state.vae}")
        weight = next(self.parameters())
        slot = next(iter(state.slots.values()))
        if (slot.dtype, slot.device) != (weight.dtype, weight.device):
            raise ValueError(
                f"state must be {weight.dtype} on {weight.device} like the VAE, "
                f"got {slot.dtype} on {slot.device}"
            )


def _at_start(state: VAEState) -> bool:
    return state.steps == 0 and state.slots[_PENDING].shape[2] == 0


def _check_strides(encoder_strides: Sequence[int], decoder_strides: Sequence[int]) -> None:
    for name, strides in (
        ("encoder_temporal_strides", encoder_strides),
        ("decoder_temporal_strides", decoder_strides),
    ):
        if len(strides) != _STAGES or any(stride not in (1, 2) for stride in strides):
            raise ValueError(f"{name} must be {_STAGES} numbers of 1 or 2, got {list(strides)}")
    if math.prod(encoder_strides) != math.prod(decoder_strides):
        raise ValueError(
            f"decoder_temporal_strides must have the product of encoder_temporal_strides "
            f"{list(encoder_strides)}, got {list(decoder_strides)}"
        )


def _channel_values(name: str, values: Sequence[float] | None, channels: int, default: float) -> Tensor:
    if values is None:
        return torch.full((channels,), default)
    if len(values) != channels:
        raise ValueError(f"{name} must hold latent_channels = {channels} numbers, got {len(values)}")
    return torch.tensor(list(values), dtype=torch.float32)


def _check_size(height: int, width: int, ratio: int) -> None:
    for name, value in (("height", height), ("width", width)):
        if value <= 0 or value % ratio:
            raise ValueError(f"{name} must be a positive multiple of {ratio} (8 * patch_size), got {value}")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Compare with the shape that the state was made for; None stands for any length."""
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        want is None or got == want for got, want in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} must have the shape of its state [{wanted}], got {list(shape)}")
