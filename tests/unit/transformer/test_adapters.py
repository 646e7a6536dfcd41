"""LoRAs on the transformer's weights: their names, their scales, and whose they are at a time."""

import copy
import json
from pathlib import Path

import pytest
import rollouts
import torch

from genstream.transformer.adapters import (
    LoraUse,
    active_loras,
    adapter_of,
    base_name,
    loras_in_use,
    peft_adapter,
    use_loras,
)
from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import from_wan, infer_config, read_config
from genstream.transformer.lora import lora_layers, merged

NAMINGS = ("peft", "diffusers", "original")


@pytest.fixture
def model(build_pipeline):
    return build_pipeline().transformer


@pytest.fixture
def run():
    """Velocity of fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 3, 4, 4, generator=generator)
    context = torch.randn(1, 12, 16, generator=generator)
    return lambda model: model(latents, torch.tensor([500.0]), context).sample.detach()


def load(model, tensors, name="style", **metadata):
    adapter, config = peft_adapter(tensors, model, metadata)
    model.load_lora_adapter(adapter, prefix=None, adapter_name=name, metadata=config)


def merge(model, tensors, scale):
    """Add a LoRA to the weights; `scale(rank)` is alpha / rank."""
    weights = dict(model.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    sizes = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name, layer in lora_layers(shapes, read_config(model.config), sizes).items():
        changed = merged(weights[name].data, tensors[layer.down], tensors[layer.up], scale(layer.rank))
        weights[name].data = changed.to(weights[name].dtype)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("ranks", [(2, 2), (1, 3)])
@pytest.mark.parametrize("naming", NAMINGS)
def test_an_adapter_equals_merged_weights(model, build_pipeline, build_lora, run, naming, ranks):
    tensors = build_lora(model, naming=naming, ranks=ranks)
    plain = run(model)
    load(model, tensors)
    expected = build_pipeline().transformer
    merge(expected, tensors, lambda rank: 1.0)
    close(run(model), run(expected))
    assert not torch.allclose(run(model), plain, atol=1e-2)


@pytest.mark.parametrize(
    ("alpha", "metadata", "power"),
    [
        (3, {}, 1.0),
        (None, {"lora_alpha": 3}, 1.0),
        (None, {"lora_alpha": 3, "use_rslora": True}, 0.5),
        (None, {"lora_alpha": 9, "alpha_pattern": {r"blocks\.\d+\..*": 3}}, 1.0),
    ],
)
def test_alpha_scales_an_adapter(model, build_lora, run, alpha, metadata, power):
    tensors = build_lora(model, naming="original", ranks=(1, 4), alpha=alpha)
    expected = copy.deepcopy(model)
    merge(expected, tensors, lambda rank: 3 / rank**power)
    load(model, tensors, **metadata)
    close(run(model), run(expected))


def test_names_without_adapters(model, build_lora):
    before = [name for name, _ in model.named_parameters()]
    load(model, build_lora(model), name="one")
    load(model, build_lora(model, seed=1), name="two")
    names = [name for name, _ in model.named_parameters()]
    assert [base_name(name) for name in names if adapter_of(name) is None] == before
    assert {adapter_of(name) for name in names} == {None, "one", "two"}


def test_adapters_are_used_for_a_while(model, build_lora, run):
    plain = run(model)
    load(model, build_lora(model), name="one")
    load(model, build_lora(model, seed=1), name="two")
    use_loras(model, (LoraUse(name="one", scale=0.7),))
    expected = run(model)
    for loras in ((), (LoraUse(name="two"),), (LoraUse(name="one"), LoraUse(name="two", scale=-0.5))):
        with loras_in_use(model, loras):
            assert active_loras(model) == loras
            assert not torch.allclose(run(model), expected, atol=1e-3)
            assert torch.equal(run(model), plain) == (loras == ())
        assert torch.equal(run(model), expected)


def test_what_was_in_use_comes_back_after_an_error(model, build_lora):
    load(model, build_lora(model))
    with pytest.raises(RuntimeError, match="on the way"), loras_in_use(model, ()):
        raise RuntimeError("on the way")
    assert active_loras(model) == (LoraUse(name="style"),)


def test_without_adapters_nothing_is_in_use(model):
    assert active_loras(model) == ()
    with loras_in_use(model, ()):
        assert not hasattr(model, "peft_config")


def test_what_cannot_be_used_is_refused(model, build_lora):
    with pytest.raises(ValueError, match="those loaded, none, got 'style'"):
        use_loras(model, (LoraUse(name="style"),))
    load(model, build_lora(model))
    with pytest.raises(ValueError, match=r"\['style'\], got 'other'"):
        use_loras(model, (LoraUse(name="other"),))
    assert active_loras(model) == (LoraUse(name="style"),)
    model.set_adapters("style", {"blocks.0": 0.5, "blocks.1": 0.25})
    with pytest.raises(ValueError, match="LoRA 'style' must have one scale in all layers"):
        active_loras(model)


def test_fused_weights_are_not_taken_apart(model, build_lora, run):
    load(model, build_lora(model))
    model.fuse_lora()
    expected = run(model)
    with pytest.raises(ValueError, match="fused"):
        use_loras(model, ())
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_bad_scale(scale):
    with pytest.raises(ValueError, match="scale of LoRA 'style' must be finite"):
        LoraUse(name="style", scale=scale)


@pytest.mark.parametrize("name", sorted(rollouts.sets("longlive")))
def test_the_published_file(name):
    """Base and LoRA of LongLive, kept apart, are the model that its rollouts were made with."""
    checkpoint = json.loads((rollouts.FOLDER / f"{name}.checkpoint.json").read_text())
    files = {key: rollouts.tensors(Path(file["file"]).stem) for key, file in checkpoint["files"].items()}
    base = files["generator"]
    shapes = {key: tuple(tensor.shape) for key, tensor in base.items()}
    config = infer_config(shapes, read_config(checkpoint["model_config"]))
    model = CausalDiT(**config).eval()
    model.load_state_dict(from_wan(base, config))
    load(model, files["generator_lora"], lora_alpha=checkpoint["lora_alpha"])
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, config["in_channels"], 3, 4, 6, generator=generator)
    context = torch.randn(1, 16, config["text_dim"], generator=generator)
    found, expected = (
        student(latents, torch.tensor([500.0]), context).sample.detach()
        for student in (model, rollouts.student(name))
    )
    close(found, expected)
