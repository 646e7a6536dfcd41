"""What a stream is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from genstream.schedulers.schedule import Schedule
from genstream.streaming.intake import TransformSettings
from genstream.streaming.noise import NoiseSource
from genstream.streaming.settings import StreamSettings
from genstream.transformer.adapters import LoraUse


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
        image_channels: `[B, in_channels - C, T, h, w]` behind the channels of the noisy latents, for models
            that take them; the last latent frame of them stands for all that follow.
        transform: how much a source is changed; None generates from noise alone.
        loras: the LoRAs that the stream starts with.
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
    image_channels: Tensor | None = None
    transform: TransformSettings | None = None
    loras: tuple[LoraUse, ...] = ()
    decode: bool = True

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {self.num_frames}")
        if (self.negative_embeds is None) != (self.settings.guidance_scale == 1):
            raise ValueError(
                f"negative_embeds must be given with guidance_scale above 1 and not without,"
                f" got {self.settings.guidance_scale} and {type(self.negative_embeds).__name__}"
            )
        self._check_transform()
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
    def highest_level(self) -> float:
        """Noise level that the source is brought to where nothing moves; 1 without a source."""
        return 1.0 if self.transform is None else self.schedule.entry(self.transform.strength)

    def _check_transform(self) -> None:
        if self.transform is None:
            return
        if self.initial_latents is not None:
            raise ValueError(
                "strength and initial_latents (or an image to start from) exclude each other, got both"
            )
        motion = self.transform.motion
        if motion is not None and motion.reduction >= self.highest_level:
            raise ValueError(
                f"motion must not reduce the noise level to 0: its reduction must be below"
                f" {self.highest_level:g}, where strength {self.transform.strength:g} starts, got"
                f" {motion.reduction:g}"
            )

    @property
    def batch_size(self) -> int:
        """Streams that advance together."""
        return self.prompt_embeds.shape[0]

    @property
    def given_frames(self) -> int:
        """Latent frames that are given, not generated."""
        return 0 if self.initial_latents is None else self.initial_latents.shape[2]
