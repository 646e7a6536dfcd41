"""Whether folders still hold what they held, told without reading all of their gigabytes."""

import os
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

from genstream.io.checkpoint import sha256 as file_sha256

_MODEL_BLOCKS = 1024
_VIDEO_BLOCKS = 4
"""A video that is compressed anew differs in its size and in all of them."""
_BLOCK_BYTES = 2**16


def folder_digest(folder: Path, without: str | None = None) -> str:
    """A hash of the names and contents of all files of a model, but for hidden ones and notes (*.md).

    Of a file above 64 MiB it takes the size and 1024 blocks, spread evenly from its start to its end. Weights
    that were trained on differ in all of them; what is missed is a change that lies between two, 14 MB apart
    in a file of 14 GB.

    Args:
        folder: the folder.
        without: a folder in it that does not count, if any.
    """
    paths = [Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names]
    counted = []
    for path in paths:
        inside = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in inside.parts)
        if path.is_file() and not is_hidden and inside.parts[0] != without and path.suffix != ".md":
            counted.append(path)
    return _digest(folder, counted, lambda path: _file_digest(path, _MODEL_BLOCKS))


def videos_digest(folder: Path, files: Iterable[Path]) -> str:
    """A hash of the names and contents of videos, and of what lies beside them; of large ones in part.

    Times do not count: a copy is the same. Nor do contents that cannot be read, which nothing learns from.

    Args:
        folder: with all of them.
        files: in it.
    """
    return _digest(folder, files, _video_digest)


def _video_digest(path: Path) -> str:
    try:
        return _file_digest(path, _VIDEO_BLOCKS)
    except OSError:
        return "unreadable"


def _digest(folder: Path, files: Iterable[Path], content: Callable[[Path], str]) -> str:
    digest = sha256()
    for path in sorted(files):
        name = os.fsencode(path.relative_to(folder).as_posix())
        digest.update(name + f" {content(path)}\n".encode())
    return digest.hexdigest()


def _file_digest(path: Path, blocks: int) -> str:
    size = path.stat().st_size
    if size <= blocks * _BLOCK_BYTES:
        return file_sha256(path)
    digest, last = sha256(f"{size}".encode()), size - _BLOCK_BYTES
    with path.open("rb") as file:
        for block in range(blocks):
            file.seek(block * last // (blocks - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
