"""Frames and images from files."""

import logging
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from genstream.io.encoder import VIDEO_SUFFIXES
from genstream.io.png import FRAME_PATTERN
from genstream.shapes import check_same_size

logger = logging.getLogger(__name__)

READABLE_SUFFIXES = (*VIDEO_SUFFIXES, ".mov", ".m4v", ".mkv", ".avi")
"""Of video files that are found in folders; one that is named may be anything that ffmpeg knows."""
_OPAQUE = 255
_PATIENCE_S = 10.0
"""What imageio gives ffmpeg to tell the size of a video; a machine that sleeps or is busy takes longer."""
_ATTEMPTS = 3
_DEEP_MODES = ("I", "F")
"""Pillow's for 16 and 32 bits, which it would cut off."""
_FRAME_RATE = re.compile(rb"Video:.* (\d+(?:\.\d+)?) fps")


@dataclass(frozen=True, kw_only=True)
class VideoFile:
    """A video to read clips from.

    Attributes:
        path: a file, or a folder of png.
        frames: in it.
        fps: frames per second; 0 where frames cannot be found by time, as in a folder or a gif.
    """

    path: Path
    frames: int
    fps: float


def find_videos(folder: str | PathLike[str], companions: Sequence[str] = ()) -> list[Path]:
    """All video files and folders of png in `folder` and the folders in it, sorted; others are told of.

    Args:
        folder: to search.
        companions: suffixes of files that belong to videos, such as ".txt", of which nothing is told.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"videos must be a folder, got {str(root)!r}")
    files, frames, others = _listed(root)
    kinds = f"{', '.join(READABLE_SUFFIXES)} or folders of {FRAME_PATTERN}"
    if not files and not frames:
        raise ValueError(f"videos must hold {kinds}, got {str(root)!r}")
    if passed := sum(path.suffix.lower() not in companions for path in others):
        logger.warning("%s: %d files passed over that are not %s", root, passed, kinds)
    return sorted([*files, *{frame.parent for frame in frames}])


def video_files(folder: str | PathLike[str], companions: Sequence[str] = ()) -> list[Path]:
    """All files that such videos consist of, and those that belong to them; none where there is no folder.

    Args:
        folder: to search.
        companions: suffixes of files that belong to a video of their name beside them, such as ".txt".
    """
    files, frames, others = _listed(Path(folder))
    named = {file.with_suffix("") for file in files} | {frame.parent for frame in frames}
    beside = [path for path in others if path.suffix.lower() in companions and path.with_suffix("") in named]
    return [*files, *frames, *beside]


def _listed(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Video files, frames of videos and all other files, in a folder and the folders in it."""
    files: list[Path] = []
    frames: list[Path] = []
    others: list[Path] = []
    for path in folder.rglob("*"):
        if path.is_file():
            is_frame = path.match(FRAME_PATTERN)
            kind = files if path.suffix.lower() in READABLE_SUFFIXES else frames if is_frame else others
            kind.append(path)
    return files, frames, others


def inspect_video(path: str | PathLike[str]) -> VideoFile:
    """Count the frames of a video, without decoding them unless it is a gif."""
    source = Path(path)
    if source.is_dir():
        return VideoFile(path=source, frames=len(_frame_files(source)), fps=0.0)
    _check_exists(source)
    # Not all parts of a gif are frames, and each frame lasts as long as it says.
    is_gif = source.suffix.lower() == ".gif"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-i", f"file:{source}"]
    command += ["-map", "0:v:0", *(["-fps_mode", "passthrough"] if is_gif else ["-c", "copy"])]
    command += ["-f", "framecrc", "-"]  # one line for each frame, after a few that begin with #
    done = subprocess.run(command, capture_output=True, check=False)
    frames = sum(not line.startswith(b"#") for line in done.stdout.splitlines())
    if done.returncode != 0 or frames == 0:
        raise ValueError(f"video {str(source)!r} cannot be read: no video stream found in it")
    rate = _FRAME_RATE.search(done.stderr)
    return VideoFile(path=source, frames=frames, fps=float(rate[1]) if rate and not is_gif else 0.0)


def read_clip(video: VideoFile, start: int, count: int, shorter_side: int) -> NDArray[np.uint8]:
    """`count` frames from frame `start` on, [count, H, W, 3]; nothing else of the video is kept in memory.

    Args:
        video: to read from.
        start: frames in front of the clip.
        count: frames of the clip.
        shorter_side: pixels of height or width, whichever is smaller, that each frame is resized to.
    """
    return _read(video, start, count, partial(_resized, shorter_side=shorter_side))


def read_cropped(video: VideoFile, start: int, count: int, height: int, width: int) -> NDArray[np.uint8]:
    """`count` frames from frame `start` on, [count, height, width, 3].

    Each frame is made as small as still covers that size, and what is too much is cut off on both sides.

    Args:
        video: to read from.
        start: frames in front of the clip.
        count: frames of the clip.
        height: pixels.
        width: pixels.
    """
    return _read(video, start, count, partial(_cropped, height=height, width=width))


