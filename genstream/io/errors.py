"""What goes wrong with files, as one exception."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class OutputError(OSError):
    """An output path cannot be written; the message names the path and what is allowed."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever goes wrong with the files of `path` meanwhile is an OutputError that names it.

    For a full disk, too, safetensors has an error of its own, and tokenizers a bare Exception.
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError | SafetensorError) or type(error) is Exception):
            raise
        raise OutputError(f"{str(path)!r} cannot be written, is the disk full? {error}") from error
