"""Frames and images from files."""

from collections.abc import Iterator
from os import PathLike
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from genstream.io.png import FRAME_PATTERN

_OPAQUE = 255


def read_video(path: str | PathLike[str]) -> Iterator[NDArray[np.uint8]]:
    """Frames uint8 [H, W, 3] of a video file, a folder of png, or an image, one at a time."""
    source = Path(path)
    if source.is_dir():
        files = sorted(source.glob(FRAME_PATTERN))
        if not files:
            raise ValueError(f"video {str(source)!r} is a folder without any {FRAME_PATTERN}")
        for file in files:
            yield _open_rgb(file)
    elif source.suffix.lower() == ".png":
        yield _open_rgb(source)
    else:
        yield from _decode(source)


def read_image(path: str | PathLike[str], height: int, width: int) -> NDArray[np.uint8]:
    """The image at `path` as uint8 [height, width, 3]; one of another size is an error, not resized."""
    frame = _open_rgb(Path(path))
    found_height, found_width = frame.shape[:2]
    if (found_height, found_width) != (height, width):
        raise ValueError(
            f"image {str(path)!r} is {found_width}x{found_height}, the video is {width}x{height};"
            f" resize it first, with PIL.ImageOps.fit(image, ({width}, {height})), or ask for its own size"
        )
    return frame


def _decode(source: Path) -> Iterator[NDArray[np.uint8]]:
    if not source.is_file():
        raise ValueError(f"video {str(source)!r} is not a file")
    stream = imageio_ffmpeg.read_frames(f"file:{source}", output_params=["-fps_mode", "passthrough"])
    try:
        width, height = next(stream)["size"]
    except (OSError, StopIteration) as error:
        raise ValueError(f"video {str(source)!r} cannot be read: no video stream found in it") from error
    for data in stream:
        yield np.frombuffer(data, np.uint8).reshape(height, width, 3)


def _open_rgb(path: Path) -> NDArray[np.uint8]:
    """Pixels uint8 [H, W, 3], upright; transparency is an error, since there is nothing to put behind it."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                lowest_alpha, _ = upright.convert("RGBA").getchannel("A").getextrema()
                if lowest_alpha != _OPAQUE:
                    raise ValueError(f"image {str(path)!r} has transparent pixels; flatten it to RGB first")
            return np.array(upright.convert("RGB"), np.uint8)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a whole image file"
        raise ValueError(f"image {str(path)!r} cannot be read: {reason}") from error
