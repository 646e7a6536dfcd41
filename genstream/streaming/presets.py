"""How the published students are run, as data. Free of torch, so that the command line lists them at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from genstream.cache.layout import PositionPolicy
from genstream.streaming.settings import ContextPolicy, RecachePolicy, StreamSettings

_FEW_STEP = "FewStepScheduler"


class EngineKind(StrEnum):
    """What generates the chunks."""

    CACHE = "cache"
    """One chunk at a time, against the keys and values of finished ones."""
    QUEUE = "queue"
    """A window of chunks at rising noise levels together."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How one published student is run.

    Attributes:
        summary: what it is, in a line.
        steps: timesteps of the denoising steps.
        shift: timestep shift.
        warped: the steps are given before the shift, not after it.
        settings: cache, context and prompts.
        engine: what generates the chunks.
        takes_image: made for transformers that take image channels beside their latents.
    """

    summary: str
    settings: StreamSettings
    steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0
    warped: bool = True
    engine: EngineKind = EngineKind.CACHE
    takes_image: bool = False

    def check_scheduler(self, name: str, scheduler: str) -> None:
        """Raise ValueError if a model with a scheduler of that class cannot be run that way."""
        if scheduler != _FEW_STEP:
            raise ValueError(
                f"preset {name!r} needs a few-step student, this model has a {scheduler}; if its weights are"
                f" a student's, genstream convert FOLDER --preset {name} -o NEW_FOLDER says so"
            )

    def check_chunk(self, name: str, chunk_frames: int) -> None:
        """Raise ValueError if a model that was trained for such chunks cannot be run that way."""
        if self.settings.chunk_frames != chunk_frames:
            raise ValueError(
                f"preset {name!r} generates {self.settings.chunk_frames} latent frames at a time, "
                f"this model was trained for {chunk_frames} (chunk_frames)"
            )

    def check_source(self, name: str) -> None:
        """Raise ValueError if a stream that is run that way cannot follow a video."""
        if self.engine is EngineKind.QUEUE:
            raise ValueError(f"preset {name!r} starts all chunks as noise and cannot follow a video")

    def check_channels(self, name: str, in_channels: int, out_channels: int) -> None:
        """Raise ValueError if a transformer with so many channels cannot be run that way."""
        if self.takes_image and in_channels == out_channels:
            raise ValueError(
                f"preset {name!r} is for image-to-video models: in_channels must be above the "
                f"{out_channels} of the latents, got {in_channels}"
            )


# Sources: the code of each project; for MotionStream, whose code is not out, its paper (arXiv 2511.01266),
# which names three steps but not which. Only LongLive rebuilds its past for a new prompt.
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "self-forcing": Preset(
            summary="Self Forcing 1.3B: 4 steps, rolling window of 21 latent frames",
            settings=StreamSettings(window_frames=18, recache=RecachePolicy.NOTHING),
        ),
        "causvid": Preset(
            summary="CausVid 1.3B: 3 steps that are not warped, shift 8, window of 21 latent frames",
            steps=(1000.0, 757.0, 522.0),
            shift=8.0,
            warped=False,
            settings=StreamSettings(window_frames=18, recache=RecachePolicy.NOTHING),
        ),
        "longlive": Preset(
            summary="LongLive 1.3B: 4 steps, 3 sink frames, window of 12; re-caches when the prompt changes",
            settings=StreamSettings(sink_frames=3, window_frames=6, recache=RecachePolicy.WINDOW),
        ),
        "rolling-forcing": Preset(
            summary="Rolling Forcing 1.3B: 5 chunks at rising noise levels together, anchored to the first",
            steps=(1000.0, 800.0, 600.0, 400.0, 200.0),
            settings=StreamSettings(
                sink_frames=3,
                window_frames=18,
                positions=PositionPolicy.WINDOW,
                recache=RecachePolicy.NOTHING,
            ),
            engine=EngineKind.QUEUE,
        ),
        "krea": Preset(
            summary="Krea Realtime 14B: 4 steps and one at timestep 0, past rebuilt from 3 latent frames",
            steps=(1000.0, 750.0, 500.0, 250.0, 0.0),
            settings=StreamSettings(
                window_frames=3, context=ContextPolicy.RECOMPUTE, recache=RecachePolicy.NOTHING
            ),
        ),
        "motionstream": Preset(
            summary="MotionStream: 3 steps, shift 6, 3 sink frames and 3 in the window; starts from an image",
            steps=(1000.0, 2000 / 3, 1000 / 3),
            shift=6.0,
            settings=StreamSettings(
                sink_frames=3,
                window_frames=3,
                positions=PositionPolicy.WINDOW,
                recache=RecachePolicy.NOTHING,
            ),
            takes_image=True,
        ),
    }
)


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
