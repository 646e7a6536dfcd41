"""CLIP's vision model as Wan 2.1 publishes it (`models_clip_open-clip-*.pth`), for transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from genstream.transformer.matching import Shapes, check_tensors, shape_of

_VISION = "visual."
_TEXT = ("textual.", "log_scale")
"""The other half of CLIP, which no video model takes."""
_TO_TEXT = "head"
"""Matrix that brings the last layer's class token to the text's; Wan takes the tokens before that layer."""
_HEAD_WIDTH = 80
"""Of CLIP ViT-H/14; no shape tells it."""
_LAYER = re.compile(r"transformer\.(\d+)\.")

# The published module -> that of `CLIPVisionModel`.
_IN_LAYER = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_OUTSIDE_LAYERS = {"pre_norm": "pre_layrnorm", "post_norm": "post_layernorm"}
_EMBEDDINGS = {
    "patch_embedding.weight": "patch_embedding.weight",
    "cls_embedding": "class_embedding",
    "pos_embedding": "position_embedding.weight",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor of `CLIPVisionModel`, in the published ones.

    Attributes:
        name: of the published tensor.
        first_row: of its rows that are the tensor; it has no batch dimension.
        shape: of the tensor.
    """

    name: str
    first_row: int
    shape: tuple[int, ...]


def infer_clip_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments of transformers' `CLIPVisionConfig` from the shapes of the published weights.

    Raises:
        ValueError: they are no CLIP vision model's.
    """
    width, _, patch, _ = shape_of(shapes, f"{_VISION}patch_embedding.weight", 4)
    _, positions, _ = shape_of(shapes, f"{_VISION}pos_embedding", 3)
    if width % _HEAD_WIDTH:
        raise ValueError(
            f"checkpoint: CLIP must have heads of {_HEAD_WIDTH} channels, got a width of {width}"
        )
    layers = [_LAYER.match(name.removeprefix(_VISION)) for name in shapes]
    return {
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, f"{_VISION}transformer.0.mlp.0.weight", 2)[0],
        "num_hidden_layers": max((int(match[1]) + 1 for match in layers if match), default=0),
        "num_attention_heads": width // _HEAD_WIDTH,
        "image_size": patch * math.isqrt(positions - 1),
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


def clip_places(shapes: Shapes, config: dict[str, Any]) -> dict[str, Place]:
    """Name of every tensor in `CLIPVisionModel`, and where it stands in the published ones.

    Raises:
        ValueError: a tensor is missing, superfluous, or of another shape.
    """
    expected: dict[str, tuple[int, ...]] = {}
    places = {}
    for ours, place, shape in _places(config):
        expected[place.name] = shape
        places[ours] = place
    vision = {name: shape for name, shape in shapes.items() if not name.startswith(_TEXT)}
    vision.pop(f"{_VISION}{_TO_TEXT}", None)
    check_tensors(vision, expected)
    return places


def _places(config: dict[str, Any]) -> Iterator[tuple[str, Place, tuple[int, ...]]]:
    """Name in `CLIPVisionModel`, its place, and the shape of the whole published tensor there."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    patch = config["patch_size"]
    positions = (config["image_size"] // patch) ** 2 + 1
    outside = {
        "patch_embedding.weight": (width, 3, patch, patch),
        "cls_embedding": (1, 1, width),
        "pos_embedding": (1, positions, width),
    }
    # One vector and one matrix of the published tensors carry dimensions of size 1 in front.
    inside = {"cls_embedding": (width,), "pos_embedding": (positions, width)}
    for theirs, ours in _EMBEDDINGS.items():
        place = Place(name=_VISION + theirs, first_row=0, shape=inside.get(theirs, outside[theirs]))
        yield f"embeddings.{ours}", place, outside[theirs]
    for theirs, ours in _OUTSIDE_LAYERS.items():
        yield from _module(ours, theirs, (width,))
    shapes = {
        "norm1": (width,),
        "attn.proj": (width, width),
        "norm2": (width,),
        "mlp.0": (hidden, width),
        "mlp.2": (width, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in _IN_LAYER.items():
            yield from _module(
                f"encoder.layers.{layer}.{ours}", f"transformer.{layer}.{theirs}", shapes[theirs]
            )
        for part, name in enumerate("qkv"):
            yield from _module(
                f"encoder.layers.{layer}.self_attn.{name}_proj",
                f"transformer.{layer}.attn.to_qkv",
                (width, width),
                part=part,
                parts=3,
            )


def _module(
    ours: str, theirs: str, shape: tuple[int, ...], *, part: int = 0, parts: int = 1
) -> Iterator[tuple[str, Place, tuple[int, ...]]]:
    """Weight and bias of a module that is one of several `parts` on top of each other in a published one."""
    rows = shape[0]
    for name, own in (("weight", shape), ("bias", (rows,))):
        place = Place(name=f"{_VISION}{theirs}.{name}", first_row=part * rows, shape=own)
        yield f"{ours}.{name}", place, (parts * rows, *own[1:])
