"""Tensors of a checkpoint against those of a model: each one finds its place, or is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor by its name."""

_WRAPPERS = ("model.", "net.", "module.", "diffusion_model.", "base_model.", "transformer.")
_INNER_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.")
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Names without the prefixes that trainers put in front -> the names as they are.

    Raises:
        ValueError: two become the same.
    """
    plain: dict[str, str] = {}
    for name in names:
        if (stripped := _strip(name)) in plain:
            raise ValueError(f"checkpoint holds {stripped!r} twice, under different prefixes")
        plain[stripped] = name
    return plain


def is_unwrapped(names: Iterable[str]) -> bool:
    """Whether no trainer put a prefix in front."""
    return all(_strip(name) == name for name in names)


def check_tensors(given: Shapes, expected: Shapes) -> None:
    """Raise ValueError that names the tensors which are missing, superfluous or of another shape."""
    if missing := sorted(expected.keys() - given.keys()):
        raise ValueError(f"checkpoint lacks {some(missing)}")
    if superfluous := sorted(given.keys() - expected.keys()):
        raise ValueError(f"checkpoint holds {some(superfluous)}, which the model does not have")
    for name, shape in expected.items():
        if given[name] != shape:
            raise ValueError(
                f"checkpoint: {name!r} must have the shape {list(shape)}, got {list(given[name])}"
            )


def shape_of(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    """Shape of a tensor that tells how large the model is."""
    if name not in shapes:
        raise ValueError(f"checkpoint lacks {name!r} and is no model of this kind; it holds {_first(shapes)}")
    if len(shapes[name]) != dimensions:
        raise ValueError(f"checkpoint: {name!r} must have {dimensions} dimensions, got {list(shapes[name])}")
    return shapes[name]


def count_blocks(names: Iterable[str]) -> int:
    """Blocks that the numbers in the names count."""
    found = (_BLOCK.match(name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def some(names: list[str]) -> str:
    """The first three names and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more


def _first(shapes: Shapes) -> str:
    return some(sorted(shapes)) or "no tensors"


def _strip(name: str) -> str:
    for wrapper in _INNER_WRAPPERS:
        name = name.replace(wrapper, "")
    while prefix := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), None):
        name = name.removeprefix(prefix)
    return name
