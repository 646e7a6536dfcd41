"""What one step of a stream gives."""

from dataclasses import dataclass

from torch import Tensor

from genstream.streaming.controls import Applied


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Wall-clock seconds of the parts of a step; on a GPU only their sum is meaningful."""

    denoise_s: float
    commit_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Frames generated together.

    Attributes:
        index: number of the chunk, from 0.
        first_frame: index of its first frame in the stream.
        frames: `[B, 3, F, H, W]` in [-1, 1]; None when the stream is not decoded or nothing was generated.
            A VAE that looks ahead or works in pieces gives those of a latent frame with a later chunk.
        latents: `[B, C, T, h, w]`; None when nothing was generated (paused, stopped, source not there yet).
        applied: the controls that took effect at its start.
        timings: None when nothing was generated.
        noise_level: in (0, 1], that the source was brought to; None without a source.
    """

    index: int
    first_frame: int
    frames: Tensor | None
    latents: Tensor | None
    applied: tuple[Applied, ...]
    timings: Timings | None
    noise_level: float | None = None
