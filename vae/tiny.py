"""A tiny causal video VAE in the TAEHV architecture that streams exactly.

The network is a 2-D CNN over single frames. Its only memory is one feature map per `MemBlock`, its only
mixing of frames apart from that the 1x1 convolutions of `TemporalPool` and `TemporalGrow`. A chunk is worked
off as one batch of images, so kernels stay few and large, and one remembered frame per block carries over
to the next chunk: chunked and whole results are the same.

Key names follow the published weights (https://github.com/madebyollin/taehv), which load unchanged:
`genstream.vae.taehv.load_taehv`.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from genstream.shapes import check_counts
from genstream.vae.checks import check_clip, check_frames
from genstream.vae.native import PENDING, NativeVAE
from genstream.vae.protocol import Direction, VAESpec, VAEState
from genstream.vae.tiny_blocks import (
    BLOCKS_PER_STAGE,
    HALVING,
    STAGES,
    BlockKind,
    MemBlock,
    TemporalGrow,
    TemporalPool,
    decoder_layers,
    encoder_layers,
)

__all__ = ["MemBlock", "TemporalGrow", "TemporalPool", "TinyVideoVAE"]

EncoderStart = Literal["zeros", "still"]


def _to_images(video: Tensor, patch_size: int = 1) -> Tensor:
    """[B, C, F, H, W] to [B*F, C p^2, H/p, W/p], channels last: 4 times faster on CPU than contiguous."""
    patches: Tensor = video.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))
    pixels = patches.permute(0, 2, 3, 5, 1, 4, 6).contiguous()  # [B, F, h, w, C, p, p]
    return pixels.flatten(4).flatten(0, 1).permute(0, 3, 1, 2)


def _to_video(images: Tensor, batch_size: int, patch_size: int = 1) -> Tensor:
    """[B*F, C p^2, h, w] in channels last order to [B, C, F, p h, p w], in a single copy."""
    pixels: Tensor = images.permute(0, 2, 3, 1).unflatten(3, (-1, patch_size, patch_size))
    frames: Tensor = pixels.unflatten(0, (batch_size, -1))  # [B, F, h, w, C, p, p]
    return frames.permute(0, 4, 1, 2, 5, 3, 6).contiguous().flatten(5, 6).flatten(3, 4)


def _run(
    layers: nn.Sequential, x: Tensor, state: VAEState, *, still: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Apply `layers` to images [B*F, ...]; returns the images and what the state remembers next.

    With `still` every block remembers the first image it sees, and not what the state holds.
    """
    slots: dict[str, Tensor] = {}
    for name, layer in layers.named_children():
        if isinstance(layer, MemBlock):
            past = state.slots[name]
            if still:
                past = x.unflatten(0, (state.batch_size, -1))[:, 0].to(past.dtype)
            x, slots[name] = layer(x, past)
        else:
            x = layer(x)
    return x, slots


