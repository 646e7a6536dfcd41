"""Turns published weights into a model folder."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal, cast

import diffusers
import torch

import genstream
from genstream.cli.components import Component, Parts, PartSources, copied, find_parts
from genstream.io.checkpoint import Checkpoint, naming, open_checkpoint, sha256
from genstream.io.hub_card import ConversionCard, Origin, find_license
from genstream.io.model_folder import INDEX_NAME, check_model_folder, read_object
from genstream.io.shards import (
    PlannedTensor,
    check_new_folder,
    new_folder,
    write_json,
    write_safetensors,
    write_shards,
)
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.streaming.request import StreamSettings
from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import WAN_HEAD_WIDTH, infer_config, places, read_config
from genstream.transformer.lora import LoRALayer, diffusers_name, lora_layers, merged

DEFAULT_PRESET = "self-forcing"
ADAPTER = "lora/pytorch_lora_weights.safetensors"
_STEM = "diffusion_pytorch_model"
_GIGABYTE = 10**9
_WAN_TEXT_TOKENS = 512
_LORA_WEIGHTS = ("generator_lora", "model", "state_dict")
_CONFIG_NAME = "config.json"
_WAN_CLASSES = ("WanModel", "CausalWanModel", "WanTransformer3DModel", "CausalDiT")
Kind = Literal["genstream", "diffusers"]
LoRAMode = Literal["merge", "adapter"]


@dataclass(frozen=True, kw_only=True)
class ConversionSettings:
    """What to convert, and to what.

    Attributes:
        source: weight file, folder of a transformer, or model folder.
        output: new folder.
        kind: "genstream" for a model folder, "diffusers" for a `WanTransformer3DModel` folder.
        weights: dictionary to take from a torch file that holds several; None for the usual one.
        config: json file that describes the transformer; None for the one beside the source, if any.
        heads: of the transformer, where no configuration tells.
        lora: file with LoRA weights.
        lora_alpha: strength of the LoRA times its rank, where the file does not tell.
        lora_mode: "merge" into the weights, or keep as an "adapter" beside them.
        text_encoder: folder or file of the text encoder.
        tokenizer: its folder, where it is not beside the text encoder.
        vae: folder or file of the VAE.
        preset: how the model streams; None keeps what a model folder says, else "self-forcing".
        dtype: of the weights; None keeps theirs.
        max_shard_gb: size of a weight file in 10^9 bytes, above 0.
        license: the Hub's name of the weights' licence; None for what stands beside the source.
    """

    source: Path
    output: Path
    kind: Kind = "genstream"
    weights: str | None = None
    config: Path | None = None
    heads: int | None = None
    lora: Path | None = None
    lora_alpha: float | None = None
    lora_mode: LoRAMode = "merge"
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    vae: Path | None = None
    preset: str | None = None
    dtype: str | None = None
    max_shard_gb: float = 5.0
    license: str | None = None

    def __post_init__(self) -> None:
        if not self.max_shard_gb > 0:
            raise ValueError(f"max_shard_gb (--max-shard-gb) must be above 0, got {self.max_shard_gb}")
        if self.kind == "diffusers":
            for name in ("text_encoder", "tokenizer", "vae", "preset"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no place in a folder of kind (--to) 'diffusers'")
        if self.lora is None and self.lora_alpha is not None:
            raise ValueError(f"lora_alpha (--lora-alpha) needs a lora (--lora), got {self.lora_alpha}")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done.

    Attributes:
        folder: that was made.
        config: of the transformer.
        tensors: in the transformer.
        size_bytes: of the transformer's weights.
        notes: what was taken, decided and left out, a sentence each.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: int
    size_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Preset:
    """How a model streams."""

    settings: StreamSettings
    steps: Sequence[float]
    shift: float


@dataclass(kw_only=True)
class _Plan:
    """A transformer to write, and what there is to say about it."""

    config: dict[str, Any]
    tensors: dict[str, PlannedTensor]
    text_tokens: int
    files: list[tuple[str, Path]]
    notes: list[str]
    adapter: list[PlannedTensor] = field(default_factory=list)
    adapter_metadata: dict[str, str] = field(default_factory=dict)


def convert(settings: ConversionSettings) -> Conversion:
    """Write the folder that `settings` describe; nothing is left behind if that fails.

    Raises:
        ValueError: a tensor, a configuration or a part does not fit; the message names it.
        OSError: a file cannot be read or written.
    """
    check_new_folder(settings.output)
    plan = _plan_transformer(settings)
    if settings.lora is not None:
        _plan_lora(plan, settings, settings.lora)
    with new_folder(settings.output) as folder:
        if settings.kind == "diffusers":
            _write_transformer(folder, "WanTransformer3DModel", plan, settings)
            parts = Parts()
        else:
            parts = _write_model(folder, plan, settings)
        if plan.adapter:
            (folder / ADAPTER).parent.mkdir()
            write_safetensors(folder / ADAPTER, plan.adapter, plan.adapter_metadata)
        _card(settings, plan, parts).write(folder)
    return Conversion(
        folder=settings.output,
        config=plan.config,
        tensors=len(plan.tensors),
        size_bytes=sum(tensor.size_bytes for tensor in plan.tensors.values()),
        notes=(*plan.notes, *parts.notes),
    )


def _plan_transformer(settings: ConversionSettings) -> _Plan:
    path = settings.source
    if (path / INDEX_NAME).is_file():
        path = path / "transformer"
        if (settings.source / "transformer_2").is_dir():
            raise ValueError(f"{str(settings.source)!r} holds two transformers; name the folder of one")
    checkpoint = open_checkpoint(path, settings.weights)
    content, note = _config_beside(path, settings.config)
    with naming(path):
        known = _with_heads(read_config(content), settings.heads)
        config = infer_config(checkpoint.shapes, known)
        found = places(checkpoint.shapes, config)
    weights = "" if checkpoint.weights is None else f" {checkpoint.weights!r}"
    notes = [f"took weights{weights} of {path.name}, {len(found)} tensors", note, *_left_out(checkpoint)]
    if "num_attention_heads" not in known:
        heads = config["num_attention_heads"]
        notes.append(f"heads: {heads}, of {WAN_HEAD_WIDTH} channels as in all Wan models")
    return _Plan(
        config=config,
        tensors={
            ours: _cast(PlannedTensor.of(ours, checkpoint.tensors[theirs]), settings.dtype)
            for ours, theirs in found.items()
        },
        text_tokens=content.get("text_len", _WAN_TEXT_TOKENS),
        files=[(f"transformer{weights}", file) for file in checkpoint.files],
        notes=notes,
    )


def _left_out(checkpoint: Checkpoint) -> list[str]:
    others = ", ".join(repr(name) for name in checkpoint.others)
    return [f"left out of {checkpoint.files[0].name}: {others}"] if others else []


def _with_heads(known: Mapping[str, Any], heads: int | None) -> dict[str, Any]:
    """What is known of the transformer, with what the user says."""
    if heads is not None and known.get("num_attention_heads", heads) != heads:
        told = known["num_attention_heads"]
        raise ValueError(f"heads (--heads) must be {told}, as its configuration says, got {heads}")
    return dict(known) if heads is None else {**known, "num_attention_heads": heads}


def _config_beside(path: Path, given: Path | None) -> tuple[dict[str, Any], str]:
    """What describes the transformer, by the user's word or beside the weights, and what to say about it."""
    if given is not None:
        return read_object(given), f"configuration: {given.name}, which agrees with the tensors"
    beside = (path if path.is_dir() else path.parent) / _CONFIG_NAME
    if not beside.is_file():
        return {}, "configuration: from the shapes of the tensors; no file stands beside them"
    content = read_object(beside)
    if content.get("_class_name") not in _WAN_CLASSES and not {"dim", "num_heads"} <= content.keys():
        kind = content.get("_class_name", "something else")
        return {}, f"configuration: from the tensors; {_CONFIG_NAME} beside them describes {kind}"
    return content, f"configuration: {_CONFIG_NAME}, which agrees with the tensors"


