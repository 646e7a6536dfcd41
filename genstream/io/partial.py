"""An output while it is unfinished: its name, who writes it, and how it becomes whole."""

import os
from pathlib import Path

from genstream.io.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows, where a file that is being written cannot be replaced anyway
    fcntl = None  # type: ignore[assignment]


def partial_path(path: Path) -> Path:
    """Name of the unfinished file or folder: `out.mp4` -> `out.partial.mp4`."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all, never at the cost of what is there; line ends stay as given."""
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8", newline="")
    partial.replace(path)


def claim(path: Path) -> int:
    """A descriptor that keeps other runs from writing to the unfinished output of `path`; to be closed.

    Raises:
        OutputError: another run writes it.
    """
    descriptor = os.open(partial_path(path), os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OutputError(f"output path {str(path)!r} is being written by another run") from error
    return descriptor
