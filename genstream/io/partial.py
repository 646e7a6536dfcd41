"""The name of an output while it is unfinished."""

from pathlib import Path


def partial_path(path: Path) -> Path:
    """Name of the unfinished file or folder: `out.mp4` -> `out.partial.mp4`."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")
