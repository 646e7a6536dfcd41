"""LoRA adapters on a transformer that serves several streams, each with its own choice of them.

PEFT keeps on the weights' modules which adapters are in use. A stream therefore puts its own choice there
for the time of a chunk, and what was there before comes back afterwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import read_config
from genstream.transformer.lora import lora_layers

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

_SCALE_TOLERANCE = 1e-9  # PEFT multiplies a scale by alpha / rank, which rounds
_BASE = ".base_layer"
_WRAPPED = re.compile(r"\.lora_\w+\.(?P<adapter>[^.]+)")


@dataclass(frozen=True, kw_only=True)
class LoraUse:
    """A loaded LoRA in use.

    Attributes:
        name: that it was loaded under.
        scale: factor on what it adds to the weights; 1 is as it was trained.
    """

    name: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale of LoRA {self.name!r} must be finite, got {self.scale}")


def adapter_of(name: str) -> str | None:
    """The adapter that a parameter belongs to; None for one of the model itself."""
    match = _WRAPPED.search(name)
    return None if match is None else match["adapter"]


def base_name(name: str) -> str:
    """A parameter's name without adapters on its layer."""
    return name.replace(_BASE, "")


def peft_adapter(
    tensors: Mapping[str, Tensor], transformer: CausalDiT, metadata: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A LoRA under the names of our modules, and the arguments of its `LoraConfig`.

    Args:
        tensors: under the names of PEFT, diffusers or the original Wan code.
        transformer: that it is for.
        metadata: arguments of the `LoraConfig` it was trained with, as far as known; they tell alpha, which
            is the rank (a scale of 1) otherwise.

    Raises:
        ValueError: it is for other layers; the message names them with their shapes.
    """
    weights = {
        base_name(name): tuple(parameter.shape)
        for name, parameter in transformer.named_parameters()
        if adapter_of(name) is None
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    adapter: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for weight, layer in lora_layers(shapes, read_config(transformer.config), weights).items():
        module = weight.removesuffix(".weight")
        adapter[f"{module}.lora_A.weight"] = tensors[layer.down]
        adapter[f"{module}.lora_B.weight"] = tensors[layer.up]
        ranks[module] = layer.rank
        alpha = _alpha(module, layer.rank, metadata) if layer.alpha is None else float(tensors[layer.alpha])
        alphas[module] = alpha * math.sqrt(layer.rank) if metadata.get("use_rslora") else alpha
    config = {
        "r": next(iter(ranks.values())),
        "lora_alpha": next(iter(alphas.values())),
        "target_modules": list(ranks),
    }
    config["rank_pattern"] = {re.escape(name): rank for name, rank in ranks.items() if rank != config["r"]}
    config["alpha_pattern"] = {
        re.escape(name): alpha for name, alpha in alphas.items() if alpha != config["lora_alpha"]
    }
    return adapter, config


def active_loras(transformer: CausalDiT) -> tuple[LoraUse, ...]:
    """The adapters in use on the transformer's weights.

    Raises:
        ValueError: one has different scales in different layers, which a stream cannot take over.
    """
    scales: dict[str, float] = {}
    for layer in _layers(transformer):
        for name in () if layer.disable_adapters else layer.active_adapters:
            if name not in layer.scaling:
                continue
            scale = layer.scaling[name] * layer.r[name] / layer.lora_alpha[name]
            if not math.isclose(scales.setdefault(name, scale), scale, rel_tol=_SCALE_TOLERANCE):
                raise ValueError(
                    f"LoRA {name!r} must have one scale in all layers, got {scales[name]} and {scale}"
                )
    return tuple(LoraUse(name=name, scale=scale) for name, scale in scales.items())


def use_loras(transformer: CausalDiT, loras: Sequence[LoraUse]) -> None:
    """Put adapters in use, and no others.

    Raises:
        ValueError: one is not loaded, or the weights are fused with adapters.
    """
    if _same(active_loras(transformer), loras):
        return
    check_loaded(transformer, loras)
    if any(layer.merged for layer in _layers(transformer)):
        raise ValueError("LoRAs are fused with the weights and cannot be changed; call unfuse_lora() first")
    if not loras:
        transformer.disable_adapters()
        return
    transformer.enable_adapters()
    transformer.set_adapters([lora.name for lora in loras], [lora.scale for lora in loras])


def loaded_loras(transformer: CausalDiT) -> list[str]:
    """Names of the adapters on the weights, in use or not."""
    return list(transformer.peft_config) if transformer._hf_peft_config_loaded else []


def check_loaded(transformer: CausalDiT, loras: Sequence[LoraUse]) -> None:
    """Raise ValueError for an adapter that is not loaded."""
    loaded = loaded_loras(transformer)
    for lora in loras:
        if lora.name not in loaded:
            raise ValueError(f"LoRA must be one of those loaded, {loaded or 'none'}, got {lora.name!r}")


@contextmanager
def loras_in_use(transformer: CausalDiT, loras: Sequence[LoraUse]) -> Iterator[None]:
    """Use adapters for a while; what was in use before is in use again behind it.

    They stand on the weights: streams with different adapters must not take a step at the same time.
    """
    before = active_loras(transformer)
    use_loras(transformer, loras)
    try:
        yield
    finally:
        use_loras(transformer, before)


def _alpha(module: str, rank: int, metadata: Mapping[str, Any]) -> float:
    """Alpha of a layer; the keys of `alpha_pattern` are regular expressions for the ends of names."""
    for pattern, alpha in (metadata.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return float(metadata.get("lora_alpha", rank))


def _same(some: Sequence[LoraUse], others: Sequence[LoraUse]) -> bool:
    return [lora.name for lora in some] == [lora.name for lora in others] and all(
        math.isclose(one.scale, other.scale, rel_tol=_SCALE_TOLERANCE)
        for one, other in zip(some, others, strict=True)
    )


def _layers(transformer: CausalDiT) -> Iterator[LoraLayer]:
    """The layers that PEFT has put adapters on."""
    if not transformer._hf_peft_config_loaded:
        return
    from peft.tuners.lora import LoraLayer

    yield from (module for module in transformer.modules() if isinstance(module, LoraLayer))
