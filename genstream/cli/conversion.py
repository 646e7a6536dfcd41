"""Turns published weights into a model folder."""

import inspect
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch

import genstream
from genstream.cli.components import Parts, PartSources, find_parts
from genstream.cli.conversion_index import ACCEPTED_PARTS, streaming_of
from genstream.cli.conversion_lora import ADAPTER, LoRA, open_lora
from genstream.io.checkpoint import Checkpoint, naming, open_checkpoint, sha256
from genstream.io.hub_card import MODEL_PLACE, ConversionCard, Origin, find_license, license_of
from genstream.io.model_folder import INDEX_NAME, check_model_folder, check_weights, read_object
from genstream.io.shards import PlannedTensor, check_new_folder, new_folder, write_json, write_shards
from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import (
    WAN_HEAD_WIDTH,
    check_model_type,
    infer_config,
    places,
    read_config,
)
from genstream.transformer.matching import is_unwrapped

_TRANSFORMER = "transformer"
_STEM = "diffusion_pytorch_model"
_GIGABYTE = 10**9
_WAN_TEXT_TOKENS = 512
_CONFIG_NAME = "config.json"
# What a configuration of such a transformer tells, under the names of Wan or of diffusers.
_TELLING = ({"dim", "num_heads"}, {"num_attention_heads", "attention_head_dim"})
_ORIGINAL = ("WanModel", "WanTransformer3DModel")
"""Classes of Wan's own transformers, in its code and in diffusers."""
_STUDENTS = ("generator", "generator_ema")
"""Weights in a torch file that only distillation leaves."""
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
        image_encoder: folder of CLIP's vision model, for transformers that take image tokens.
        preset: how the model streams; None keeps what a model folder says, takes other pipelines for the
            many-step models that they are, and all else for "self-forcing".
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
    image_encoder: Path | None = None
    preset: str | None = None
    dtype: str | None = None
    max_shard_gb: float = 5.0
    license: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.max_shard_gb < inf:
            raise ValueError(
                f"max_shard_gb (--max-shard-gb) must be a number above 0, got {self.max_shard_gb}"
            )
        if self.lora_alpha is not None and not 0 < self.lora_alpha < inf:
            raise ValueError(f"lora_alpha (--lora-alpha) must be a number above 0, got {self.lora_alpha}")
        if self.kind == "diffusers":
            for name in ("text_encoder", "tokenizer", "vae", "image_encoder", "preset"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no place in a folder of kind (--to) 'diffusers'")
        if self.license is not None and not self.license.strip():
            raise ValueError(f"license (--license) must be a name, got {self.license!r}")
        if self.lora is None and self.lora_alpha is not None:
            raise ValueError(f"lora_alpha (--lora-alpha) needs a lora (--lora), got {self.lora_alpha}")
        if self.lora is None and self.lora_mode != "merge":
            raise ValueError(f"lora_mode (--lora-mode) {self.lora_mode!r} needs a lora (--lora), got none")

    @property
    def kept_adapter(self) -> Path | None:
        """The adapter in the source, if it has one: it goes along unless a LoRA is given."""
        path = self.source / ADAPTER
        return path if self.lora is None and path.is_file() else None

    @property
    def max_shard_bytes(self) -> int:
        """Size of a weight file."""
        return int(self.max_shard_gb * _GIGABYTE)


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


@dataclass(kw_only=True)
class _Plan:
    """A transformer to write, and what there is to say about it."""

    config: dict[str, Any]
    tensors: list[PlannedTensor]
    text_tokens: int
    is_original: bool
    files: list[tuple[str, Path]]
    notes: list[str]


def convert(settings: ConversionSettings) -> Conversion:
    """Write the folder that `settings` describe; nothing is left behind if that fails.

    Raises:
        ValueError: a tensor, a configuration or a part does not fit; the message names it.
        OSError: a file cannot be read or written.
    """
    check_new_folder(settings.output)
    plan = _plan_transformer(settings)
    lora = None if settings.lora is None else _plan_lora(plan, settings, settings.lora)
    if settings.kept_adapter is not None:
        _plan_adapter(plan, settings.kept_adapter)
    elif (settings.source / ADAPTER).is_file():
        plan.notes.append(f"left out of {settings.source.name}: its own LoRA, in favour of {settings.lora}")
    with new_folder(settings.output) as folder:
        if settings.kind == "diffusers":
            _write_transformer(folder, "WanTransformer3DModel", plan, settings)
            parts = Parts()
            if not plan.is_original:
                plan.notes.append(
                    "a model of diffusers tells no way to stream: converting back needs --preset"
                )
        else:
            parts = _write_model(folder, plan, settings)
        if lora is not None and settings.lora_mode == "adapter":
            lora.write_adapter(folder)
        if settings.kept_adapter is not None:
            (folder / ADAPTER).parent.mkdir()
            shutil.copyfile(settings.kept_adapter, folder / ADAPTER)
        _card(settings, plan, parts).write(folder)
    return Conversion(
        folder=settings.output,
        config=plan.config,
        tensors=len(plan.tensors),
        size_bytes=sum(tensor.size_bytes for tensor in plan.tensors),
        notes=(*plan.notes, *parts.notes),
    )


def _plan_transformer(settings: ConversionSettings) -> _Plan:
    path = _transformer_in(settings.source)
    checkpoint = open_checkpoint(path, settings.weights)
    content, note = _config_beside(path, settings.config)
    with naming(path):
        known = _with_heads(read_config(content), settings.heads)
        config = infer_config(checkpoint.shapes, known)
        check_model_type(content, config)
        found = places(checkpoint.shapes, config)
    weights = "" if checkpoint.weights is None else f" {checkpoint.weights!r}"
    notes = [f"took weights{weights} of {path.name}, {len(found)} tensors", note, *_left_out(checkpoint)]
    if "num_attention_heads" not in known:
        heads = config["num_attention_heads"]
        notes.append(f"heads: {heads}, of {WAN_HEAD_WIDTH} channels as in all Wan models")
    if settings.dtype is not None:
        notes.append(f"converted to {settings.dtype}, but for what the model computes in float32")
    tensors = (PlannedTensor.of(ours, checkpoint.tensors[theirs]) for ours, theirs in found.items())
    return _Plan(
        config=config,
        tensors=[_cast(tensor, settings.dtype) for tensor in tensors],
        text_tokens=_text_tokens(content),
        is_original=(
            content.get("_class_name") in _ORIGINAL
            and is_unwrapped(checkpoint.shapes)
            and checkpoint.weights not in _STUDENTS
        ),
        files=[(f"{_TRANSFORMER}{weights}", file) for file in checkpoint.files],
        notes=notes,
    )


def _text_tokens(content: Mapping[str, Any]) -> int:
    tokens = content.get("text_len", _WAN_TEXT_TOKENS)
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"config says text_len {tokens!r}, which must be a whole number of at least 1")
    return tokens


