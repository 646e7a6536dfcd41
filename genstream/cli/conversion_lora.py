"""A LoRA file on its way into a model folder: merged into the weights, or as an adapter beside them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genstream.io.checkpoint import SAFETENSORS, Checkpoint, naming, open_checkpoint
from genstream.io.hub_card import ADAPTER_FOLDER
from genstream.io.model_folder import METADATA, read_header, read_object
from genstream.io.shards import PlannedTensor, write_safetensors
from genstream.transformer.lora import LoRALayer, diffusers_name, lora_layers, merged
from genstream.transformer.matching import Shapes

ADAPTER = Path(ADAPTER_FOLDER) / "pytorch_lora_weights.safetensors"
_USUAL_WEIGHTS = ("generator_lora", "model", "state_dict")
_PEFT_CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A LoRA that fits the transformer.

    Attributes:
        checkpoint: its tensors.
        layers: by our name of the weight that each changes.
        alphas: strength times rank, likewise.
    """

    checkpoint: Checkpoint
    layers: Mapping[str, LoRALayer]
    alphas: Mapping[str, float]

    @property
    def summary(self) -> str:
        """File, layers and strength, in words."""
        scales = sorted({self.alphas[name] / layer.rank for name, layer in self.layers.items()})
        strength = ", ".join(f"{scale:g}" for scale in scales)
        return f"{self.checkpoint.files[0].name}, {len(self.layers)} layers, alpha / rank {strength}"

    def merged_into(self, weight: PlannedTensor) -> PlannedTensor:
        """The weight with its layer of the LoRA; as it is where there is none."""
        if weight.name not in self.layers:
            return weight
        layer = self.layers[weight.name]
        down, up = self.checkpoint.tensors[layer.down], self.checkpoint.tensors[layer.up]
        scale = self.alphas[weight.name] / layer.rank
        source = f"{weight.source} with {self.checkpoint.files[0].name}"
        return replace(
            weight, source=source, read=lambda: merged(weight.read(), down.read(), up.read(), scale)
        )

    def write_adapter(self, folder: Path) -> None:
        """Write the file that diffusers' `load_lora_adapter` reads."""
        tensors = [
            PlannedTensor.of(diffusers_name(name, part), self.checkpoint.tensors[stored])
            for name, layer in self.layers.items()
            for part, stored in (("lora_A", layer.down), ("lora_B", layer.up))
        ]
        (folder / ADAPTER).parent.mkdir()
        write_safetensors(folder / ADAPTER, tensors, {_METADATA: json.dumps(self._metadata())})

    def _metadata(self) -> dict[str, object]:
        """PEFT's configuration, under the prefix that diffusers expects in a file."""
        modules = {name.removesuffix(".weight"): name for name in self.layers}
        first = next(iter(self.layers))
        config: dict[str, object] = {
            "r": self.layers[first].rank,
            "lora_alpha": self.alphas[first],
            "target_modules": list(modules),
            "rank_pattern": {module: self.layers[name].rank for module, name in modules.items()},
            "alpha_pattern": {module: self.alphas[name] for module, name in modules.items()},
        }
        return {f"transformer.{name}": value for name, value in config.items()}


def open_lora(path: Path, config: Mapping[str, Any], weights: Shapes, alpha: float | None) -> LoRA:
    """The LoRA in a file.

    Args:
        path: safetensors or torch file, or a folder with one of safetensors.
        config: arguments of `CausalDiT`.
        weights: shapes of the transformer's tensors.
        alpha: where neither the file nor PEFT's configuration beside it tells.

    Raises:
        ValueError: it does not fit the transformer, or its alpha is not known or contradicts `alpha`.
    """
    checkpoint = open_checkpoint(path, None, usual=_USUAL_WEIGHTS)
    with naming(path):
        layers = lora_layers(checkpoint.shapes, config, weights)
        said = _said_by_peft(checkpoint.files[0])
        alphas = {name: _alpha(name, layer, checkpoint, said, alpha) for name, layer in layers.items()}
    return LoRA(checkpoint=checkpoint, layers=layers, alphas=alphas)


def _said_by_peft(path: Path) -> Mapping[str, Any]:
    """PEFT's configuration: in the metadata of the file, as diffusers writes it, or beside it."""
    content = {}
    if path.suffix == SAFETENSORS:
        metadata = read_header(path)[0].get(METADATA, {})
        stored = json.loads(metadata.get(_METADATA, "{}"))
        content = {name.rpartition(".")[2]: value for name, value in stored.items()}
    beside = path.parent / _PEFT_CONFIG
    if not content and beside.is_file():
        content = read_object(beside)
    for name in ("use_rslora", "use_dora"):
        if content.get(name):
            raise ValueError(f"the LoRA's configuration sets {name}, which cannot be converted")
    return content


def _alpha(
    name: str, layer: LoRALayer, checkpoint: Checkpoint, said: Mapping[str, Any], given: float | None
) -> float:
    """Alpha of a layer: as its tensor says, else as PEFT's configuration does, else as given."""
    told = _alpha_said(name, layer, said)
    if layer.alpha is not None:
        told = float(checkpoint.tensors[layer.alpha].read())
    if told is not None and given is not None and told != given:
        raise ValueError(f"lora_alpha (--lora-alpha) must be {told:g}, as the LoRA says, got {given:g}")
    alpha = given if told is None else told
    if alpha is None:
        raise ValueError(
            f"lora_alpha (--lora-alpha) must be given, as no file tells it; it is often the rank {layer.rank}"
        )
    return alpha


def _alpha_said(name: str, layer: LoRALayer, said: Mapping[str, Any]) -> float | None:
    """PEFT looks for the end of a module's name among its patterns first."""
    modules = (name.removesuffix(".weight"), layer.down.partition(".lora_")[0])
    for pattern, alpha in said.get("alpha_pattern", {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", module) for module in modules):
            return float(alpha)
    alpha = said.get("lora_alpha")
    return None if alpha is None else float(alpha)
