"""Checkpoints under the original names: every tensor finds its place, or is refused by name."""

import pytest
import torch

from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import from_wan, wan_names

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 8,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "image_dim": 6,
    "added_kv_proj_dim": 24,
    "pos_embed_seq_len": 10,
}
NAME = "blocks.1.self_attn.q.weight"
KINDS = (NAME, "patch_embedding.bias", "head.modulation", "blocks.0.modulation", "img_emb.emb_pos")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalDiT(**CONFIG)


@pytest.fixture
def weights(model):
    ours = model.state_dict()
    return {wan: ours[name] for wan, name in wan_names(CONFIG).items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "module.model.",
        "model.net.",
        "model._fsdp_wrapped_module.",
        "_orig_mod.",
        "diffusion_model.",
    ],
)
def test_round_trip(model, weights, prefix):
    converted = from_wan({prefix + name: tensor for name, tensor in weights.items()}, CONFIG)
    ours = model.state_dict()
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in ours.items())


def test_wrappers_inside_names(model, weights):
    inside = {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in weights.items()}
    assert from_wan(inside, CONFIG).keys() == model.state_dict().keys()


def test_any_missing_tensor(weights):
    for name in KINDS:
        with pytest.raises(ValueError, match=f"lacks '{name}'$"):
            from_wan({other: tensor for other, tensor in weights.items() if other != name}, CONFIG)


def test_many_missing_tensors(weights):
    rest = {name: tensor for name, tensor in weights.items() if "blocks.0" not in name}
    with pytest.raises(ValueError, match="and 29 more"):
        from_wan(rest, CONFIG)


@pytest.mark.parametrize("name", ["blocks.2.modulation", "blocks.1.attn1.to_q.weight", "vae.conv1.weight"])
def test_superfluous_tensor(weights, name):
    with pytest.raises(ValueError, match=f"holds '{name}'"):
        from_wan({**weights, name: torch.zeros(1)}, CONFIG)


def test_any_wrong_shape(weights):
    for name in KINDS:
        with pytest.raises(ValueError, match=f"'{name}' must have the shape"):
            from_wan({**weights, name: weights[name][..., None]}, CONFIG)


def test_a_tensor_under_two_prefixes(weights):
    with pytest.raises(ValueError, match="twice"):
        from_wan({**weights, f"model.{NAME}": weights[NAME]}, CONFIG)
