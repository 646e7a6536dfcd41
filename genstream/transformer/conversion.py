"""Published weights and configurations of Wan transformers, and where they go in `CausalDiT`.

Self Forcing and its relatives publish them under the names of the original Wan 2.1 code, in trainers'
wrappings; diffusers' names are our own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.matching import Shapes, check_tensors, count_blocks, plain_names, shape_of, some

WAN_HEAD_WIDTH = 128
"""Channels of an attention head in every published Wan model; no tensor's shape tells it."""

# Our module or parameter -> Wan's.
_OUTSIDE_BLOCKS = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_IN_BLOCK = {
    "scale_shift_table": "modulation",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    **{
        f"{ours}.{mine}": f"{wan}.{its}"
        for ours, wan in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for mine, its in (
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "o"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
}


# Wan's configuration -> ours, where the names differ; the width is told by heads times head width.
_WAN_CONFIG = {"in_dim": "in_channels", "out_dim": "out_channels", "num_heads": "num_attention_heads"}
_CONFIG = {
    name: argument.default
    for name, argument in inspect.signature(CausalDiT.__init__).parameters.items()
    if name != "self"
}
"""Arguments of `CausalDiT` with their defaults."""

_IMAGE_TYPES = ("i2v", "flf2v")
_TYPES: Mapping[type, tuple[type, ...]] = {bool: (bool,), int: (int, float), float: (int, float)}

# Argument of `CausalDiT` -> the tensor whose shape tells it.
_EVIDENCE = {
    "patch_size": "patch_embedding.weight",
    "num_attention_heads": "patch_embedding.weight",
    "attention_head_dim": "patch_embedding.weight",
    "in_channels": "patch_embedding.weight",
    "out_channels": "proj_out.weight",
    "text_dim": "condition_embedder.text_embedder.linear_1.weight",
    "freq_dim": "condition_embedder.time_embedder.linear_1.weight",
    "ffn_dim": "blocks.0.ffn.net.0.proj.weight",
    "cross_attn_norm": "blocks.0.norm2.weight",
    "image_dim": "condition_embedder.image_embedder.norm1.weight",
    "added_kv_proj_dim": "blocks.0.attn2.add_k_proj.weight",
    "pos_embed_seq_len": "condition_embedder.image_embedder.pos_embed",
}


def wan_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Wan's name of every tensor of a transformer, and ours.

    Args:
        config: arguments of `CausalDiT`.
    """
    return {_wan_name(name): name for name in expected_shapes(config)}


def from_wan(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the weights of a Wan checkpoint for `CausalDiT`.

    Args:
        state_dict: tensors under Wan's names, with or without the prefixes that trainers put in front.
        config: arguments of `CausalDiT`.

    Raises:
        ValueError: a tensor is missing, superfluous, there twice, or of another shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    return {ours: state_dict[name] for ours, name in places(shapes, config).items()}


def places(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, str]:
    """Our name of every tensor of the transformer, and the name of the checkpoint's tensor that goes there.

    Args:
        shapes: of the checkpoint's tensors, under Wan's or diffusers' names, with or without prefixes.
        config: arguments of `CausalDiT`.

    Raises:
        ValueError: a tensor is missing, superfluous, there twice, or of another shape.
    """
    plain = plain_names(shapes)
    theirs = _naming(plain)
    expected = expected_shapes(config)
    check_tensors(
        {name: shapes[given] for name, given in plain.items()},
        {theirs(ours): shape for ours, shape in expected.items()},
    )
    return {ours: plain[theirs(ours)] for ours in expected}


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer's tensors."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in CausalDiT(**config).state_dict().items()}


def infer_config(shapes: Shapes, known: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `CausalDiT` from the shapes of a checkpoint's tensors.

    Args:
        shapes: as for `places`.
        known: arguments that somebody gave; they must agree with the shapes. The heads come from here;
            without them a head has the 128 channels that it has in all published Wan models.

    Raises:
        ValueError: the shapes contradict `known`, do not tell enough, or are no Wan transformer's.
    """
    plain = {name: shapes[given] for name, given in plain_names(shapes).items()}
    theirs = _naming(plain)
    evidence = {ours: plain.get(theirs(ours)) for ours in _EVIDENCE.values()}
    if not any(evidence.values()):
        wanted = theirs(_EVIDENCE["in_channels"])
        raise ValueError(
            f"checkpoint lacks {wanted!r} and is no model of this kind; it holds "
            f"{some(sorted(plain)) or 'no tensors'}"
        )
    found = _inferred(evidence, theirs)
    found["num_layers"] = count_blocks(plain)
    found |= _heads(plain[theirs("patch_embedding.weight")][0], known)
    for name in found.keys() & known.keys():
        given = tuple(known[name]) if isinstance(known[name], list) else known[name]
        if given != found[name]:
            place = theirs(_EVIDENCE[name]) if name in _EVIDENCE else "blocks"
            shape = f", {place!r} is {list(plain[place])}" if place in plain else f", from {place!r}"
            raise ValueError(
                f"config says {name} {known[name]!r}, but the tensors say {found[name]!r}{shape}"
            )
    return {**known, **found}


def read_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `CausalDiT` from a configuration under Wan's or diffusers' names; others are left out.

    Raises:
        ValueError: it describes a model that `CausalDiT` cannot be.
    """
    if content.get("qk_norm") is False:
        raise ValueError("config says qk_norm False; only models with qk_norm are known")
    # Wan says True for the one kind it has; diffusers may leave out_channels to in_channels.
    unsaid = {"qk_norm": True, "out_channels": None}
    known = {
        _WAN_CONFIG.get(name, name): value
        for name, value in content.items()
        if name not in unsaid or value is not unsaid[name]
    }
    if "dim" in content and "num_heads" in content:
        width, heads = _positive("dim", content), _positive("num_heads", content)
        known["attention_head_dim"] = width / heads
    taken = {name: value for name, value in known.items() if name in _CONFIG}
    for name, value in taken.items():
        kind = type(_CONFIG[name])
        if kind in _TYPES and not isinstance(value, _TYPES[kind]):
            raise ValueError(f"config says {name} {value!r}, which must be of type {kind.__name__}")
    if "eps" in taken:
        _positive("eps", taken)
    return taken


def check_model_type(content: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise ValueError if Wan's `model_type` contradicts the channels that the transformer takes."""
    takes_image = config["in_channels"] > config["out_channels"] or config["image_dim"] is not None
    said = content.get("model_type")
    if said in _IMAGE_TYPES and not takes_image:
        raise ValueError(f"config says model_type {said!r}, but the tensors take no image channels")
    if said == "t2v" and takes_image:
        raise ValueError("config says model_type 't2v', but the tensors take an image")


def whole_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of `CausalDiT`: those of a configuration, like `read_config`, and defaults."""
    known = {**_CONFIG, **read_config(content)}
    return {**known, "out_channels": known["out_channels"] or known["in_channels"]}


def _positive(name: str, content: Mapping[str, Any]) -> float:
    value = content[name]
    if type(value) not in (int, float) or not value > 0:
        raise ValueError(f"config says {name} {value!r}, which must be a number above 0")
    return float(value)


def _inferred(evidence: Mapping[str, tuple[int, ...] | None], theirs: Callable[[str], str]) -> dict[str, Any]:
    """All that single tensors tell; `evidence` holds their shapes by our names, None where there is none."""
    there = {theirs(name): shape for name, shape in evidence.items() if shape is not None}

    def shape(argument: str, dimensions: int) -> tuple[int, ...]:
        return shape_of(there, theirs(_EVIDENCE[argument]), dimensions)

    def optional(argument: str, dimension: int) -> int | None:
        found = evidence[_EVIDENCE[argument]]
        return found[dimension] if found is not None and len(found) > dimension else None

    _, in_channels, *patch = shape("in_channels", 5)
    return {
        "patch_size": tuple(patch),
        "in_channels": in_channels,
        "out_channels": shape("out_channels", 2)[0] // (patch[1] * patch[2]),
        "text_dim": shape("text_dim", 2)[1],
        "freq_dim": shape("freq_dim", 2)[1],
        "ffn_dim": shape("ffn_dim", 2)[0],
        "cross_attn_norm": evidence[_EVIDENCE["cross_attn_norm"]] is not None,
        "image_dim": optional("image_dim", 0),
        "added_kv_proj_dim": optional("added_kv_proj_dim", 1),
        "pos_embed_seq_len": optional("pos_embed_seq_len", 1),
    }


def _heads(width: int, known: Mapping[str, Any]) -> dict[str, int]:
    heads = known.get("num_attention_heads")
    if heads is None and width % WAN_HEAD_WIDTH:
        raise ValueError(
            f"num_attention_heads must be given (--heads, or in a config): width {width} is no multiple of "
            f"{WAN_HEAD_WIDTH}, the head width of Wan models"
        )
    heads = width // WAN_HEAD_WIDTH if heads is None else heads
    if heads < 1 or width % heads:
        raise ValueError(f"num_attention_heads must divide the width {width}, got {heads}")
    return {"num_attention_heads": heads, "attention_head_dim": width // heads}


def _naming(plain: Iterable[str]) -> Callable[[str], str]:
    """From our names to the checkpoint's: the same for diffusers', else Wan's."""
    if any(name.startswith("condition_embedder.") for name in plain):
        return str
    return _wan_name


def _wan_name(name: str) -> str:
    block, names, inner = "", _OUTSIDE_BLOCKS, name
    if name.startswith("blocks."):
        _, index, inner = name.split(".", 2)
        block, names = f"blocks.{index}.", _IN_BLOCK
    if inner in names:
        return block + names[inner]
    module, _, parameter = inner.rpartition(".")
    return f"{block}{names[module]}.{parameter}"
