"""What is made once and read by all runs: rows of a tensor, with their captions, in files of many rows."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from genstream.io.errors import writing
from genstream.training.processes import own_share, process

_CAPTIONS = "captions"
_SEPARATOR = "\n"

Rows = tuple[Tensor, Sequence[str]]
"""A tensor, and a caption of each of its rows or none at all."""


def in_shards(name: str, make: Callable[[range], Rows], numbers: range, size: int, folder: Path) -> Rows:
    """What `make` gives for all numbers, in shards that are made only once; processes share the work.

    Args:
        name: of the tensor in the shards.
        make: gives the rows of some numbers.
        numbers: of all rows.
        size: most rows of a shard.
        folder: of the shards.

    Raises:
        OutputError: a shard cannot be written.
        ValueError: one that is there is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = {}
    for first in range(numbers.start, numbers.stop, size):
        part = range(first, min(first + size, numbers.stop))
        shards[folder / f"{part.start:06d}-{part.stop:06d}.safetensors"] = part
    for path, part in own_share(list(shards.items())):
        if not path.is_file():
            _write(path, name, make(part))
    process().wait_for_everyone()
    rows, captions = zip(*(_read(path, name) for path in shards), strict=True)
    return torch.cat(rows), [caption for each in captions for caption in each]


def _write(path: Path, name: str, rows: Rows) -> None:
    """Write a shard under a name of its own first: other runs may be at the same one."""
    tensor, captions = rows
    partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    told = {_CAPTIONS: _SEPARATOR.join(captions)} if captions else None
    try:
        with writing(path):
            save_file({name: tensor}, partial, told)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, name: str) -> Rows:
    try:
        with safe_open(path, "pt") as file:
            captions = (file.metadata() or {}).get(_CAPTIONS)
            tensor: Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(
            f"shard {str(path)!r} is damaged, remove it to have it made again: {error}"
        ) from error
    return tensor, [] if captions is None else captions.split(_SEPARATOR)