class TinyVideoVAE(NativeVAE):
    """Tiny causal video VAE (TAEHV architecture) that satisfies `StreamingVAE`.

    Frames are [B, 3, F, H, W] in [-1, 1], latents [B, C, T, h, w], with F = 1 + r (T - 1) on decoding.

    A decoder may be reduced, for a cheaper preview: strides of 1 where the encoder's are 2 give fewer or
    smaller frames of the same clip. `spec` then describes that decoder, and encoding is refused.

    Args:
        latent_channels: channels of a latent.
        patch_size: pixels that are folded into channels on both sides; 8 * patch_size is the spatial ratio.
        encoder_width: channels of every encoder stage.
        decoder_widths: channels of the three decoder stages and of the last layer.
        encoder_temporal_strides: frames merged at each encoder stage.
        decoder_temporal_strides: frames grown at each decoder stage; same product r as the encoder's.
        first_frame_copies: copies of a stream's first frame put in front of it. r - 1 lets 1 + r (T - 1)
            frames become T latent frames, so that encoding and decoding align; published weights use 0.
        encoder_start: what the encoder remembers before a stream's first frame: "zeros" as in published
            weights, or "still", as if the first frame had stood there for ever. A first latent after zeros
            can look unlike all others, which a diffusion model finds hard to learn.
        latents_mean: per channel, of the encoder's raw output; None for weights that are normalised already.
        latents_std: per channel; encode returns (raw - mean) / std, decode undoes it.
        encoder_block: "base" or "wide".
        decoder_block: "base", "wide" or "super".
        decoder_spatial_strides: how much each decoder stage grows height and width.
        decoder_blocks: residual blocks of each decoder stage; published weights have three.
        decoder_patch_size: pixels that the decoder folds into channels, where it is not `patch_size`: a
            decoder that grows less and folds more is faster.
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
        encoder_start: EncoderStart = "zeros",
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        encoder_block: BlockKind = "base",
        decoder_block: BlockKind = "base",
        decoder_spatial_strides: Sequence[int] = (2, 2, 2),
        decoder_blocks: Sequence[int] = (BLOCKS_PER_STAGE,) * STAGES,
        decoder_patch_size: int | None = None,
    ) -> None:
        super().__init__()
        check_counts(
            latent_channels=latent_channels,
            patch_size=patch_size,
            encoder_width=encoder_width,
            decoder_widths=decoder_widths,
        )
        _check_strides("encoder_temporal_strides", encoder_temporal_strides)
        _check_strides("decoder_temporal_strides", decoder_temporal_strides)
        _check_strides("decoder_spatial_strides", decoder_spatial_strides)
        _check_blocks(encoder_block, decoder_block)
        ratio, decoder_ratio = math.prod(encoder_temporal_strides), math.prod(decoder_temporal_strides)
        if decoder_ratio > ratio:
            raise ValueError(
                f"decoder_temporal_strides must have the product of encoder_temporal_strides "
                f"{list(encoder_temporal_strides)} or less, got {list(decoder_temporal_strides)}"
            )
        if len(decoder_widths) != STAGES + 1:
            raise ValueError(f"decoder_widths must be {STAGES + 1} numbers, got {list(decoder_widths)}")
        if len(decoder_blocks) != STAGES or min(decoder_blocks) < 1:
            raise ValueError(f"decoder_blocks must be {STAGES} numbers above 0, got {list(decoder_blocks)}")
        decoder_growth = math.prod(decoder_spatial_strides) * self._decoder_patch_size
        if decoder_growth > HALVING**STAGES * patch_size:
            raise ValueError(
                f"decoder_patch_size times decoder_spatial_strides must be the encoder's "
                f"{HALVING**STAGES * patch_size} or less, got {self._decoder_patch_size} times "
                f"{list(decoder_spatial_strides)}"
            )
        if first_frame_copies not in (0, ratio - 1):
            raise ValueError(f"first_frame_copies must be 0 or {ratio - 1}, got {first_frame_copies}")
        if encoder_start not in (starts := get_args(EncoderStart)):
            raise ValueError(f"encoder_start must be one of {', '.join(starts)}, got {encoder_start!r}")
        if encoder_start == "still" and first_frame_copies != ratio - 1:
            raise ValueError(
                f"encoder_start must be 'zeros' unless first_frame_copies is {ratio - 1}, got 'still' and "
                f"{first_frame_copies}"
            )
        self.encoder = encoder_layers(
            patch_size, encoder_width, latent_channels, encoder_temporal_strides, encoder_block
        )
        self.decoder = decoder_layers(
            self._decoder_patch_size,
            decoder_widths,
            latent_channels,
            decoder_temporal_strides,
            decoder_spatial_strides,
            decoder_blocks,
            decoder_block,
        )
        self._set_statistics(latents_mean, latents_std, latent_channels)

    @property
    def spec(self) -> VAESpec:
        """Ratios and channels."""
        strides = self.config.decoder_temporal_strides
        rates = [math.prod(strides[:stage]) for stage in range(STAGES)]
        blocks = self.config.decoder_blocks
        return VAESpec(
            temporal_ratio=math.prod(strides),
            spatial_ratio=math.prod(self.config.decoder_spatial_strides) * self._decoder_patch_size,
            latent_channels=self.config.latent_channels,
            memory_latents=math.ceil(sum(count / rate for count, rate in zip(blocks, rates, strict=True))),
        )

    @property
    def is_aligned(self) -> bool:
        """Whether `decode` gives back the frames that were encoded, each at its place."""
        lead: int = math.prod(self.config.encoder_temporal_strides) - 1
        return bool(self.config.first_frame_copies == lead)

    def init_state(self, direction: Direction, batch_size: int, height: int, width: int) -> VAEState:
        """State of a stream that has not started; `height` and `width` in pixels."""
        if direction == "encode" and self._reduced:
            raise ValueError("direction must be 'decode' for a reduced decoder, got 'encode'")
        state: VAEState = super().init_state(direction, batch_size, height, width)
        return state

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode_chunk(self, frames: Tensor, state: VAEState) -> Tensor:
        """Latents [B, C, T, h, w] that become complete with `frames` [B, 3, F, H, W]; the rest waits."""
        waiting = self._with_pending(frames, state)
        if frames.shape[2] and state.steps == 0 and waiting.shape[2] == frames.shape[2]:
            first = frames[:, :, :1].expand(-1, -1, self.config.first_frame_copies, -1, -1)
            waiting = torch.cat([first, waiting], dim=2)
        ready = waiting.shape[2] - waiting.shape[2] % self.spec.temporal_ratio
        latents, slots = self._encode_groups(waiting[:, :, :ready], state)
        slots[PENDING] = waiting[:, :, ready:].detach().clone()
        state.advance(latents.shape[2], slots)
        return latents

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode_chunk_unclamped(self, latents: Tensor, state: VAEState) -> Tensor:
        """`decode_chunk` before the clamp, whose gradient is zero outside the range."""
        self._check_latents(latents, state)
        if latents.shape[2] == 0:
            return self._no_frames(state)
        images, slots = _run(self.decoder, _to_images(self._raw(latents)), state)
        frames = _to_video(images, state.batch_size, self._decoder_patch_size)
        # A first latent frame grows into r frames like every other, of which only the last is real.
        surplus = self.spec.temporal_ratio - 1 if state.steps == 0 else 0
        state.advance(latents.shape[2], slots)
        return frames[:, :, surplus:].mul_(2).sub_(1)

    def encode(self, frames: Tensor, chunk_latents: int | None = None) -> Tensor:
        """Latents [B, C, T, h, w] of a whole clip [B, 3, F, H, W].

        With `first_frame_copies` F must be 1 + r (T - 1). Without, T = ceil(F / r). The result is the same
        for any `chunk_latents`: groups of frames that go together, None for all. Fewer take less memory.
        """
        if self.config.first_frame_copies:
            check_frames(frames, self.spec)
        else:
            check_clip("frames", frames)
        return self._encode_clip(frames, chunk_latents)

    def _encode_groups(self, frames: Tensor, state: VAEState) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents of whole groups of frames, and the next slots."""
        if frames.shape[2] == 0:
            return self._no_latents(state), dict(state.slots)
        images = _to_images((frames + 1) / 2, self.config.patch_size)
        still = self.config.encoder_start == "still" and state.steps == 0
        raw, slots = _run(self.encoder, images, state, still=still)
        return self._normalised(_to_video(raw, state.batch_size)), slots

    def _first_slots(
        self, direction: Direction, batch_size: int, height: int, width: int
    ) -> dict[str, Tensor]:
        return {
            name: self._weight.new_zeros((batch_size, channels, height // ratio, width // ratio))
            for name, (channels, ratio) in self._memories(direction).items()
        }

    def _memories(self, direction: Direction) -> dict[str, tuple[int, int]]:
        """For each MemBlock of one direction: channels and pixels per feature pixel."""
        memories: dict[str, tuple[int, int]] = {}
        layers = self.encoder if direction == "encode" else self.decoder
        ratio = self.config.patch_size if direction == "encode" else self.spec.spatial_ratio
        for name, layer in layers.named_children():
            if isinstance(layer, MemBlock):
                memories[name] = (layer.channels, ratio)
            elif isinstance(layer, TemporalPool):
                ratio *= HALVING
            elif isinstance(layer, TemporalGrow):
                ratio //= layer.spatial_stride
            elif isinstance(layer, nn.PixelShuffle):
                ratio //= layer.upscale_factor
        return memories

    @property
    def _reduced(self) -> bool:
        """Whether the decoder gives fewer or smaller frames than the encoder takes."""
        spec, config = self.spec, self.config
        in_time = spec.temporal_ratio < math.prod(config.encoder_temporal_strides)
        return bool(in_time or spec.spatial_ratio < HALVING**STAGES * config.patch_size)

    @property
    def _decoder_patch_size(self) -> int:
        return int(self.config.decoder_patch_size or self.config.patch_size)


def _check_strides(name: str, strides: Sequence[int]) -> None:
    if len(strides) != STAGES or any(stride not in (1, 2) for stride in strides):
        raise ValueError(f"{name} must be {STAGES} numbers of 1 or 2, got {list(strides)}")


def _check_blocks(encoder_block: str, decoder_block: str) -> None:
    for name, block, known in (
        ("encoder_block", encoder_block, ("base", "wide")),
        ("decoder_block", decoder_block, ("base", "wide", "super")),
    ):
        if block not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {block!r}")