def _cast(tensor: PlannedTensor, name: str | None) -> PlannedTensor:
    """In the wanted dtype, but in float32 what the model computes in float32."""
    if name is None:
        return tensor
    exempt = any(part in CausalDiT._keep_in_fp32_modules for part in tensor.name.split("."))
    return replace(tensor, dtype=torch.float32 if exempt else getattr(torch, name))


def _plan_lora(plan: _Plan, settings: ConversionSettings, path: Path) -> None:
    """Merge the LoRA into the planned weights, or plan the adapter."""
    lora = open_checkpoint(path, None, usual=_LORA_WEIGHTS)
    shapes = {name: tensor.shape for name, tensor in plan.tensors.items()}
    with naming(path):
        layers = lora_layers(lora.shapes, plan.config, shapes)
        alphas = {name: _alpha(layer, lora, settings) for name, layer in layers.items()}
    if settings.lora_mode == "merge":
        for name, layer in layers.items():
            plan.tensors[name] = _merged(plan.tensors[name], layer, lora, alphas[name] / layer.rank)
    else:
        plan.adapter = [
            PlannedTensor.of(diffusers_name(name, part), lora.tensors[stored])
            for name, layer in layers.items()
            for part, stored in (("lora_A", layer.down), ("lora_B", layer.up))
        ]
        plan.adapter_metadata = {"lora_adapter_metadata": json.dumps(_adapter_metadata(layers, alphas))}
    done = "merged" if settings.lora_mode == "merge" else f"kept as {ADAPTER}"
    scales = sorted({alphas[name] / layer.rank for name, layer in layers.items()})
    strength = ", ".join(f"{scale:g}" for scale in scales)
    plan.notes.append(f"{done}: LoRA {path.name}, {len(layers)} layers, alpha / rank {strength}")
    plan.notes += _left_out(lora)
    plan.files += [("LoRA", file) for file in lora.files]


