"""Which VAE a state belongs to: told by class, settings and weights."""

import itertools
from hashlib import sha256
from weakref import WeakKeyDictionary

from diffusers import ModelMixin
from torch import Tensor, nn

_FIRST_VALUES = 8
_DIGITS = 12
_known: "WeakKeyDictionary[nn.Module, tuple[object, str]]" = WeakKeyDictionary()


def describe(vae: ModelMixin) -> str:
    """Class, settings and weights in a line."""
    settings = ", ".join(
        f"{name}={list(value) if isinstance(value, tuple) else value}"
        for name, value in sorted(vae.config.items())
        if not name.startswith("_")
    )
    return f"{type(vae).__name__}({settings}), weights {weights_digest(vae)}"


def weights_digest(module: nn.Module) -> str:
    """A short name of the module's weights and buffers, by their first values.

    It is computed again when they change, but for changes behind torch's back, through `data`.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    # Weights that are offloaded to disk have no values to tell them by.
    weights = [tensor for tensor in tensors if not tensor.is_meta]
    version = [(id(weight), _version(weight), weight.dtype) for weight in weights]
    known = _known.get(module)
    if known is None or known[0] != version:
        digest = sha256()
        for weight in weights:
            values = weight.detach().flatten()[:_FIRST_VALUES].float().tolist()
            digest.update(f"{tuple(weight.shape)} {values}".encode())
        known = _known[module] = version, digest.hexdigest()[:_DIGITS]
    return known[1]


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version
