"""In which precision training computes; weights, and what is added up, stay in float32."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]


@contextmanager
def computing_in(precision: Precision, device_type: str) -> Iterator[None]:
    """What is computed meanwhile, forward, is computed in this precision where that is enough."""
    with warnings.catch_warnings():
        # Of norms of bfloat16 numbers with float32 weights, which is what is wanted.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16"):
            yield