def _alpha(layer: LoRALayer, lora: Checkpoint, settings: ConversionSettings) -> float:
    """Alpha of a layer: as its file says, else as PEFT's configuration beside it does, else as given."""
    told: float | None = None
    beside = lora.files[0].parent / "adapter_config.json"
    if layer.alpha is not None:
        told = float(lora.tensors[layer.alpha].read())
    elif beside.is_file():
        content = read_object(beside)
        if content.get("use_rslora") or content.get("alpha_pattern"):
            raise ValueError(f"{str(beside)!r}: use_rslora and alpha_pattern are not known here")
        told = float(content["lora_alpha"])
    given = settings.lora_alpha
    if told is None and given is None:
        raise ValueError(
            f"lora_alpha (--lora-alpha) must be given, as no file tells it; it is often the rank {layer.rank}"
        )
    if told is not None and given not in (None, told):
        raise ValueError(f"lora_alpha (--lora-alpha) must be {told:g}, as the LoRA says, got {given:g}")
    return told if told is not None else cast(float, given)


def _merged(base: PlannedTensor, layer: LoRALayer, lora: Checkpoint, scale: float) -> PlannedTensor:
    down, up = lora.tensors[layer.down], lora.tensors[layer.up]
    return replace(base, read=lambda: merged(base.read(), down.read(), up.read(), scale))


def _adapter_metadata(layers: Mapping[str, LoRALayer], alphas: Mapping[str, float]) -> dict[str, object]:
    """PEFT's configuration, under the prefix that diffusers expects in a file."""
    modules = {name.removesuffix(".weight"): name for name in layers}
    first = next(iter(layers))
    config: dict[str, object] = {
        "r": layers[first].rank,
        "lora_alpha": alphas[first],
        "target_modules": list(modules),
        "rank_pattern": {module: layers[name].rank for module, name in modules.items()},
        "alpha_pattern": {module: alphas[name] for module, name in modules.items()},
    }
    return {f"transformer.{name}": value for name, value in config.items()}


def _write_transformer(folder: Path, kind: str, plan: _Plan, settings: ConversionSettings) -> None:
    write_shards(folder, _STEM, list(plan.tensors.values()), int(settings.max_shard_gb * _GIGABYTE))
    arguments = inspect.signature(CausalDiT.__init__).parameters
    defaults = {name: argument.default for name, argument in arguments.items() if name != "self"}
    kinds = {"_class_name": kind, "_diffusers_version": diffusers.__version__}
    write_json(folder / _CONFIG_NAME, {**kinds, **defaults, **plan.config})


