"""LoRA weights find their layers under every name in use."""

import pytest
import torch

from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import expected_shapes, wan_names
from genstream.transformer.lora import lora_layers, merged

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
WEIGHTS = expected_shapes(CONFIG)
LINEAR = [name for name, shape in WEIGHTS.items() if name.startswith("blocks.") and len(shape) == 2]
OURS_TO_WAN = {ours: wan for wan, ours in wan_names(CONFIG).items()}
STYLES = {
    "peft": ("base_model.model.{wan}.lora_A.weight", "base_model.model.{wan}.lora_B.weight"),
    "peft default": (
        "base_model.model.{wan}.lora_A.default.weight",
        "base_model.model.{wan}.lora_B.default.weight",
    ),
    "diffusers": ("transformer.{ours}.lora_A.weight", "transformer.{ours}.lora_B.weight"),
    "kohya": ("diffusion_model.{wan}.lora_down.weight", "diffusion_model.{wan}.lora_up.weight"),
    "fsdp": (
        "model._fsdp_wrapped_module.{wan}.lora_A.weight",
        "model._fsdp_wrapped_module.{wan}.lora_B.weight",
    ),
}


def shapes(style: str, rank: int = 3) -> dict[str, tuple[int, ...]]:
    found = {}
    for name in LINEAR:
        layer = {"wan": OURS_TO_WAN[name].removesuffix(".weight"), "ours": name.removesuffix(".weight")}
        out, inner = WEIGHTS[name]
        down, up = (pattern.format(**layer) for pattern in STYLES[style])
        found |= {down: (rank, inner), up: (out, rank)}
    return found


@pytest.mark.parametrize("style", STYLES)
def test_every_style_names_the_same_layers(style):
    given = shapes(style)
    layers = lora_layers(given, CONFIG, WEIGHTS)
    assert sorted(layers) == sorted(LINEAR)
    assert sorted(name for layer in layers.values() for name in (layer.down, layer.up)) == sorted(given)
    for name, layer in layers.items():
        assert (given[layer.up][0], given[layer.down][1]) == WEIGHTS[name]
        assert layer.rank == 3 and layer.alpha is None


def test_merged_weight_acts_as_both_together():
    torch.manual_seed(0)
    weight, down, up, x = torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2), torch.randn(3, 7)
    expected = x @ weight.T + 0.5 * (x @ down.T) @ up.T
    torch.testing.assert_close(x @ merged(weight, down, up, 0.5).T, expected)


def test_layers_of_another_model():
    larger = CONFIG | {"num_layers": 1}
    with pytest.raises(ValueError, match=r"LoRA is for 'blocks.1.cross_attn.k'.* and 7 more, which"):
        lora_layers(shapes("peft"), larger, expected_shapes(larger))


def test_a_wider_model():
    wider = CONFIG | {"attention_head_dim": 24}
    with pytest.raises(ValueError, match=r"for a weight \[48, 48\], got \[3, 24\] and \[24, 3\]"):
        lora_layers(shapes("peft"), wider, expected_shapes(wider))


@pytest.mark.parametrize("lost", range(2))
def test_half_a_layer(lost):
    given = shapes("peft")
    name = STYLES["peft"][lost].format(wan="blocks.1.ffn.2")
    with pytest.raises(ValueError, match=r"lacks the (down|up) projection of 'blocks.1.ffn.2'"):
        lora_layers({other: shape for other, shape in given.items() if other != name}, CONFIG, WEIGHTS)


def test_what_is_no_lora():
    for given in ({}, {**shapes("peft"), "blocks.0.diff": (3,)}, CausalDiT(**CONFIG).state_dict()):
        with pytest.raises(ValueError, match="LoRA must hold lora_A and lora_B"):
            lora_layers({name: () for name in given}, CONFIG, WEIGHTS)
