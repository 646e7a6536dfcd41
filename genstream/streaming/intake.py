"""What a video-to-video stream has taken in of its source: encoded chunk by chunk, noised to a level."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genstream.streaming.source import FrameSource
from genstream.vae.protocol import StreamingVAE, VAESpec, VAEState


@dataclass(frozen=True, kw_only=True)
class MotionNoise:
    """Less noise where the source moves much: there, the model would make up a motion of its own.

    A chunk's motion is the largest root mean square difference of two frames that follow each other, frames
    being in [-1, 1], as a share of `full_motion` and at most 1. It lowers the noise level by up to
    `reduction`; `inertia` is the share that the level of the chunk before keeps.

    Source: StreamDiffusionV2's code, whose values are the defaults.

    Attributes:
        reduction: of the noise level at full motion, in [0, 1).
        full_motion: difference that counts as full motion, above 0.
        inertia: in [0, 1).
    """

    reduction: float = 0.1
    full_motion: float = 0.2
    inertia: float = 0.1

    def __post_init__(self) -> None:
        for name in ("reduction", "inertia"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.full_motion > 0:
            raise ValueError(f"full_motion must be above 0, got {self.full_motion}")

    def level(self, highest: float, previous: float, motion: float) -> float:
        """Noise level of a chunk.

        Args:
            highest: level without motion.
            previous: level of the chunk before.
            motion: root mean square difference of two frames, at least 0.
        """
        lowered = highest - self.reduction * min(motion / self.full_motion, 1.0)
        return self.inertia * previous + (1 - self.inertia) * lowered


@dataclass(frozen=True, kw_only=True)
class TransformSettings:
    """How much a stream changes its source.

    Attributes:
        strength: noise level in (0, 1] that the source is brought to: 1 leaves nothing of it. A few-step
            student starts at its first trained step at or below it, or at it below all of them.
        motion: lowers the level where the source moves; None keeps it.
    """

    strength: float
    motion: MotionNoise | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Intake:
    """Frames of the source whose chunk is not finished yet. Each method gives the intake that follows.

    Only the encoder's state may advance in place.

    Attributes:
        vae: encoder state.
        waiting: frames `[1, 3, F, H, W]` whose chunk is not finished, the last one repeated at the end.
        latents: latent frames `[1, C, T, h, w]` of the first of them.
        previous: the frame in front of them, or none, `[1, 3, 0 or 1, H, W]`.
        level: noise level of the last chunk, in (0, 1].
        encoded: waiting frames that the encoder has seen.
        frames: frames taken from the source.
        ended: no other will be taken.
    """

    vae: VAEState
    waiting: Tensor
    latents: Tensor
    previous: Tensor
    level: float
    encoded: int = 0
    frames: int = 0
    ended: bool = False

    @classmethod
    def empty(cls, vae: StreamingVAE, height: int, width: int, level: float) -> Intake:
        """The intake of a stream that has not started; `height` and `width` in pixels."""
        spec, state = vae.spec, vae.init_state("encode", 1, height, width)
        like = next(iter(state.slots.values()))
        ratio = spec.spatial_ratio
        return cls(
            vae=state,
            waiting=like.new_zeros(1, 3, 0, height, width),
            latents=like.new_zeros(1, spec.latent_channels, 0, height // ratio, width // ratio),
            previous=like.new_zeros(1, 3, 0, height, width),
            level=level,
        )

    def filled(self, source: FrameSource, count: int, limit: int | None) -> Intake:
        """Takes from `source` what is there until `count` frames wait, or `limit` have been taken."""
        wanted = max(0, count - self.waiting.shape[2])
        if limit is not None:
            wanted = min(wanted, limit - self.frames)
        taken = [] if self.ended else source.take(wanted)
        waiting = torch.cat([self.waiting, *(_as_clip(frame, self.waiting) for frame in taken)], dim=2)
        frames = self.frames + len(taken)
        return replace(self, waiting=waiting, frames=frames, ended=source.ended or frames == limit)

    def completed(self, first: int, later: int) -> Intake:
        """After the end: the last frame repeated until whole chunks, of `first` and `later` frames, wait."""
        count = self.waiting.shape[2]
        if not self.ended or count == 0:
            return self
        missing = first - count if count < first else (first - count) % later
        last = self.waiting[:, :, -1:].expand(-1, -1, missing, -1, -1)
        return replace(self, waiting=torch.cat([self.waiting, last], dim=2))

    def encode(self, vae: StreamingVAE, count: int, latent_frames: int) -> Intake:
        """With the latents of the first `count` waiting frames; `latent_frames` make a chunk."""
        count = min(count, self.waiting.shape[2])
        fresh = self.waiting[:, :, self.encoded : count]
        state, parts = self.vae, [self.latents]
        if fresh.shape[2] and self.encoded == 0 and state.steps == 0:
            # One of its own, since a failure between the calls would leave it half advanced.
            state = state.clone()
            parts.append(encode_start(vae, fresh, state))
        elif fresh.shape[2]:
            parts.append(vae.encode_chunk(fresh, state))
        known = sum(part.shape[2] for part in parts)
        if self.ended and count == self.waiting.shape[2] and known < latent_frames:
            parts.append(vae.flush(state))
        encoded = max(self.encoded, count)
        return replace(self, vae=state, latents=torch.cat(parts, dim=2), encoded=encoded)

    def motion(self, frames: int) -> float:
        """Largest root mean square difference of two frames that follow each other in the next chunk."""
        clip = torch.cat([self.previous, self.waiting[:, :, :frames]], dim=2).float()
        if clip.shape[2] == 1:
            return 0.0
        difference = (clip[:, :, 1:] - clip[:, :, :-1]).square().mean(dim=(0, 1, 3, 4)).sqrt()
        # One synchronisation per chunk: the level decides which denoising steps there are.
        return float(difference.max())

    def after(self, frames: int, latent_frames: int) -> Intake:
        """Behind a finished chunk."""
        return replace(
            self,
            waiting=self.waiting[:, :, frames:],
            encoded=self.encoded - frames,
            latents=self.latents[:, :, latent_frames:],
            previous=self.waiting[:, :, frames - 1 : frames],
        )

    def restarted(self, vae: StreamingVAE) -> Intake:
        """With an encoder that has seen nothing: the next waiting frame is a stream's first one."""
        state = vae.init_state("encode", 1, self.vae.height, self.vae.width)
        return replace(self, vae=state, latents=self.latents[:, :, :0], encoded=0)

    def clone(self) -> Intake:
        """An independent copy."""
        return replace(self, vae=self.vae.clone())


def encode_start(vae: StreamingVAE, frames: Tensor, state: VAEState) -> Tensor:
    """Latents `[B, C, T, h, w]` of a stream's first frames `[B, 3, F, H, W]`, F at least 1.

    An encoder that fills its first latent frame like every other (TAEHV's published ones) would let all
    latents run ahead of what they decode to; it gets the first frame as often as that takes.
    """
    parts = [vae.encode_chunk(frames[:, :, :1], state)]
    if parts[0].shape[2] == 0 and not holds_back(vae.spec):
        copies = frames[:, :, :1].expand(-1, -1, vae.spec.temporal_ratio - 1, -1, -1)
        parts.append(vae.encode_chunk(copies, state))
    parts.append(vae.encode_chunk(frames[:, :, 1:], state))
    return torch.cat(parts, dim=2)


def holds_back(spec: VAESpec) -> bool:
    """Whether the VAE gives a latent frame's frames later than with it."""
    return spec.lookahead_latents > 0 or spec.first_latents > 1 or spec.chunk_latents > 1


def _as_clip(frame: Tensor, like: Tensor) -> Tensor:
    """`[3, H, W]` as `[1, 3, 1, H, W]` of the VAE's dtype, on its device."""
    return frame.to(like)[None, :, None]