def _write_model(folder: Path, plan: _Plan, settings: ConversionSettings) -> Parts:
    """Write the transformer with its parts, its scheduler and the index of them all."""
    parts = find_parts(
        PartSources(
            source=settings.source,
            text_encoder=settings.text_encoder,
            tokenizer=settings.tokenizer,
            vae=settings.vae,
            accepted=frozenset(inspect.signature(CausalVideoPipeline.__init__).parameters),
            max_shard_bytes=int(settings.max_shard_gb * _GIGABYTE),
        )
    )
    parts.check(plan.config)
    scheduler, streaming, note = _streaming(settings, plan)
    plan.notes.append(note)
    components = [*parts.components, scheduler]
    for component in components:
        component.write(folder / component.name)
    _write_transformer(folder / "transformer", CausalDiT.__name__, plan, settings)
    index = {
        "_class_name": CausalVideoPipeline.__name__,
        "_diffusers_version": diffusers.__version__,
        **dict.fromkeys(("tokenizer", "text_encoder", "vae"), (None, None)),
        "transformer": ("genstream", CausalDiT.__name__),
        **{component.name: (component.library, component.kind) for component in components},
        **streaming,
    }
    write_json(folder / INDEX_NAME, index)
    check_model_folder(folder)
    return parts


def _streaming(settings: ConversionSettings, plan: _Plan) -> tuple[Component, dict[str, Any], str]:
    """The scheduler, the pipeline's settings, and what to say about them."""
    parameters = inspect.signature(CausalVideoPipeline.__init__).parameters
    values = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    index = settings.source / INDEX_NAME
    own = read_object(index) if index.is_file() else {}
    is_own = own.get("_class_name") == CausalVideoPipeline.__name__
    values["text_tokens"] = plan.text_tokens
    if is_own:
        values |= {name: value for name, value in own.items() if name in values}
    if is_own and settings.preset is None:
        library, kind = own["scheduler"]
        scheduler = copied("scheduler", library, kind, settings.source / "scheduler")
        return scheduler, values, f"streams as {settings.source.name} does"
    name = settings.preset or DEFAULT_PRESET
    preset = _preset(name)
    for setting in fields(preset.settings):
        value = getattr(preset.settings, setting.name)
        if setting.name not in values:
            raise ValueError(f"preset {name!r} sets {setting.name}, which the pipeline does not keep")
        values[setting.name] = value.value if isinstance(value, Enum) else value
    steps = FewStepScheduler(steps=preset.steps, shift=preset.shift)
    scheduler = Component(
        name="scheduler",
        library="genstream",
        kind=FewStepScheduler.__name__,
        config={},
        files=(),
        write=steps.save_pretrained,
    )
    return scheduler, values, f"streams by the preset {name!r}"


def _preset(name: str) -> _Preset:
    """How the published students stream, by name."""
    if name != DEFAULT_PRESET:
        raise ValueError(f"preset (--preset) must be {DEFAULT_PRESET}, got {name!r}")
    return _Preset(settings=StreamSettings(chunk_frames=3), steps=(1000.0, 750.0, 500.0, 250.0), shift=5.0)


def _card(settings: ConversionSettings, plan: _Plan, parts: Parts) -> ConversionCard:
    files = [*plan.files, *((part.name, file) for part in parts.components for file in part.files)]
    name = settings.output.name
    usage = f'import genstream\n\npipe = genstream.CausalVideoPipeline.from_pretrained("{name}")'
    if settings.kind == "diffusers":
        usage = (
            f"from diffusers import WanTransformer3DModel\n\n"
            f'transformer = WanTransformer3DModel.from_pretrained("{name}")'
        )
    return ConversionCard(
        title=name,
        library=settings.kind,
        usage=usage,
        notes=[*plan.notes, *parts.notes, f"converted by genstream {genstream.__version__}"],
        origins=[Origin(part=part, file=file.name, sha256=sha256(file)) for part, file in files],
        terms=find_license(settings.license, settings.source),
        source=settings.source,
    )
