"""LoRA weights of a Wan transformer, under the names of PEFT, diffusers or the original code.

Source: LoRA (arXiv 2106.09685): W' = W + alpha / rank * up @ down.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from genstream.transformer.conversion import wan_names
from genstream.transformer.matching import Shapes, plain_names, some

_SUFFIX = re.compile(r"\.(?:(lora_A|lora_down|lora_B|lora_up)(?:\.\w+)?\.weight|alpha)$")
_FLAT = "lora_unet_"
_DOWN, _UP, _ALPHA = "down", "up", "alpha"
_PARTS = {"lora_A": _DOWN, "lora_down": _DOWN, "lora_B": _UP, "lora_up": _UP, None: _ALPHA}


@dataclass(frozen=True, kw_only=True)
class LoRALayer:
    """The tensors of one layer, by their names in the file.

    Attributes:
        down: `[rank, in]`.
        up: `[out, rank]`.
        alpha: a single number; None where the file has none.
        rank: of the layer.
    """

    down: str
    up: str
    alpha: str | None
    rank: int


def lora_layers(shapes: Shapes, config: Mapping[str, object], weights: Shapes) -> dict[str, LoRALayer]:
    """The layers of a LoRA, by our name of the weight that each changes.

    Args:
        shapes: of the LoRA's tensors.
        config: arguments of `CausalDiT`.
        weights: of the transformer, under our names.

    Raises:
        ValueError: a tensor is no LoRA's, has no partner, is for a layer that the transformer lacks, or does
            not fit it.
    """
    found = _parts(shapes)
    ours = {**{name: name for name in weights}, **wan_names(config)}
    # Trainers in kohya's tradition write "lora_unet_blocks_0_self_attn_q".
    ours |= {f"{_FLAT}{_flat(name)}.weight": weight for name, weight in ours.items()}
    if foreign := sorted(layer for layer in found if f"{layer}.weight" not in ours):
        first = [list(shapes[name]) for name in found[foreign[0]].values()]
        raise ValueError(
            f"LoRA is for {some(foreign)}, which the transformer does not have; the first has shapes {first}"
        )
    return {
        ours[f"{layer}.weight"]: _layer(layer, parts, shapes, weights[ours[f"{layer}.weight"]])
        for layer, parts in found.items()
    }


def merged(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + scale * up @ down in float32, or float64 for a weight in float64."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return wide + scale * up.to(wide) @ down.to(wide)


def diffusers_name(weight: str, part: str) -> str:
    """Name under which diffusers' adapters keep a part ("lora_A", "lora_B") of a weight's layer."""
    return f"transformer.{weight.removesuffix('.weight')}.{part}.weight"


def _parts(shapes: Shapes) -> dict[str, dict[str, str]]:
    """Layer -> part -> name in the file."""
    found: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    for plain, name in plain_names(shapes).items():
        match = _SUFFIX.search(plain)
        if match is None:
            unknown.append(name)
        else:
            found.setdefault(plain[: match.start()], {})[_PARTS[match[1]]] = name
    if unknown or not found:
        raise ValueError(f"LoRA must hold lora_A and lora_B tensors only, got {_held(unknown)}")
    return found


def _flat(name: str) -> str:
    return name.removesuffix(".weight").replace(".", "_")


def _held(unknown: Iterable[str]) -> str:
    return some(sorted(unknown)) or "none"


def _layer(layer: str, parts: Mapping[str, str], shapes: Shapes, weight: tuple[int, ...]) -> LoRALayer:
    for part in (_DOWN, _UP):
        if part not in parts:
            raise ValueError(f"LoRA lacks the {part} projection of {layer!r}")
    down, up = shapes[parts[_DOWN]], shapes[parts[_UP]]
    if len(weight) != 2 or len(down) != 2 or up != (weight[0], down[0]) or down[1] != weight[1]:
        raise ValueError(
            f"LoRA of {layer!r} must be [rank, in] and [out, rank] for a weight {list(weight)}, "
            f"got {list(down)} and {list(up)}"
        )
    if down[0] == 0:
        raise ValueError(f"LoRA of {layer!r} must have a rank of at least 1, got {list(down)}")
    return LoRALayer(down=parts[_DOWN], up=parts[_UP], alpha=parts.get(_ALPHA), rank=down[0])