def _read(
    video: VideoFile,
    start: int,
    count: int,
    fit: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
) -> NDArray[np.uint8]:
    """Frames of a video, each made to `fit` before the next one is read."""
    frames = [fit(frame) for frame in _frames_from(video, start, count)]
    if len(frames) < count:
        # Frames that are not evenly spaced in time are not where the frame rate says.
        frames = [fit(frame) for frame in islice(read_video(video.path), start, start + count)]
    if len(frames) < count:
        raise ValueError(
            f"video {str(video.path)!r} must have {start + count} frames, got {start + len(frames)}"
        )
    return np.stack(frames)


def read_video(path: str | PathLike[str]) -> Iterator[NDArray[np.uint8]]:
    """Frames uint8 [H, W, 3] of a video file, a folder of png, or an image, one at a time."""
    source = Path(path)
    if source.is_dir():
        yield from _pictures(_frame_files(source))
    elif source.suffix.lower() == ".png":
        yield _open_rgb(source)
    else:
        yield from _decode(source)


def read_image(path: str | PathLike[str], height: int, width: int) -> NDArray[np.uint8]:
    """The image at `path` as uint8 [height, width, 3]; one of another size is an error, not resized."""
    frame = _open_rgb(Path(path))
    check_same_size(f"image {str(path)!r}", (frame.shape[0], frame.shape[1]), (height, width))
    return frame


def _check_exists(source: Path) -> None:
    if not source.is_file():
        raise ValueError(f"video {str(source)!r} does not exist")


def _frame_files(folder: Path) -> list[Path]:
    # By number: not all who write them pad it with zeros.
    files = sorted(folder.glob(FRAME_PATTERN), key=lambda file: (_number(file), file.name))
    if not files:
        raise ValueError(f"video {str(folder)!r} is a folder without any {FRAME_PATTERN}")
    return files


def _number(frame: Path) -> int:
    digits = frame.stem.removeprefix(FRAME_PATTERN.partition("*")[0])
    if not digits.isdecimal():
        raise ValueError(f"frame {str(frame)!r} must have a number after {FRAME_PATTERN.partition('*')[0]!r}")
    return int(digits)


def _pictures(files: Sequence[Path]) -> Iterator[NDArray[np.uint8]]:
    """Frames of one size."""
    shape = None
    for file in files:
        frame = _open_rgb(file)
        shape = shape or frame.shape
        if frame.shape != shape:
            height, width, _ = shape
            raise ValueError(
                f"frame {str(file)!r} must be {width}x{height} like those before it, "
                f"got {frame.shape[1]}x{frame.shape[0]}"
            )
        yield frame


def _frames_from(video: VideoFile, start: int, count: int) -> Iterator[NDArray[np.uint8]]:
    """At most `count` frames from `start` on, without decoding what is far in front of them."""
    if video.path.is_dir():
        yield from _pictures(_frame_files(video.path)[start : start + count])
        return
    # Half a frame early: what is decoded starts with the first frame at this time or later.
    seek = ["-ss", f"{(start - 0.5) / video.fps:.6f}"] if start > 0 and video.fps > 0 else []
    skipped = 0 if seek else start
    frames = _decode(video.path, seek, ["-frames:v", str(skipped + count)])
    yield from islice(frames, skipped, None)


def _resized(frame: NDArray[np.uint8], shorter_side: int) -> NDArray[np.uint8]:
    height, width = frame.shape[:2]
    scale = shorter_side / min(height, width)
    return _scaled(frame, round(height * scale), round(width * scale))


def _cropped(frame: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    rows, columns = frame.shape[:2]
    scale = max(height / rows, width / columns)
    whole = _scaled(frame, round(rows * scale), round(columns * scale))
    top, left = (whole.shape[0] - height) // 2, (whole.shape[1] - width) // 2
    return whole[top : top + height, left : left + width]


def _scaled(frame: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def _decode(
    source: Path, input_params: Sequence[str] = (), output_params: Sequence[str] = ()
) -> Iterator[NDArray[np.uint8]]:
    _check_exists(source)
    for _ in range(_ATTEMPTS):
        begun = time.monotonic()
        stream = imageio_ffmpeg.read_frames(
            f"file:{source}",
            input_params=list(input_params),
            output_params=["-fps_mode", "passthrough", *output_params],
        )
        try:
            width, height = next(stream)["size"]
            break
        except (OSError, StopIteration) as error:
            if time.monotonic() - begun < _PATIENCE_S:
                raise ValueError(
                    f"video {str(source)!r} cannot be read: no video stream found in it"
                ) from error
    else:
        raise TimeoutError(f"video {str(source)!r} cannot be read: ffmpeg did not answer, {_ATTEMPTS} times")
    for data in stream:
        yield np.frombuffer(data, np.uint8).reshape(height, width, 3)


def _open_rgb(path: Path) -> NDArray[np.uint8]:
    """Pixels uint8 [H, W, 3], upright; transparency is an error, since there is nothing to put behind it."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith(_DEEP_MODES):
                raise ValueError(f"image {str(path)!r} must have 8 bits per channel, got mode {upright.mode}")
            if upright.has_transparency_data:
                lowest_alpha, _ = upright.convert("RGBA").getchannel("A").getextrema()
                if lowest_alpha != _OPAQUE:
                    raise ValueError(f"image {str(path)!r} has transparent pixels; flatten it to RGB first")
            return np.array(upright.convert("RGB"), np.uint8)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a whole image file"
        raise ValueError(f"image {str(path)!r} cannot be read: {reason}") from error
