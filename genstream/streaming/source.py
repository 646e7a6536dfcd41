"""Where the frames of a video-to-video stream come from."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from threading import Lock
from typing import Protocol, runtime_checkable

from torch import Tensor

from genstream.conditioning.image import Picture, as_pixels

_logger = logging.getLogger(__name__)


@runtime_checkable
class FrameSource(Protocol):
    """Gives frames to a stream, which asks for as many as its next chunk lacks."""

    @property
    def ended(self) -> bool:
        """Whether all frames have been taken and no other will come."""
        ...

    def take(self, count: int) -> list[Tensor]:
        """The next frames `[3, H, W]` in [-1, 1], at most `count`; fewer where no more are there yet."""
        ...


class IteratedFrames:
    """The frames of an iterable, all of them, as fast as it gives them: a video file, a list.

    Args:
        frames: PIL images, uint8 `[H, W, 3]`, or tensors `[3, H, W]` in [-1, 1].
        height: of every frame in pixels.
        width: of every frame in pixels.
    """

    def __init__(self, frames: Iterable[Picture], *, height: int, width: int) -> None:
        self._frames = iter(frames)
        self._size = (height, width)
        self._ready: list[Tensor] = []
        self._seen = 0
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the iterable has ended."""
        return self._ended and not self._ready

    def take(self, count: int) -> list[Tensor]:
        """The next `count` frames; waits for them, and gives fewer only at the end.

        Raises:
            ValueError: a frame has another size. It is left out if the stream goes on all the same.
        """
        while len(self._ready) < count and not self._ended:
            try:
                frame = next(self._frames)
            except StopIteration:
                self._ended = True
                break
            self._seen += 1
            self._ready.append(as_pixels(f"frame {self._seen - 1} of the source", frame, *self._size))
        taken, self._ready = self._ready[:count], self._ready[count:]
        return taken


class LiveFrames:
    """A camera's latest frames: bounded, so that a stream which is slower never falls behind.

    When it is full, a new frame pushes the oldest out. One thread may put while another takes.

    Args:
        height: of every frame in pixels.
        width: of every frame in pixels.
        capacity: frames that may wait; as many as a chunk has make the longest delay about a chunk.
    """

    def __init__(self, *, height: int, width: int, capacity: int = 12) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._size = (height, width)
        self._capacity = capacity
        self._waiting: deque[Tensor] = deque()
        self._lock = Lock()
        self._closed = False
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """Frames that were pushed out before the stream took them."""
        return self._dropped

    @property
    def ended(self) -> bool:
        """Whether it is closed and empty."""
        with self._lock:
            return self._closed and not self._waiting

    def put(self, frame: Picture) -> None:
        """Add the newest frame: PIL image, uint8 `[H, W, 3]`, or tensor `[3, H, W]` in [-1, 1].

        Raises:
            ValueError: the frame has another size, or there was a `close`; the stream does not notice.
        """
        pixels = as_pixels("frame", frame, *self._size)
        with self._lock:
            if self._closed:
                raise ValueError("frame must be put before close, got one after it")
            self._waiting.append(pixels)
            if len(self._waiting) <= self._capacity:
                return
            self._waiting.popleft()
            self._dropped += 1
            first = self._dropped == 1
        if first:
            _logger.warning("frames come faster than the stream takes them: the oldest are dropped")

    def close(self) -> None:
        """No frame will follow; the stream ends behind those that wait."""
        with self._lock:
            self._closed = True

    def take(self, count: int) -> list[Tensor]:
        """The oldest waiting frames, at most `count`; never waits."""
        with self._lock:
            return [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]


def as_source(frames: FrameSource | Iterable[Picture], height: int, width: int) -> FrameSource:
    """`frames` itself where it is a source, else the frames of the iterable."""
    if isinstance(frames, FrameSource):
        return frames
    return IteratedFrames(frames, height=height, width=width)
