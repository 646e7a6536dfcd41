"""Lists the tensors of a torch file as json, without reading their numbers; run in a process of its own.

A torch file is a pickle, which could hold code in place of weights. It is opened with `weights_only`, and in
a process that does nothing else; the caller gets names, shapes and places in the file, and reads the numbers
from there as plain bytes.
"""

import json
import pickle
import sys
import zipfile
from collections.abc import Iterator, Mapping

import torch

EXIT_REFUSED = 3


def main(path: str) -> int:
    """Write {"tensors": [...], "others": [...]} to stdout, or the reason against it to stderr."""
    try:
        _check_archive(path)
        content = torch.load(path, map_location="meta", weights_only=True)
        entries = list(_entries(content, ()))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, LookupError, TypeError) as error:
        sys.stderr.write(str(error))
        return EXIT_REFUSED
    tensors = [_described(path, tensor) for path, tensor in entries if isinstance(tensor, torch.Tensor)]
    others = [list(path) for path, value in entries if not isinstance(value, torch.Tensor)]
    json.dump({"tensors": tensors, "others": others}, sys.stdout)
    return 0


def _check_archive(path: str) -> None:
    """Tensors lie in the file as they are only in an uncompressed zip archive, torch's format since 1.6."""
    if not zipfile.is_zipfile(path):
        raise ValueError("no whole torch file of version 1.6 or later")
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("a compressed archive; save it again with torch.save")
        orders = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
    if orders not in ([], [b"little"]):
        raise ValueError(f"byte order must be little, got {orders}")


def _entries(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Leaves of nested dictionaries with their path."""
    if isinstance(value, Mapping) and (value or not path):
        for name, inner in value.items():
            yield from _entries(inner, (*path, str(name)))
    elif path:
        yield path, value
    else:
        raise ValueError(f"a {type(value).__name__} in place of tensors by name")


def _described(path: tuple[str, ...], tensor: torch.Tensor) -> dict[str, object]:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{'.'.join(path)!r} is no plain tensor but {tensor.layout}")
    storage = tensor.untyped_storage()
    place = storage._checkpoint_offset
    if place is None:
        raise ValueError(f"{'.'.join(path)!r} has no place in the file")
    return {
        "path": path,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "start": place + tensor.storage_offset() * tensor.element_size(),
        "end": place + storage.nbytes(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
