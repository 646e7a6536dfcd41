"""Frames as png files."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from genstream.io.errors import OutputError
from genstream.io.metadata import VideoMetadata

FRAME_PATTERN = "frame_*.png"
UNFINISHED_NAME = ".unfinished.png"
"""In a folder of frames, the one that is being written."""


class PngFolder:
    """A folder with `frame_000000.png` and so on, each whole at any time, even after a kill."""

    def __init__(self, folder: Path, metadata: VideoMetadata) -> None:
        self._folder = folder
        self._info = _png_info(metadata)
        self._written = 0

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append `frames` uint8 [F, H, W, 3]."""
        for frame in frames:
            path = self._folder / f"frame_{self._written:06d}.png"
            _write_png(path, frame, self._info, beside=self._folder / UNFINISHED_NAME)
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
            _write_png(self._path, frame, self._info)

    def close(self) -> None:
        """The file is complete once written."""

    def release(self) -> None:
        """The file is complete once written."""


def _png_info(metadata: VideoMetadata) -> PngInfo:
    info = PngInfo()
    for name, text in metadata.tags().items():
        info.add_itxt(name.capitalize(), text)
    return info


def _write_png(path: Path, frame: NDArray[np.uint8], info: PngInfo, beside: Path | None = None) -> None:
    """Write at once, or first under the name `beside`."""
    written = beside or path
    try:
        Image.fromarray(frame).save(written, format="PNG", pnginfo=info, compress_level=3)
        written.rename(path)
    except OSError as error:
        written.unlink(missing_ok=True)
        raise OutputError(f"cannot write output path {str(path)!r}: {error.strerror}") from error
