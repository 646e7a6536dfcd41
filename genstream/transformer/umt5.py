"""The text encoder of Wan 2.1 as published (`models_t5_umt5-xxl-enc-bf16.pth`), for transformers."""

from __future__ import annotations

from typing import Any

from genstream.transformer.matching import Shapes, check_tensors, count_blocks, plain_names, shape_of

# Wan's module -> that of `UMT5EncoderModel`.
_OUTSIDE_BLOCKS = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_IN_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def infer_umt5_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments of transformers' `UMT5Config` from the shapes of the published weights.

    Raises:
        ValueError: they are no umT5 encoder's.
    """
    plain = {name: shapes[given] for name, given in plain_names(shapes).items()}
    vocabulary, width = shape_of(plain, "token_embedding.weight", 2)
    buckets, heads = shape_of(plain, "blocks.0.pos_embedding.embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape_of(plain, "blocks.0.attn.q.weight", 2)[0] // heads,
        "d_ff": shape_of(plain, "blocks.0.ffn.fc1.weight", 2)[0],
        "num_layers": count_blocks(plain),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
    }


def umt5_places(shapes: Shapes, config: dict[str, Any]) -> dict[str, str]:
    """Name of every tensor in `UMT5EncoderModel`, and the name of the published tensor that goes there.

    Raises:
        ValueError: a tensor is missing, superfluous, or of another shape.
    """
    plain = plain_names(shapes)
    expected = umt5_tensors(config)
    check_tensors(
        {name: shapes[given] for name, given in plain.items()},
        {theirs: shape for theirs, (_, shape) in expected.items()},
    )
    return {ours: plain[theirs] for theirs, (ours, _) in expected.items()}


def umt5_tensors(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Published name -> name in transformers, and shape."""
    width, hidden = config["d_model"], config["d_ff"]
    inner = config["num_heads"] * config["d_kv"]
    shapes: dict[str, tuple[int, ...]] = {
        "norm1": (width,),
        "attn.q": (inner, width),
        "attn.k": (inner, width),
        "attn.v": (inner, width),
        "attn.o": (width, inner),
        "pos_embedding.embedding": (config["relative_attention_num_buckets"], config["num_heads"]),
        "norm2": (width,),
        "ffn.gate.0": (hidden, width),
        "ffn.fc1": (hidden, width),
        "ffn.fc2": (width, hidden),
    }
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embedding.weight": (
            f"{_OUTSIDE_BLOCKS['token_embedding']}.weight",
            (config["vocab_size"], width),
        ),
        "norm.weight": (f"{_OUTSIDE_BLOCKS['norm']}.weight", (width,)),
    }
    for block in range(config["num_layers"]):
        for theirs, ours in _IN_BLOCK.items():
            expected[f"blocks.{block}.{theirs}.weight"] = (
                f"encoder.block.{block}.{ours}.weight",
                shapes[theirs],
            )
    return expected
