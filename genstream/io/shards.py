"""Writes weights as safetensors files of limited size, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from genstream.io.checkpoint import DTYPES, StoredTensor
from genstream.io.errors import OutputError

_ALIGNMENT_BYTES = 8
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor to write; `read` makes it when its turn comes, of the file that `source` names."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    source: str = ""

    @classmethod
    def of(cls, name: str, stored: StoredTensor) -> PlannedTensor:
        """A stored tensor as it is, under another name."""
        return cls(
            name=name, dtype=stored.dtype, shape=stored.shape, read=stored.read, source=stored.file.name
        )

    @property
    def size_bytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path, stem: str, tensors: Sequence[PlannedTensor], max_shard_bytes: int
) -> list[Path]:
    """Write `STEM.safetensors`, or numbered shards with an index as diffusers and transformers read them.

    Args:
        folder: to write to; it is made.
        stem: "diffusion_pytorch_model" for diffusers, "model" for transformers.
        tensors: in any order.
        max_shard_bytes: of a file's tensors; a single tensor may be larger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        path = folder / f"{stem}.safetensors"
        write_safetensors(path, shards[0], {})
        return [path]
    paths = [
        folder / f"{stem}-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)
    ]
    for path, shard in zip(paths, shards, strict=True):
        write_safetensors(path, shard, {})
    index = {
        "metadata": {"total_size": sum(tensor.size_bytes for tensor in tensors)},
        "weight_map": {
            tensor.name: path.name for path, shard in zip(paths, shards, strict=True) for tensor in shard
        },
    }
    write_json(folder / f"{stem}.safetensors.index.json", index)
    return paths


def write_safetensors(path: Path, tensors: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> None:
    """Write one file; a tensor that holds NaN or infinity ends it with a ValueError that names it."""
    # Widest first: readers want every tensor at a multiple of its item size.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.size_bytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            file.write(_numbers(tensor))


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a json file for people to read."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that gets the name `path` when all went well, and leaves nothing otherwise.

    Raises:
        OutputError: `path` is there and not an empty folder, or its parent is missing.
    """
    check_new_folder(path)
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.resolve().parent))
    except OSError as error:
        raise OutputError(f"cannot write output {str(path)!r}: {error.strerror}") from error
    try:
        yield partial
        partial.chmod(0o755)
        if path.is_dir():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_folder(path: Path) -> None:
    """Raise OutputError unless `path` can become a new folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"output {str(path)!r} must be a new or an empty folder")
    if not path.resolve().parent.is_dir():
        raise OutputError(f"output {str(path)!r}: the folder {str(path.parent)!r} does not exist")


def _shards(tensors: Sequence[PlannedTensor], max_shard_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size_bytes
    return shards


def _numbers(planned: PlannedTensor) -> memoryview:
    tensor = planned.read().to(planned.dtype)
    if tuple(tensor.shape) != planned.shape:
        raise ValueError(f"{planned.name!r} must be {list(planned.shape)}, got {list(tensor.shape)}")
    # The sum is finite only if all are, and needs no memory; it may overflow in float16, so look closer then.
    if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
        dtype = str(planned.dtype).removeprefix("torch.")
        raise ValueError(
            f"{planned.name!r} holds NaN or infinity as {dtype}"
            + (f", made of {planned.source}" if planned.source else "")
        )
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
