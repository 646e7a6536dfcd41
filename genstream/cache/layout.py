"""Which latent frames are kept and where they stand: integers only."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class PositionPolicy(StrEnum):
    """Temporal RoPE position of the sinks once frames between them and the window have been dropped."""

    ABSOLUTE = "absolute"
    """Every key stays at its own frame index (Self Forcing, LongLive)."""
    WINDOW = "window"
    """The sinks stand directly in front of the window, so no distance ever exceeds the buffer."""


class Segment(NamedTuple):
    """A run of frames that is contiguous both in a chunk and in the buffer; in frames."""

    slot: int
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """Buffer `[sinks | ring]` of frame slots.

    Frame `i` (counted from the cache's origin) stands at slot `i` while it is a sink and at
    `sinks + (i - sinks) % ring` afterwards; the ring holds the window and the current chunk, so writing
    a new chunk overwrites exactly the frames that have left the window. Nothing is moved.

    Attributes:
        chunk_frames: latent frames generated together, at least 1.
        sink_frames: first latent frames, kept for ever.
        window_frames: most recent finished latent frames kept besides the sinks.
        positions: where the sinks stand in time.
        sink_reach_frames: only passes that end at or before this frame attend to the sinks, and those that
            write them; None: all do.
    """

    chunk_frames: int
    sink_frames: int
    window_frames: int
    positions: PositionPolicy = PositionPolicy.ABSOLUTE
    sink_reach_frames: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("chunk_frames", 1), ("sink_frames", 0), ("window_frames", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def ring_frames(self) -> int:
        """Slots of the ring: the window and the current chunk."""
        return self.window_frames + self.chunk_frames

    @property
    def capacity_frames(self) -> int:
        """Slots of the whole buffer."""
        return self.sink_frames + self.ring_frames

    def slot(self, frame: int) -> int:
        """Slot of a frame, counted from the cache's origin."""
        if frame < self.sink_frames:
            return frame
        return self.sink_frames + (frame - self.sink_frames) % self.ring_frames

    def segments(self, start: int, frames: int) -> list[Segment]:
        """Contiguous runs of slots for the frames `start .. start + frames - 1`; at most three."""
        runs: list[Segment] = []
        for offset in range(frames):
            slot = self.slot(start + offset)
            if runs and runs[-1].slot + runs[-1].length == slot:
                runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
            else:
                runs.append(Segment(slot, offset, 1))
        return runs

    def visible_frames(self, end: int) -> int:
        """Slots, from the first, that a pass over frames up to `end` (exclusive) attends to."""
        return min(end, self.capacity_frames)

    def hidden_frames(self, start: int, end: int) -> int:
        """Slots, from the first, that a pass over frames `start .. end - 1` leaves out of those."""
        reach = end if self.sink_reach_frames is None else self.sink_reach_frames
        return self.sink_frames if end > reach and start >= self.sink_frames else 0

    def kept(self, start: int, end: int) -> range:
        """Frames behind the sinks and before `start` that a pass over frames `start .. end - 1` sees."""
        return range(min(start, max(self.sink_frames, end - self.ring_frames)), start)

    def check_pass(self, start: int, frames: int) -> None:
        """A pass must leave no stale slot visible: it fills the ring's free part or the buffer's front.

        Raises:
            ValueError: the frames do not fit, or are fewer than a chunk after the buffer filled up.
        """
        end = start + frames
        fits_front = end <= self.capacity_frames
        if frames > self.capacity_frames or not (
            fits_front or self.chunk_frames <= frames <= self.ring_frames
        ):
            raise ValueError(
                f"a pass over {frames} frames from frame {start} does not fit the cache: after frame "
                f"{self.capacity_frames} a pass has {self.chunk_frames} to {self.ring_frames} frames"
            )

    def sink_positions(self, end: int) -> range:
        """Temporal positions of the sinks, counted from the origin, for a pass that ends at frame `end`."""
        first_kept = max(self.sink_frames, end - self.ring_frames)
        shift = first_kept - self.sink_frames if self.positions is PositionPolicy.WINDOW else 0
        return range(shift, shift + self.sink_frames)