def _transformer_in(source: Path) -> Path:
    """Where the transformer is: in its folder of a model folder, else the source itself."""
    if not (source / INDEX_NAME).is_file():
        return source
    if (source / "transformer_2").is_dir():
        raise ValueError(f"{str(source)!r} holds two transformers; name the folder of one")
    return source / "transformer"


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
    if not any(names <= content.keys() for names in _TELLING):
        kind = content.get("_class_name", "something else")
        return {}, f"configuration: from the tensors; {_CONFIG_NAME} beside them describes {kind}"
    return content, f"configuration: {_CONFIG_NAME}, which agrees with the tensors"


def _cast(tensor: PlannedTensor, name: str | None) -> PlannedTensor:
    """In the wanted dtype, but in float32 what the model computes in float32."""
    if name is None:
        return tensor
    exempt = any(part in CausalDiT._keep_in_fp32_modules for part in tensor.name.split("."))
    return replace(tensor, dtype=torch.float32 if exempt else getattr(torch, name))


def _plan_lora(plan: _Plan, settings: ConversionSettings, path: Path) -> LoRA:
    """The LoRA; merged into the planned weights, unless it is to be kept."""
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    lora = open_lora(path, plan.config, shapes, settings.lora_alpha)
    if settings.lora_mode == "merge":
        plan.tensors = [lora.merged_into(tensor) for tensor in plan.tensors]
    done = "merged" if settings.lora_mode == "merge" else f"kept as {ADAPTER.as_posix()}"
    plan.notes += [f"LoRA {done}: {lora.summary}", *_left_out(lora.checkpoint)]
    plan.files += [("LoRA", file) for file in lora.checkpoint.files]
    return lora


