"""Tensors in weight files: what there is, without reading it, and each one when it is needed."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genstream.io.model_folder import (
    METADATA,
    SHARD_INDICES,
    check_weights,
    read_header,
    weight_files,
    weight_map,
)

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""What weights may be kept in, by its name in safetensors files."""

_REFUSED = re.compile(r"unsupported (?:global: )?(?:global |class |operand )?(\S+)", re.IGNORECASE)
_LISTING = Path(__file__).with_name("torch_listing.py")
_USUAL_WEIGHTS = ("generator_ema", "generator", "model", "state_dict")
"""Dictionaries that trainers keep weights in; the first one that is there is taken."""


class SeveralModelsError(ValueError):
    """A file holds several dictionaries of tensors, and nothing says which one to take."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: that holds it.
        start: of its first number, in bytes.
        dtype: of the numbers.
        shape: of the tensor.
        stride: steps between neighbours along each dimension, in numbers.
    """

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span_bytes(self) -> int:
        """From its first to its last number."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    def part(self, first_row: int, shape: tuple[int, ...]) -> StoredTensor:
        """A tensor of `shape` from a row of this one on; leading dimensions of size 1 may be left out."""
        stride = self.stride[len(self.stride) - len(shape) :]
        start = self.start + first_row * stride[0] * self.dtype.itemsize
        return replace(self, start=start, shape=shape, stride=stride)

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        numbers = torch.empty(self.span_bytes, dtype=torch.uint8)
        with self.file.open("rb") as file:
            file.seek(self.start)
            read = file.readinto(numbers.numpy().data)
        if read != self.span_bytes:
            raise ValueError(
                f"file {str(self.file)!r} is cut off: {self.span_bytes - read} bytes are missing"
            )
        return numbers.view(self.dtype).as_strided(self.shape, self.stride)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The weights that were taken from one or several files.

    Attributes:
        files: that were opened.
        weights: name of the dictionary inside the file; None where there is only one.
        others: names of what else the file holds.
        tensors: by name.
    """

    files: tuple[Path, ...]
    weights: str | None
    others: tuple[str, ...]
    tensors: Mapping[str, StoredTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def open_checkpoint(path: Path, weights: str | None, usual: Sequence[str] = _USUAL_WEIGHTS) -> Checkpoint:
    """The tensors of a safetensors or torch file, or of a folder of safetensors.

    Args:
        path: file or folder; a folder's shard index says which files belong together.
        weights: dictionary to take from a torch file that holds several; the first of `usual` when None.
        usual: names of such dictionaries.

    Raises:
        ValueError: it is no such file, or cut off, or holds other things than plain tensors.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist")
    if path.suffix in TORCH_SUFFIXES and path.is_file():
        return _open_torch_file(path, weights, usual)
    if weights is not None:
        raise ValueError(
            f"weights (--weights) are named in torch files only, got {weights!r} for {str(path)!r}"
        )
    files = _shards(path) if path.is_dir() else [path]
    if any(file.suffix != SAFETENSORS for file in files):
        allowed = ", ".join((SAFETENSORS, *TORCH_SUFFIXES))
        raise ValueError(f"checkpoint must be a folder or one of {allowed}, got {str(path)!r}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        _add(tensors, _safetensors(file), file)
    _check_index(path, tensors)
    return Checkpoint(files=tuple(files), weights=None, others=(), tensors=tensors)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the name of a file in front of what a ValueError says about its tensors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contiguous_stride(shape: Iterable[int]) -> tuple[int, ...]:
    """Steps between neighbours of a tensor that lies in memory without gaps."""
    stride: list[int] = []
    step = 1
    for size in reversed(tuple(shape)):
        stride.append(step)
        step *= size
    return tuple(reversed(stride))


def _shards(folder: Path) -> list[Path]:
    files = weight_files(folder)
    indices = list(folder.glob(SHARD_INDICES))
    if not files or (len(files) > 1 and len(indices) != 1):
        held = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ValueError(
            f"folder {str(folder)!r} must hold one .safetensors file or one shard index; name the file: it "
            f"holds {held}"
        )
    return files


def _check_index(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """The shard index must list just the tensors that are in its files."""
    for index in path.glob(SHARD_INDICES) if path.is_dir() else ():
        listed = weight_map(index)
        for name in sorted(listed.keys() ^ tensors.keys()):
            raise ValueError(
                f"{str(index)!r} and its files disagree on {name!r}: "
                f"{'only the index' if name in listed else 'only a file'} has it"
            )


def _add(tensors: dict[str, StoredTensor], more: Mapping[str, StoredTensor], file: Path) -> None:
    for name, tensor in more.items():
        if name in tensors:
            raise ValueError(f"{name!r} is in two files, {tensors[name].file.name!r} and {file.name!r}")
        tensors[name] = tensor


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    check_weights(path)
    header, start = read_header(path)
    tensors = {}
    for name, entry in header.items():
        if name == METADATA:
            continue
        first, end = entry["data_offsets"]
        tensors[name] = stored = StoredTensor(
            file=path,
            start=start + first,
            dtype=_dtype(DTYPES.get(entry["dtype"]), entry["dtype"], name, path),
            shape=tuple(entry["shape"]),
            stride=contiguous_stride(entry["shape"]),
        )
        if stored.span_bytes != end - first:
            raise ValueError(
                f"{name!r} in {str(path)!r} must take {stored.span_bytes} bytes for {entry['shape']} of "
                f"{entry['dtype']}, its header gives it {end - first}"
            )
    return tensors


def _dtype(dtype: torch.dtype | None, told: str, name: str, path: Path) -> torch.dtype:
    if dtype not in DTYPES.values():
        allowed = ", ".join(str(kind).removeprefix("torch.") for kind in DTYPES.values())
        raise ValueError(f"{name!r} must be of dtype {allowed}, got {told} in {str(path)!r}")
    assert dtype is not None
    return dtype


def _open_torch_file(path: Path, weights: str | None, usual: Sequence[str]) -> Checkpoint:
    listing = _listing(path)
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in listing["tensors"]:
        groups.setdefault(".".join(entry["path"][:-1]), []).append(entry)
    taken = _choice(path, list(groups), weights, usual)
    others = [name for name in groups if name != taken] + [".".join(other) for other in listing["others"]]
    size = path.stat().st_size
    tensors = {entry["path"][-1]: _stored(path, entry, size) for entry in groups[taken]}
    return Checkpoint(files=(path,), weights=taken or None, others=tuple(sorted(others)), tensors=tensors)


def _choice(path: Path, groups: list[str], weights: str | None, usual: Sequence[str]) -> str:
    named = ", ".join(repr(group) for group in groups if group)
    if not groups:
        raise ValueError(f"{str(path)!r} holds no tensors")
    if weights is not None:
        if weights not in groups:
            raise ValueError(f"weights (--weights) must be one of {named or 'none'}, got {weights!r}")
        return weights
    candidates = [*usual, "", *(groups if len(groups) == 1 else [])]
    for candidate in candidates:
        if candidate in groups:
            return candidate
    raise SeveralModelsError(f"weights (--weights) must be given for {str(path)!r}: one of {named}")


def _stored(path: Path, entry: Mapping[str, Any], size: int) -> StoredTensor:
    name = entry["path"][-1]
    tensor = StoredTensor(
        file=path,
        start=entry["start"],
        dtype=_dtype(getattr(torch, entry["dtype"], None), entry["dtype"], name, path),
        shape=tuple(entry["shape"]),
        stride=tuple(entry["stride"]),
    )
    if not 0 <= tensor.start <= tensor.start + tensor.span_bytes <= min(size, entry["end"]):
        raise ValueError(f"{str(path)!r}: {name!r} reaches beyond the file")
    return tensor


def _listing(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-P", str(_LISTING), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"torch file {str(path)!r} cannot be used: {_reason(done.stderr, done.returncode)}")
    listing: dict[str, Any] = json.loads(done.stdout)
    return listing


def _reason(text: str, code: int) -> str:
    """The telling line of torch's explanations, which would have people load what it refused."""
    if refused := _REFUSED.search(text):
        return f"it holds more than plain tensors ({refused[1]}); nothing of it was run"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return str(lines[-1]) if lines else f"reading it ended with code {code}"
