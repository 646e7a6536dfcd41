"""Video files, written frame by frame while they are generated.

A file grows under a partial name (`out.partial.mp4`) and takes its final name only when it is whole.
"""

import math
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from genstream.io.encoder import VIDEO_SUFFIXES, Encoder
from genstream.io.errors import OutputError
from genstream.io.metadata import VideoMetadata
from genstream.io.partial import claim, partial_path
from genstream.io.png import FRAME_PATTERN, UNFINISHED_NAME, PngFolder, PngImage

ALLOWED_PATHS = ".mp4, .webm, .gif, .png (one frame), or no suffix for a folder of png files"

_MOST_FPS = {".gif": 100, ".mp4": 1000, ".webm": 1000}
_LEAST_FPS = {".gif": 100 / 65535}
"""A gif counts in hundredths of a second, up to 65,535 of them."""


class FrameSink(Protocol):
    """Where frames go: an encoder or png files."""

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append frames uint8 [F, H, W, 3]."""

    def close(self) -> None:
        """Complete the output; raises OutputError if that fails."""

    def release(self) -> None:
        """Let go of processes and files, whatever state the output is in."""


class VideoWriter:
    """Takes frames until `finish` gives the file its final name, or `abandon` leaves it partial.

    As a context manager it finishes at the end and on Ctrl-C, and abandons on any other exception.
    Encoding runs on a thread, at most one `write` behind.
    """

    def __init__(
        self, path: Path, sink: FrameSink, claimed: int, *, width: int, height: int, overwrite: bool
    ) -> None:
        self.path = path
        self.partial = partial_path(path)
        self.frames_written = 0
        self._frame_shape = (height, width, 3)
        self._overwrite = overwrite
        self._sink = sink
        self._claimed = claimed
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="video-writer")
        self._pending: Future[None] | None = None
        self._open = True

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append `frames` uint8 [F, H, W, 3]; an error may belong to the call before."""
        if frames.dtype != np.uint8 or frames.shape[1:] != self._frame_shape:
            raise ValueError(
                f"frames must be uint8 [F, {', '.join(map(str, self._frame_shape))}],"
                f" got {frames.dtype} {list(frames.shape)}"
            )
        self._wait()
        self._pending = self._thread.submit(self._sink.write, frames)
        self.frames_written += len(frames)

    def finish(self) -> Path:
        """Complete the file and give it its final name."""
        try:
            self._wait()
            self._sink.close()
        except OutputError as error:
            if self._holds_frames():
                self._name_partial(error)
            raise
        finally:
            self._shut_down()
        if not self.frames_written:
            self._remove_partial()
            raise OutputError(f"output path {str(self.path)!r} was not written: no frame was generated")
        check_replaceable(self.path, overwrite=self._overwrite)
        if self.path.is_dir():
            shutil.rmtree(self.path)
        os.replace(self.partial, self.path)
        return self.path

    def abandon(self) -> Path | None:
        """Stop without the final name; returns the partial file, or None if it held nothing."""
        self._shut_down()
        if self._holds_frames():
            return self.partial
        self._remove_partial()
        return None

    def _holds_frames(self) -> bool:
        """Whether the partial output is worth naming; png files that could not be written are gone."""
        if not self.frames_written or not self.partial.exists():
            return False
        return not self.partial.is_dir() or any(self.partial.iterdir())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._open:
            return
        interrupted = isinstance(error, KeyboardInterrupt) and self.frames_written > 0
        if error is None or interrupted:
            self.finish()
            return
        if self.abandon() is not None and error is not None:
            self._name_partial(error)

    def _name_partial(self, error: BaseException) -> None:
        error.add_note(f"the frames made so far are in {str(self.partial)!r}")

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _shut_down(self) -> None:
        if self._open:
            self._open = False
            self._thread.shutdown()
            self._sink.release()
            os.close(self._claimed)

    def _remove_partial(self) -> None:
        if self.partial.is_dir():
            shutil.rmtree(self.partial)
        else:
            self.partial.unlink(missing_ok=True)


