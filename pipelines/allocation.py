"""How much memory a pass allocates, found without allocating: on meta tensors, which have only shapes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class _FusedAttention(TorchFunctionMode):
    """Attention as the kernels of GPUs compute it: without a matrix of scores."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        given = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **given)
        given |= dict(zip(("query", "key", "value"), args, strict=False))
        query, value = given["query"], given["value"]
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


class AttentionResult(torch.autograd.Function):
    """What such kernels keep for a gradient: what they were given, and the result."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ANN401
        """An empty result."""
        result = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        """Empty gradients."""
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Meter(TorchDispatchMode):
    """Adds up the storages of meta tensors that are alive at once, without those that were there before."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes: int = 0
        self.peak_bytes: int = 0
        self._known = WeakIdKeyDictionary()
        for tensor in given:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size_bytes: int) -> None:
        self.live_bytes -= size_bytes


@dataclass(frozen=True)
class Allocated:
    """Bytes that a pass took.

    Attributes:
        peak_bytes: most at once, its result included.
        held_bytes: by its result, with what a gradient would need.
    """

    peak_bytes: int
    held_bytes: int


def allocated(run: Callable[[], object], given: Iterable[Tensor], *, gradient: bool = False) -> Allocated:
    """What `run` takes.

    Workspaces of libraries and what an allocator loses to gaps are not in it.

    Args:
        run: works on meta tensors.
        given: tensors that are there before, such as weights and caches; they do not count.
        gradient: keep what a gradient needs.
    """
    meter = _Meter(given)
    with torch.set_grad_enabled(gradient), _FusedAttention(), meter:
        result = run()
    held_bytes = meter.live_bytes
    del result
    return Allocated(meter.peak_bytes, held_bytes)


def peak_bytes(run: Callable[[], object], given: Iterable[Tensor]) -> int:
    """Most bytes that `run` holds at once, its result included, without gradient."""
    return allocated(run, given).peak_bytes
