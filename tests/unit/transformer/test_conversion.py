"""Checkpoints under the original names: every tensor finds its place, or is refused by name."""

import pytest
import torch

from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import (
    expected_shapes,
    from_wan,
    infer_config,
    places,
    read_config,
    wan_names,
)

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


WITHOUT_IMAGE = {
    name: value
    for name, value in CONFIG.items()
    if name not in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
}


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        WITHOUT_IMAGE,
        WITHOUT_IMAGE | {"cross_attn_norm": False},
        WITHOUT_IMAGE | {"patch_size": (1, 1, 1), "num_layers": 1},
        CONFIG | {"pos_embed_seq_len": None, "num_attention_heads": 3, "ffn_dim": 7},
    ],
)
@pytest.mark.parametrize("names", ["wan", "diffusers"])
def test_configuration_from_the_shapes(config, names):
    shapes = expected_shapes(config)
    if names == "wan":
        shapes = {wan: shapes[ours] for wan, ours in wan_names(config).items()}
    found = infer_config(shapes, {"num_attention_heads": config["num_attention_heads"]})
    assert expected_shapes(found) == expected_shapes(config)
    model = CausalDiT(**config)
    assert {name: found.get(name, value) for name, value in model.config.items()} == dict(model.config)
    assert places(shapes, found).keys() == expected_shapes(config).keys()


def test_heads_of_the_published_models():
    config = WITHOUT_IMAGE | {"num_attention_heads": 3, "attention_head_dim": 128, "num_layers": 1}
    assert infer_config(expected_shapes(config), {})["num_attention_heads"] == 3


def test_heads_that_nobody_tells():
    with pytest.raises(ValueError, match="width 24 is no multiple of 128"):
        infer_config(expected_shapes(CONFIG), {})


@pytest.mark.parametrize("name", [name for name, value in CONFIG.items() if value is not None])
def test_a_configuration_that_contradicts_the_tensors(name):
    wrong = {"num_attention_heads": 2, "attention_head_dim": 12} | {name: CONFIG[name] + 1}
    with pytest.raises(ValueError, match=f"config says ({name} {wrong[name]}|attention_head_dim 12), but"):
        infer_config(expected_shapes(CONFIG), wrong)


def test_configuration_under_the_names_of_wan():
    wan = {
        "model_type": "i2v",
        "dim": 24,
        "num_heads": 2,
        "in_dim": 8,
        "out_dim": 4,
        "text_len": 512,
        "eps": 1e-5,
    }
    assert read_config({**wan, "qk_norm": True}) == {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 8,
        "out_channels": 4,
        "eps": 1e-5,
    }
    with pytest.raises(ValueError, match="qk_norm"):
        read_config({**wan, "qk_norm": False})


def test_configuration_under_our_own_names():
    given = {"_class_name": "WanTransformer3DModel", "qk_norm": "rms_norm", "out_channels": None, "eps": 1e-5}
    assert read_config(given) == {"qk_norm": "rms_norm", "eps": 1e-5}
    with pytest.raises(ValueError, match="qk_norm must be 'rms_norm_across_heads', got 'rms_norm'"):
        places(expected_shapes(CONFIG), {**CONFIG, **read_config(given)})


def test_what_is_no_transformer():
    error = r"lacks 'patch_embedding.weight' and is no model of this kind; it holds 'encoder.conv1.weight'"
    with pytest.raises(ValueError, match=error):
        infer_config({"encoder.conv1.weight": (4, 4)}, {})


@pytest.mark.parametrize("wrong", [{"eps": "x"}, {"num_layers": [2]}, {"cross_attn_norm": 1}])
def test_a_configuration_of_nonsense_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"config says {name} .*, which must be of type"):
        read_config({**CONFIG, **wrong})