def _plan_adapter(plan: _Plan, path: Path) -> None:
    """The adapter that goes along as it is."""
    check_weights(path)
    plan.notes.append(f"LoRA kept as {ADAPTER.as_posix()}")
    plan.files.append(("LoRA", path))


def _write_transformer(folder: Path, kind: str, plan: _Plan, settings: ConversionSettings) -> None:
    write_shards(folder, _STEM, plan.tensors, settings.max_shard_bytes)
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
            image_encoder=settings.image_encoder,
            takes_image=plan.config.get("image_dim") is not None,
            accepted=ACCEPTED_PARTS,
            max_shard_bytes=settings.max_shard_bytes,
        )
    )
    parts.check(plan.config)
    streaming = streaming_of(
        settings.source, settings.preset, plan.text_tokens, plan.config, is_original=plan.is_original
    )
    plan.notes.append(streaming.note)
    for component in (*parts.components, streaming.scheduler):
        component.write(folder / component.name)
    _write_transformer(folder / "transformer", CausalDiT.__name__, plan, settings)
    write_json(folder / INDEX_NAME, streaming.index(parts.components))
    check_model_folder(folder)
    return parts


def _card(settings: ConversionSettings, plan: _Plan, parts: Parts) -> ConversionCard:
    files = [*plan.files, *((part.name, file) for part in parts.components for file in part.files)]
    return ConversionCard(
        title=settings.output.name,
        task="image-to-video" if _takes_image(plan.config) else "text-to-video",
        library=settings.kind,
        usage=_usage(settings, _half(plan.tensors)),
        notes=[*plan.notes, *parts.notes, f"converted by genstream {genstream.__version__}"],
        origins=[
            Origin(part=part, file=file.name, sha256=sha256(file), license=_license(settings, part, file))
            for part, file in files
        ],
        terms=find_license(settings.license, settings.source),
        source=settings.source,
    )


def _takes_image(config: Mapping[str, Any]) -> bool:
    return config["image_dim"] is not None or config["in_channels"] != config["out_channels"]


def _license(settings: ConversionSettings, part: str, file: Path) -> str | None:
    """The licence of a file; that of the transformer's weights may be given."""
    if part.startswith(_TRANSFORMER) and settings.license is not None:
        return settings.license
    return license_of(file)


def _half(tensors: Sequence[PlannedTensor]) -> str | None:
    """The half precision that most of the weights are in, if they are."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.size_bytes
    dtype = sizes.most_common(1)[0][0]
    return str(dtype).removeprefix("torch.") if dtype in (torch.bfloat16, torch.float16) else None


def _usage(settings: ConversionSettings, half: str | None) -> str:
    """Python code that loads the model, most of whose weights may be in a `half` precision."""
    folder = f"{MODEL_PLACE}/{ADAPTER.parent.as_posix()}"
    dtype, torch_dtype = (f", {key}=torch.{half}" if half else "" for key in ("dtype", "torch_dtype"))
    code, adapter = (
        f'import genstream\n\npipe = genstream.CausalVideoPipeline.from_pretrained("{MODEL_PLACE}"{dtype})',
        f'pipe.load_lora_weights("{folder}")',
    )
    if settings.kind == "diffusers":
        code, adapter = (
            "from diffusers import WanTransformer3DModel\n\n"
            f'transformer = WanTransformer3DModel.from_pretrained("{MODEL_PLACE}"{torch_dtype})',
            f'transformer.load_lora_adapter("{folder}", use_safetensors=True)',
        )
    if half:
        code = f"import torch\n{code}"
    if settings.kept_adapter is not None or settings.lora_mode == "adapter":
        code += f"\n{adapter}  # needs peft"
    return code
