"""Videos small enough to be written for every test."""

from pathlib import Path

import numpy as np

from genstream.io.metadata import VideoMetadata
from genstream.io.writer import open_writer


def write_video(path: Path, colour: int, frames: int = 12, captions: str | None = None) -> None:
    """A wide clip of one grey, which tells it from others, with columns that get brighter.

    Frame after frame it is brighter by 1. With `captions` they lie beside it.
    """
    path.parent.mkdir(exist_ok=True)
    metadata = VideoMetadata(prompt="", seed=0, model="")
    columns = np.arange(96, dtype=np.uint8)[:, None] // 8
    times = np.arange(frames, dtype=np.uint8)[:, None, None, None]
    clip = np.full((frames, 48, 96, 3), colour, np.uint8) + columns + times
    with open_writer(path, fps=16, width=96, height=48, metadata=metadata, overwrite=True) as writer:
        writer.write(clip)
    if captions is not None:
        path.with_name(f"{path.stem}.txt").write_text(captions)
