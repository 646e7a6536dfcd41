"""How a model is run: every knob in which the published students differ. Free of torch, like the presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from genstream.cache.layout import CacheLayout, PositionPolicy
from genstream.shapes import check_guidance, check_number, check_whole

P = TypeVar("P", bound=StrEnum)

DEFAULT_STRENGTH = 0.85
"""Above a trained step of every published student: with four at shift 5 the lower two are made."""


class ContextPolicy(StrEnum):
    """Where the keys and values of finished chunks come from."""

    CLEAN = "clean"
    """A pass over each finished chunk (Self Forcing)."""
    FUSED = "fused"
    """The same pass, made together with the next chunk's first denoising step: one pass less per chunk."""
    LAST_STEP = "last_step"
    """What the last denoising step wrote; no pass of their own."""
    RECOMPUTE = "recompute"
    """Built anew from the kept latents in front of every chunk, so that nothing of dropped frames stays (Krea
    Realtime). Without sinks the oldest kept frame is encoded again from its decoded pixels."""


class RecachePolicy(StrEnum):
    """What a new prompt does to the keys and values of the past."""

    NOTHING = "nothing"
    """They stay as the old prompt made them."""
    WINDOW = "window"
    """They are rebuilt with the new prompt; the sinks stay once there is more than the buffer holds."""
    ALL = "all"
    """They are rebuilt with the new prompt, and the window's first frames become the new sinks."""


_POLICIES: Mapping[str, type[StrEnum]] = {
    "positions": PositionPolicy,
    "context": ContextPolicy,
    "recache": RecachePolicy,
}


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How a model is run; fixed by how it was trained. Policies may be given by their names.

    Attributes:
        chunk_frames: latent frames generated together.
        sink_frames: first latent frames, kept for ever.
        window_frames: latent frames kept besides the sinks and the current chunk; None keeps all.
        positions: temporal positions of the sinks.
        context: where the keys and values of finished chunks come from.
        context_timestep: timestep of the passes that make them, in [0, 1000].
        recache: what a new prompt does to them, where its control names nothing else.
        past_weight: factor in (0, 1] on the attention that a chunk pays, while it is denoised, to every past
            frame but the first; 1 is off.
        independent_first_frame: the first chunk is a single latent frame.
        guidance_scale: how far each velocity is moved away from that of the negative prompt, at least 1;
            1 is off. Each denoising step then costs two passes.
    """

    chunk_frames: int = 3
    sink_frames: int = 0
    window_frames: int | None = None
    positions: PositionPolicy = PositionPolicy.ABSOLUTE
    context: ContextPolicy = ContextPolicy.CLEAN
    context_timestep: float = 0.0
    recache: RecachePolicy = RecachePolicy.ALL
    past_weight: float = 1.0
    independent_first_frame: bool = False
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, kind in _POLICIES.items():
            object.__setattr__(self, name, _policy(name, kind, getattr(self, name)))
        # Numbers of numpy become Python's, which can be saved.
        for name in ("context_timestep", "past_weight", "guidance_scale"):
            check_number(name, value := getattr(self, name))
            object.__setattr__(self, name, float(value))
        for name in ("chunk_frames", "sink_frames", "window_frames"):
            if (frames := getattr(self, name)) is not None or name != "window_frames":
                check_whole(name, frames)
                object.__setattr__(self, name, int(frames))
        if not 0 <= self.context_timestep <= 1000:
            raise ValueError(f"context_timestep must be in [0, 1000], got {self.context_timestep}")
        if not 0 < self.past_weight <= 1:
            raise ValueError(f"past_weight must be above 0 and at most 1 (off), got {self.past_weight}")
        check_guidance("guidance_scale", self.guidance_scale)
        if self.context is ContextPolicy.FUSED and self.guidance_scale > 1:
            raise ValueError(
                f"context 'fused' makes one pass per denoising step and excludes guidance, which makes two: "
                f"guidance_scale must be 1, got {self.guidance_scale}"
            )
        if self.context is ContextPolicy.RECOMPUTE and self.sink_frames == self.window_frames == 0:
            raise ValueError(
                "context 'recompute' needs latents to build from: window_frames must be above 0, got 0"
            )
        self.layout(self.chunk_frames)

    @property
    def sees_past(self) -> bool:
        """Whether a chunk sees anything of those in front of it: models of whole clips have one."""
        return self.sink_frames > 0 or self.window_frames != 0

    @property
    def reencodes(self) -> bool:
        """Whether the oldest frame of the context comes from decoded pixels, once frames are dropped."""
        return self.context is ContextPolicy.RECOMPUTE and self.sink_frames == 0

    def chunk_at(self, frame: int) -> int:
        """Latent frames of the chunk that starts at latent frame `frame`."""
        return 1 if self.independent_first_frame and frame == 0 else self.chunk_frames

    def chunks_covering(self, latent_frames: int) -> int:
        """Chunks from the start of a stream that hold at least `latent_frames`, and at least the first."""
        behind_first = max(0, latent_frames - self.chunk_at(0))
        return 1 + -(-behind_first // self.chunk_frames)

    def layout(self, latent_frames: int | None) -> CacheLayout:
        """The cache of a stream of so many latent frames, None for an endless one.

        Raises:
            ValueError: an endless stream would have to keep everything.
        """
        sinks, window = self.sink_frames, self.window_frames
        if window is None:
            if latent_frames is None:
                raise ValueError("window_frames must be a number for an endless stream, got None (keep all)")
            window = max(0, latent_frames - sinks - self.chunk_frames)
        if self.context is ContextPolicy.RECOMPUTE:
            # The buffer is filled from its front each time: the kept first frames are nothing special in it.
            sinks, window = 0, sinks + window
        return CacheLayout(
            chunk_frames=self.chunk_frames,
            sink_frames=sinks,
            window_frames=window,
            positions=self.positions,
        )


def _policy(name: str, kind: type[P], value: str) -> P:
    """A policy by its own value or its name."""
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{name} must be one of {[str(each) for each in kind]}, got {value!r}") from None
