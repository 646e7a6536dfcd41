"""What this library's own video VAEs and decoders have in common: states of streams, clips as streams."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from genstream.vae.checks import (
    check_chunk,
    check_frames,
    check_is_state,
    check_start,
    check_state,
    latent_statistics,
)
from genstream.vae.chunks import cut_clip, decoding_state
from genstream.vae.identity import describe
from genstream.vae.protocol import RGB, Direction, VAESpec, VAEState

PENDING = "pending"
"""Slot of the frames of a group that is not complete."""


class NativeDecoder(ModelMixin, ConfigMixin):
    """The decoding half of a `StreamingVAE`; a subclass says what it remembers and works off a chunk."""

    @property
    @abstractmethod
    def spec(self) -> VAESpec:
        """Ratios, channels and memory."""

    @abstractmethod
    def decode_chunk_unclamped(self, latents: Tensor, state: VAEState) -> Tensor:
        """`decode_chunk` before the clamp, whose gradient is zero outside the range."""

    @abstractmethod
    def _first_slots(
        self, direction: Direction, batch_size: int, height: int, width: int
    ) -> dict[str, Tensor]:
        """What is remembered before a stream has started."""

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def init_state(self, direction: Direction, batch_size: int, height: int, width: int) -> VAEState:
        """State of a stream that has not started; `height` and `width` in pixels."""
        check_start(direction, batch_size, height, width, self.spec.spatial_ratio)
        return VAEState(
            direction=direction,
            vae=describe(self),
            batch_size=batch_size,
            height=height,
            width=width,
            slots=self._first_slots(direction, batch_size, height, width),
        )

    def decode_chunk(self, latents: Tensor, state: VAEState) -> Tensor:
        """Frames [B, 3, F, H, W] in [-1, 1] that become complete with `latents` [B, C, T, h, w]."""
        return self.decode_chunk_unclamped(latents, state).clamp(-1, 1)

    def _check_latents(self, latents: Tensor, state: VAEState) -> None:
        check_state(state, "decode", describe(self), self._weight)
        batch_size, channels, _, *size = self._no_latents(state).shape
        check_chunk("latents", latents, state, (batch_size, channels, None, *size), self._weight)

    def _no_frames(self, state: VAEState) -> Tensor:
        """[B, 3, 0, H, W]."""
        return self._weight.new_zeros((state.batch_size, RGB, 0, state.height, state.width))

    def _no_latents(self, state: VAEState) -> Tensor:
        """[B, C, 0, h, w]."""
        spec = self.spec
        size = (state.height // spec.spatial_ratio, state.width // spec.spatial_ratio)
        return self._weight.new_zeros((state.batch_size, spec.latent_channels, 0, *size))

    @property
    def _weight(self) -> Tensor:
        """Any of the weights, whose dtype and device are those of all."""
        weight: Tensor = next(self.parameters())
        return weight


class NativeVAE(NativeDecoder):
    """A `StreamingVAE` with encoder and decoder; a stream's first latent frame is its first frame alone."""

    @abstractmethod
    def encode_chunk(self, frames: Tensor, state: VAEState) -> Tensor:
        """Latents [B, C, T, h, w] that become complete with `frames` [B, 3, F, H, W]; the rest waits."""

    def init_state(self, direction: Direction, batch_size: int, height: int, width: int) -> VAEState:
        """State of a stream that has not started; `height` and `width` in pixels."""
        state: VAEState = super().init_state(direction, batch_size, height, width)
        if direction == "encode":
            state.slots[PENDING] = self._no_frames(state)
        return state

    def flush(self, state: VAEState) -> Tensor:
        """The last, incomplete group as one latent frame, filled up with its last frame; else length 0.

        A decoding state never holds frames back: its result has length 0.
        """
        check_is_state(state)
        if state.direction == "decode":
            rest = self.decode_chunk(self._no_latents(state), state)
        else:
            check_state(state, "encode", describe(self), self._weight)
            pending = state.slots[PENDING]
            missing = -pending.shape[2] % self.spec.temporal_ratio
            rest = self.encode_chunk(pending[:, :, -1:].expand(-1, -1, missing, -1, -1), state)
        state.ended = True
        return rest

    def encode(self, frames: Tensor, chunk_latents: int | None = None) -> Tensor:
        """Latents [B, C, T, h, w] of a whole clip [B, 3, 1 + r (T - 1), H, W].

        The result is the same for any `chunk_latents`: groups of frames that go together, None for all. With
        a number, memory besides that of the clip itself does not grow with its length.
        """
        check_frames(frames, self.spec)
        return self._encode_clip(frames, chunk_latents)

    def decode(self, latents: Tensor, chunk_latents: int | None = None) -> Tensor:
        """Frames [B, 3, 1 + r (T - 1), H, W] in [-1, 1] of a whole clip [B, C, T, h, w].

        `chunk_latents` latent frames go together, as in `encode`.
        """
        state = decoding_state(self, latents)
        frames = [self.decode_chunk(part, state) for part in cut_clip(latents, chunk_latents, 1)]
        return torch.cat(frames, dim=2)

    def decode_unclamped(self, latents: Tensor) -> Tensor:
        """`decode` before the clamp."""
        return self.decode_chunk_unclamped(latents, decoding_state(self, latents))

    def forward(self, sample: Tensor) -> Tensor:
        """Reconstruction of a clip."""
        return self.decode(self.encode(sample))

    def _encode_clip(self, frames: Tensor, chunk_latents: int | None) -> Tensor:
        state = self.init_state("encode", frames.shape[0], frames.shape[3], frames.shape[4])
        parts = cut_clip(frames, chunk_latents, self.spec.temporal_ratio)
        latents = [self.encode_chunk(part, state) for part in parts]
        return torch.cat([*latents, self.flush(state)], dim=2)

    def _set_statistics(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
    ) -> None:
        """Mean and standard deviation of raw latents, as `latent_statistics` takes them."""
        for name, values in zip(("mean", "std"), latent_statistics(mean, std, channels), strict=True):
            self.register_buffer(f"_latents_{name}", values, persistent=False)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation; they may be float32 in a VAE that was loaded in half precision."""
        mean, std = (self.get_buffer(f"_latents_{name}").view(1, -1, 1, 1, 1) for name in ("mean", "std"))
        return mean, std

    def _normalised(self, raw: Tensor) -> Tensor:
        """Latents of the encoder's output, in the precision of the weights."""
        mean, std = self._statistics()
        return ((raw - mean) / std).to(self._weight.dtype)

    def _raw(self, latents: Tensor) -> Tensor:
        """The decoder's input for latents."""
        mean, std = self._statistics()
        return (latents * std + mean).to(latents.dtype)

    def _with_pending(self, frames: Tensor, state: VAEState) -> Tensor:
        """`frames` behind those that wait, once both are seen to belong together."""
        check_state(state, "encode", describe(self), self._weight)
        shape = (state.batch_size, RGB, None, state.height, state.width)
        check_chunk("frames", frames, state, shape, self._weight)
        return torch.cat([state.slots[PENDING], frames], dim=2)
