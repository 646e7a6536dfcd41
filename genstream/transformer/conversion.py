"""Weights under the names of the original Wan 2.1 code, as Self Forcing and its relatives publish them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genstream.transformer.causal_dit import CausalDiT

_WRAPPERS = ("model.", "net.", "module.", "diffusion_model.")
_INNER_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.")

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


def wan_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Wan's name of every tensor of a transformer, and ours.

    Args:
        config: arguments of `CausalDiT`.
    """
    return {_wan_name(name): name for name in _tensors(config)}


def from_wan(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the weights of a Wan checkpoint for `CausalDiT`.

    Args:
        state_dict: tensors under Wan's names, with or without the prefixes that trainers put in front.
        config: arguments of `CausalDiT`.

    Raises:
        ValueError: a tensor is missing, superfluous, there twice, or of another shape.
    """
    given: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if (stripped := _strip(name)) in given:
            raise ValueError(f"state_dict holds {stripped!r} twice, under different prefixes")
        given[stripped] = tensor
    names, expected = wan_names(config), _tensors(config)
    if missing := sorted(names.keys() - given.keys()):
        raise ValueError(f"state_dict lacks {_some(missing)}")
    if superfluous := sorted(given.keys() - names.keys()):
        raise ValueError(f"state_dict holds {_some(superfluous)}, which the transformer does not have")
    for wan, ours in names.items():
        if given[wan].shape != expected[ours].shape:
            wanted, got = list(expected[ours].shape), list(given[wan].shape)
            raise ValueError(f"state_dict: {wan!r} must have the shape {wanted}, got {got}")
    return {ours: given[wan] for wan, ours in names.items()}


def _tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of a transformer's tensors, without memory."""
    with torch.device("meta"):
        return dict(CausalDiT(**config).state_dict())


def _wan_name(name: str) -> str:
    block, names, inner = "", _OUTSIDE_BLOCKS, name
    if name.startswith("blocks."):
        _, index, inner = name.split(".", 2)
        block, names = f"blocks.{index}.", _IN_BLOCK
    if inner in names:
        return block + names[inner]
    module, _, parameter = inner.rpartition(".")
    return f"{block}{names[module]}.{parameter}"


def _strip(name: str) -> str:
    for wrapper in _INNER_WRAPPERS:
        name = name.replace(wrapper, "")
    while prefix := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), None):
        name = name.removeprefix(prefix)
    return name


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
