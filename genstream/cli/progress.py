"""Progress of a run on stderr: a live bar on a terminal, now and then a line elsewhere."""

import sys
from types import TracebackType
from typing import Protocol, Self

from genstream.cli.figures import RunClock

_LINE_EVERY_S = 5.0


class Progress(Protocol):
    """Shows how far a run is."""

    def show(self, clock: RunClock) -> None:
        """Take note of another chunk."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LiveBar:
    """A bar that rich redraws in place."""

    def __init__(self, total: int, fps: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._total = total
        self._fps = fps
        self._progress = Progress(
            BarColumn(bar_width=16),
            TextColumn("{task.completed:.0f}/{task.total:.0f} frames"),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=total, figures="")

    def show(self, clock: RunClock) -> None:
        """Redraw."""
        self._progress.update(
            self._task, completed=clock.frames, figures=_figures(clock, self._total, self._fps)
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class PlainLines:
    """A line for the first chunk, then one every few seconds, and one for the last."""

    def __init__(self, total: int, fps: float) -> None:
        self._total = total
        self._fps = fps
        self._next_line_s = 0.0

    def show(self, clock: RunClock) -> None:
        """Print a line if it is time for one."""
        if clock.elapsed_s >= self._next_line_s or clock.frames >= self._total:
            self._next_line_s = clock.elapsed_s + _LINE_EVERY_S
            print(
                f"{clock.frames}/{self._total} frames, {_figures(clock, self._total, self._fps)}",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def progress_for(total: int, fps: float) -> Progress:
    """The display that fits stderr, for `total` frames to be played at `fps`."""
    return LiveBar(total, fps) if sys.stderr.isatty() else PlainLines(total, fps)


def _figures(clock: RunClock, total: int, fps: float) -> str:
    """The last chunk is cut to the wanted length: its own rate says nothing, so the whole run's is shown."""
    rate = clock.frame_rate if clock.frames >= total else clock.last_frame_rate
    first_s = clock.time_to_first_frame_s or 0.0
    return f"{rate:.1f} fps, {rate / fps:.2f}x real time, first frame after {first_s:.2f} s"
