"""Frames as png files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from genstream.io.errors import OutputError
from genstream.io.metadata import VideoMetadata
from genstream.io.partial import partial_path

FRAME_PATTERN = "frame_*.png"
UNFINISHED_NAME = ".unfinished.png"
"""In a folder of frames, the one that is being written."""


class PngFolder:
    """A folder with `frame_000000.png` and so on, each whole at any time, even after a kill."""

    def __init__(self, path: Path, metadata: VideoMetadata) -> None:
        self._path = path
        self._folder = partial_path(path)
        self._info = _png_info(metadata)
        self._written = 0

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append `frames` uint8 [F, H, W, 3]."""
        for frame in frames:
            unfinished = self._folder / UNFINISHED_NAME
            with _naming(self._path, unfinished):
                _save(unfinished, frame, self._info)
                unfinished.rename(self._folder / f"frame_{self._written:06d}.png")
            self._written += 1

    def close(self) -> None:
        """Nothing is open between frames."""

    def release(self) -> None:
        """Nothing is open between frames."""


class PngImage:
    """One png file, for a stream of exactly one frame."""

    def __init__(self, path: Path, metadata: VideoMetadata) -> None:
        self._path = path
        self._info = _png_info(metadata)
        self._written = 0

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Write the only frame, uint8 [1, H, W, 3]."""
        self._written += len(frames)
        if self._written > 1:
            raise ValueError(
                f"output path {str(self._path)!r} is one image and takes 1 frame, got {self._written};"
                " for more frames use a path without a suffix (a folder of png) or .mp4, .webm, .gif"
            )
        for frame in frames:
            partial = partial_path(self._path)
            with _naming(self._path, partial):
                _save(partial, frame, self._info)

    def close(self) -> None:
        """The file is complete once written."""

    def release(self) -> None:
        """The file is complete once written."""


def _png_info(metadata: VideoMetadata) -> PngInfo:
    info = PngInfo()
    for name, text in metadata.tags().items():
        info.add_itxt(name.capitalize(), text)
    return info


def _save(path: Path, frame: NDArray[np.uint8], info: PngInfo) -> None:
    Image.fromarray(frame).save(path, format="PNG", pnginfo=info, compress_level=3)


@contextmanager
def _naming(output: Path, written: Path) -> Iterator[None]:
    """Where `written` fails, remove it and say which output it was for."""
    try:
        yield
    except OSError as error:
        written.unlink(missing_ok=True)
        raise OutputError(f"cannot write output path {str(output)!r}: {error.strerror}") from error
