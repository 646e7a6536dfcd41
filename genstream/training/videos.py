"""Folders of videos to learn from: which of them can be used. The others are counted and listed."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from genstream.io.reader import VideoFile, inspect_video
from genstream.training.processes import process

logger = logging.getLogger(__name__)

T = TypeVar("T")


def usable(paths: Sequence[Path], look: Callable[[Path], T]) -> list[T]:
    """What `look` makes of each video, without those for which it raises a ValueError."""
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(partial(_found, look=look), paths))
    problems = [each for each in found if isinstance(each, ValueError)]
    if problems and process().is_main_process:
        logger.warning("%d of %d videos skipped:", len(problems), len(paths))
        for problem in problems:
            logger.warning("  %s", problem)
    return [each for each in found if not isinstance(each, ValueError)]


def long_enough(path: Path, frames: int) -> VideoFile:
    """The video, which must have as many frames as the longest clip."""
    video = inspect_video(path)
    if video.frames < frames:
        raise ValueError(f"video {str(path)!r} has {video.frames} frames, the longest clip {frames}")
    return video


def by_digest(name: str) -> bytes:
    """Key that sorts names into an order which has nothing to do with theirs, and stays."""
    return hashlib.sha256(os.fsencode(name)).digest()


def _found(path: Path, look: Callable[[Path], T]) -> T | ValueError:
    try:
        return look(path)
    except ValueError as error:
        return error