def open_writer(
    path: str | os.PathLike[str],
    *,
    fps: float,
    width: int,
    height: int,
    metadata: VideoMetadata,
    overwrite: bool,
) -> VideoWriter:
    """A writer for the format that the suffix of `path` names; everything that can be wrong is found here.

    Sizes in pixels, `fps` in frames per second. Without a suffix, or ending in "/", `path` is a folder.
    """
    target = check_path(path, overwrite=overwrite)
    if not overwrite and os.path.lexists(partial := partial_path(target)):
        raise OutputError(f"output path {str(path)!r} would replace {str(partial)!r} and overwriting is off")
    suffix = target.suffix.lower()
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be a positive number, got {fps}")
    if fps > (most := _MOST_FPS.get(suffix, math.inf)):
        raise ValueError(f"fps must be at most {most} for {suffix}, got {fps:g}")
    if fps < (least := _LEAST_FPS.get(suffix, 0)):
        raise ValueError(f"fps must be at least {least:.4f} for {suffix}, got {fps:g}")
    if suffix in (".mp4", ".webm") and (width % 2 or height % 2):
        raise ValueError(
            f"width and height must be even for {suffix}, got {width}x{height}; .gif and .png take any size"
        )
    claimed = _start_partial(target)
    sink: FrameSink
    if suffix in VIDEO_SUFFIXES:
        sink = Encoder(target, fps=fps, width=width, height=height, metadata=metadata)
    else:
        sink = PngImage(target, metadata) if suffix else PngFolder(target, metadata)
    return VideoWriter(target, sink, claimed, width=width, height=height, overwrite=overwrite)


def check_path(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """`path` as a Path, if its format is known, its folder exists and nothing stands in the way."""
    target = Path(path)
    suffix = "" if os.fspath(path).endswith(("/", os.sep)) else target.suffix.lower()
    if target.name in ("", "..", "-") or target.name.lower() in (".png", *VIDEO_SUFFIXES):
        raise ValueError(f"output path must name a file, got {os.fspath(path)!r}; allowed: {ALLOWED_PATHS}")
    if target.suffix and not suffix:
        raise ValueError(f"a folder as output path must have no suffix, got {os.fspath(path)!r}")
    if suffix not in ("", ".png", *VIDEO_SUFFIXES):
        raise ValueError(f"output path must end in {ALLOWED_PATHS}; got {os.fspath(path)!r}")
    if not target.parent.is_dir():
        found = "is no folder" if target.parent.exists() else "does not exist"
        raise OutputError(f"output path {str(target)!r}: the folder {str(target.parent)!r} {found}")
    check_replaceable(target, overwrite=overwrite)
    return target


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError unless `path` is free or may be replaced."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise OutputError(f"output path {str(path)!r} exists and overwriting is off; choose another name")
    if path.is_dir():
        if path.suffix:
            raise OutputError(f"output path {str(path)!r} is a folder; give the name of a file")
        if path.is_symlink():
            raise OutputError(f"output path {str(path)!r} is a link to a folder; give the folder's own name")
        _check_only_frames(path)
    elif not path.suffix:
        raise OutputError(f"output path {str(path)!r} is a file; without suffix it must be a folder of png")


def _check_only_frames(folder: Path) -> None:
    """Replacing a folder deletes what is in it: only our own frames may be."""
    ours = {folder / UNFINISHED_NAME, *folder.glob(FRAME_PATTERN)}
    if any(entry not in ours for entry in folder.iterdir()):
        raise OutputError(
            f"output path {str(folder)!r} is a folder that holds other things than {FRAME_PATTERN};"
            " choose an empty or a new one"
        )


def _start_partial(target: Path) -> int:
    """Make and claim the partial file or folder, so that a path that cannot be written is known at once."""
    partial = partial_path(target)
    try:
        if not target.suffix:
            if partial.is_dir():
                os.close(claim(target))
                _check_only_frames(partial)
                shutil.rmtree(partial)
            partial.mkdir()
            return claim(target)
        partial.open("ab").close()
        claimed = claim(target)
        partial.open("wb").close()
        return claimed
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write output path {str(target)!r}: {error.strerror}") from error
