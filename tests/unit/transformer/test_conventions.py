"""What diffusers' own tests ask of a model: files, dtypes, hooks, training and attention processors."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import EMAModel

from genstream.transformer.attention import AttentionProcessor
from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import read_config

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture
def model(build_pipeline):
    return build_pipeline().transformer


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 3, 4, 6, generator=generator)
    context = torch.randn(2, 12, 16, generator=generator)
    return latents, torch.tensor([300.0, 900.0]), context


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_saved_and_loaded(model, inputs, tmp_path, variant, max_shard_size):
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=max_shard_size)
    weights = list(tmp_path.glob("*.safetensors"))
    assert (len(weights) > 1) == (max_shard_size == "20KB")
    assert all(("fp16" in path.name) == (variant == "fp16") for path in weights)
    loaded = CausalDiT.from_pretrained(tmp_path, variant=variant)
    assert read_config(json.loads(loaded.to_json_string())) == read_config(json.loads(model.to_json_string()))
    assert not loaded.training
    close(loaded(*inputs).sample, model(*inputs).sample)


def test_a_variant_that_is_not_there(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"fp16"):
        CausalDiT.from_pretrained(tmp_path, variant="fp16")


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_dtype(model, inputs, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    loaded = CausalDiT.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    kept = {name for name, weight in loaded.named_parameters() if weight.dtype == torch.float32}
    modules = set(CausalDiT._keep_in_fp32_modules)
    expected = {name for name, _ in loaded.named_parameters() if modules & set(name.split("."))}
    assert kept == (set(dict(loaded.named_parameters())) if dtype == torch.float32 else expected)
    latents, timestep, context = inputs
    velocity = loaded(latents.to(dtype), timestep, context.to(dtype)).sample
    assert velocity.dtype == dtype
    close(velocity.float(), model(*inputs).sample, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_the_same_twice_and_as_a_tuple(model, inputs):
    first = model(*inputs).sample
    assert torch.equal(model(*inputs).sample, first)
    (again,) = model(*inputs, return_dict=False)
    assert torch.equal(again, first)
    assert torch.equal(model(*inputs)["sample"], first)


def test_a_batch_is_its_elements(model, inputs):
    together = model(*inputs).sample
    alone = [model(*(x[row : row + 1] for x in inputs)).sample for row in range(2)]
    close(together, torch.cat(alone))


def test_unknown_attributes(model):
    assert model.config.num_layers == 2
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(model, inputs, kind):
    expected = model(*inputs).sample
    apply_group_offloading(
        model, onload_device=torch.device("cpu"), offload_type=kind, num_blocks_per_group=1
    )
    assert torch.equal(model(*inputs).sample, expected)
    assert model.device.type == "cpu"


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_layerwise_casting(model, inputs, tmp_path, compute):
    expected = model(*inputs).sample
    model.save_pretrained(tmp_path)
    cast = CausalDiT.from_pretrained(tmp_path, dtype=compute)
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    stored = {weight.dtype for weight in cast.blocks[0].attn1.to_q.parameters()}
    assert stored == {torch.float8_e4m3fn}
    assert cast.dtype == cast.patch_embedding.weight.dtype == compute
    latents, timestep, context = inputs
    velocity = cast(latents.to(compute), timestep, context.to(compute)).sample
    assert 0 < (velocity.float() - expected).norm() < 0.1 * expected.norm()


def test_training_reaches_every_weight(model, inputs):
    model.train()
    target = torch.randn_like(inputs[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    average = EMAModel(model.parameters(), decay=0.5)
    losses = []
    for _ in range(5):
        loss = (model(*inputs).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())
        optimizer.step()
        average.step(model.parameters())
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    last = copy.deepcopy(model.state_dict())
    average.copy_to(model.parameters())
    assert not torch.equal(model.proj_out.weight, last["proj_out.weight"])


def test_mixed_precision_training(model, inputs):
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(*inputs).sample.float().square().mean()
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_gradient_checkpointing_is_switched(model):
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


class Silent(AttentionProcessor):
    """Attends to nothing."""

    def __call__(self, attention, query, keys, values, mask=None):
        return super().__call__(attention, query, keys, values, mask) * 0


def test_attention_processors(model, inputs):
    expected = model(*inputs).sample
    own = model.attn_processors
    assert list(own) == [f"blocks.{block}.attn{kind}.processor" for block in (0, 1) for kind in (1, 2)]
    model.set_attn_processor(Silent())
    assert {type(processor) for processor in model.attn_processors.values()} == {Silent}
    assert not torch.allclose(model(*inputs).sample, expected, atol=1e-3)
    model.set_attn_processor(dict(own))
    assert model.attn_processors == own
    assert torch.equal(model(*inputs).sample, expected)
    with pytest.raises(ValueError, match="number of"):
        model.set_attn_processor({"blocks.0.attn1.processor": Silent()})


def test_fusing_projections_changes_nothing(model, inputs):
    """diffusers fuses what supports it, and leaves the rest alone."""
    expected, names = model(*inputs).sample, list(model.state_dict())
    model.fuse_qkv_projections()
    assert torch.equal(model(*inputs).sample, expected)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(model, inputs, backend):
    expected = model(*inputs).sample
    with torch.no_grad():
        model.set_attention_backend(backend)
        close(model(*inputs).sample, expected)
        model.set_attention_backend("native")


@pytest.mark.parametrize("kind", [FirstBlockCacheConfig, PyramidAttentionBroadcastConfig])
def test_step_caches_are_refused(model, kind):
    with pytest.raises(ValueError, match=f"would leave gaps in the KV cache, got {kind.__name__}"):
        model.enable_cache(kind())


def test_blocks_compile_without_a_break(model, inputs):
    expected = model(*inputs).sample
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    close(model(*inputs).sample, expected)


def test_weights_may_wait_in_memory_or_on_the_disk(model, inputs, tmp_path):
    expected = model(*inputs).sample
    close(
        disk_offload(copy.deepcopy(model), tmp_path / "moved", execution_device="cpu")(*inputs).sample,
        expected,
    )
    model.save_pretrained(tmp_path / "model")
    folder = tmp_path / "offloaded"
    on_disk = CausalDiT.from_pretrained(tmp_path / "model", device_map={"": "disk"}, offload_folder=folder)
    close(on_disk(*inputs).sample, expected)
    close(cpu_offload(model, execution_device="cpu")(*inputs).sample, expected)
