"""What a stream is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from genstream.cache.layout import CacheLayout, PositionPolicy
from genstream.schedulers.schedule import Schedule
from genstream.streaming.noise import NoiseSource


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How a model is run; fixed by how it was trained.

    Attributes:
        chunk_frames: latent frames generated together.
        sink_frames: first latent frames, kept for ever.
        window_frames: latent frames kept besides the sinks and the current chunk; None keeps all.
        positions: temporal positions of the sinks.
        context_timestep: timestep of the pass that commits a finished chunk, in [0, 1000].
        independent_first_frame: the first chunk is a single latent frame.
        guidance_scale: how far each velocity is moved away from that of the negative prompt, at least 1;
            1 is off. Each denoising step then costs two passes.
    """

    chunk_frames: int = 3
    sink_frames: int = 0
    window_frames: int | None = None
    positions: PositionPolicy = PositionPolicy.ABSOLUTE
    context_timestep: float = 0.0
    independent_first_frame: bool = False
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.context_timestep <= 1000:
            raise ValueError(f"context_timestep must be in [0, 1000], got {self.context_timestep}")
        if not 1 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale must be at least 1 (off) and finite, got {self.guidance_scale}")
        self.layout(self.chunk_frames)

    def chunk_at(self, frame: int) -> int:
        """Latent frames of the chunk that starts at latent frame `frame`."""
        return 1 if self.independent_first_frame and frame == 0 else self.chunk_frames

    def layout(self, latent_frames: int | None) -> CacheLayout:
        """The cache of a stream of so many latent frames, None for an endless one.

        Raises:
            ValueError: an endless stream would have to keep everything.
        """
        window = self.window_frames
        if window is None:
            if latent_frames is None:
                raise ValueError("window_frames must be a number for an endless stream, got None (keep all)")
            window = max(0, latent_frames - self.sink_frames - self.chunk_frames)
        return CacheLayout(
            chunk_frames=self.chunk_frames,
            sink_frames=self.sink_frames,
            window_frames=window,
            positions=self.positions,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamRequest:
    """A stream, as it was asked for; never changes.

    Attributes:
        prompt: one for each element of the batch.
        prompt_embeds: `[B, tokens, text_dim]`.
        height: of a frame in pixels.
        width: of a frame in pixels.
        num_frames: frames that come out, at least 1; None for an endless stream.
        noise: where the noise comes from.
        schedule: noise levels of the denoising steps.
        settings: how the model is run.
        initial_latents: clean latent frames `[B, C, T, h, w]` that the stream starts with, whole chunks.
        negative_embeds: `[B, tokens, text_dim]`, what guidance leads away from; None without guidance.
        image_embeds: CLIP image tokens `[B, tokens, image_dim]`, for models that take them.
        decode: decode the latents; otherwise the stream gives latents only.
    """

    prompt: tuple[str, ...]
    prompt_embeds: Tensor
    height: int
    width: int
    num_frames: int | None
    noise: NoiseSource
    schedule: Schedule
    settings: StreamSettings
    initial_latents: Tensor | None = None
    negative_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    decode: bool = True

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {self.num_frames}")
        if (self.negative_embeds is None) != (self.settings.guidance_scale == 1):
            raise ValueError(
                f"negative_embeds must be given with guidance_scale above 1 and not without,"
                f" got {self.settings.guidance_scale} and {type(self.negative_embeds).__name__}"
            )
        frame = 0
        while frame < self.given_frames:
            frame += self.settings.chunk_at(frame)
        if frame != self.given_frames:
            raise ValueError(
                f"initial_latents must be whole chunks of {self.settings.chunk_frames} latent frames"
                f"{' after the first single one' if self.settings.independent_first_frame else ''}, "
                f"got {self.given_frames} latent frames"
            )

    @property
    def batch_size(self) -> int:
        """Streams that advance together."""
        return self.prompt_embeds.shape[0]

    @property
    def given_frames(self) -> int:
        """Latent frames that are given, not generated."""
        return 0 if self.initial_latents is None else self.initial_latents.shape[2]
