"""Streaming a network that has no state of its own, without touching it.

`rewired` copies the containers of a network, not its weights, and puts layers with a memory in the place of
those that look back in time. The copy belongs to one call: threads and streams share the weights only.
"""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genstream.vae.adapters.base import Adapter
from genstream.vae.adapters.memory import Memory


class Layer(nn.Module):
    """Stands in for a layer of a rewired network.

    Args:
        module: the layer, a private copy with its own layers rewired already.
        name: path of the layer in the network.
        memory: the stream's.
    """

    module: Any

    def __init__(self, module: nn.Module, name: str, memory: Memory) -> None:
        super().__init__()
        self.module = module
        self.name = name
        self.memory = memory

    def extended(self, x: Tensor, front: int, kernel_size: int, stride: int) -> Tensor:
        """Frames with those in front that a causal convolution looks back at.

        Args:
            x: [B, C, F, h, w].
            front: copies of the first frame in front of a stream.
            kernel_size: of the convolution in time.
            stride: of the convolution in time.

        Returns:
            [B, C, F + n, h, w] with n = front at a stream's start, then kernel_size - stride.
        """
        past = self.memory.recall(self.name)
        if past is None:
            past = x[:, :, :1].expand(-1, -1, front, -1, -1)
        both = torch.cat([past, x], dim=2)
        outputs = (both.shape[2] - kernel_size) // stride + 1
        self.memory.remember(self.name, both[:, :, outputs * stride :])
        return both


def rewired(
    module: nn.Module, layers: Mapping[type[nn.Module], type[Layer]], memory: Memory, name: str = ""
) -> nn.Module:
    """`module` with stand-ins from `layers`, sharing all weights with it; `module` itself stays as it is.

    Raises:
        ValueError: a layer was wrapped, as offloading layer by layer and compilation do. Its wrapper would
            run the original, which has no memory, instead of the stand-ins.
    """
    if "forward" in vars(module):
        wrapped = name.removeprefix(".") or "a network"
        raise ValueError(
            f"VAE must have its layers as they were built to stream, got {wrapped} that is wrapped by "
            f"offloading or compilation"
        )
    children = {
        key: rewired(child, layers, memory, f"{name}.{key}")
        for key, child in module._modules.items()
        if child is not None
    }
    layer = layers.get(type(module))
    if layer is None and all(child is module._modules[key] for key, child in children.items()):
        return module
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {**module._modules, **children}
    return twin if layer is None else layer(twin, name.removeprefix("."), memory)


def with_past(key: Tensor, value: Tensor, dim: int, name: str, memory: Memory) -> tuple[Tensor, Tensor]:
    """Keys and values behind those of all frames before, along `dim`; all are remembered as `name`."""
    past_key, past_value = memory.recall(f"{name}.key"), memory.recall(f"{name}.value")
    if past_key is not None and past_value is not None:
        key, value = torch.cat([past_key, key], dim=dim), torch.cat([past_value, value], dim=dim)
    memory.remember(f"{name}.key", key)
    memory.remember(f"{name}.value", value)
    return key, value


def attend(query: Tensor, key: Tensor, value: Tensor, name: str, memory: Memory) -> Tensor:
    """Attention to the current frame and all frames before it.

    Args:
        query: [B, N, T, D], one token per frame.
        key: like `query`.
        value: like `query`.
        name: of the keys and values that the stream remembers; they grow with it.
        memory: the stream's.

    Returns:
        Like `query`.
    """
    frames = query.shape[2]
    key, value = with_past(key, value, 2, name, memory)
    mask = torch.ones(frames, key.shape[2], dtype=torch.bool, device=query.device)
    mask = mask.tril(diagonal=key.shape[2] - frames)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class RewiredAdapter(Adapter):
    """Streams a model through stand-ins for the layers that look back in time.

    Models name their parts alike: `encoder`, `decoder`, and often a convolution behind and in front of them.
    """

    _layers: ClassVar[Mapping[type[nn.Module], type[Layer]]]

    def _rewired(self, network: nn.Module, memory: Memory) -> nn.Module:
        return rewired(network, self._layers, memory)
