"""Pipelines with eight-bit weights: how close they come, what they take, and that streams do not notice."""

import pytest
import torch

from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.pipelines.quantization import WeightFormat, quantization
from genstream.streaming.controls import LoraControl
from genstream.transformer.causal_dit import CausalDiT

RED = "a red circle moving right"
ERROR = {WeightFormat.INT8: 0.01, WeightFormat.FP8: 0.05}


@pytest.fixture(scope="module")
def wide(build_pipeline):
    """The small pipeline with layers so wide that their scales weigh little."""
    torch.manual_seed(0)
    pipe = build_pipeline()
    config = {"num_attention_heads": 4, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4}
    pipe.transformer = CausalDiT(**config, text_dim=16, freq_dim=16, ffn_dim=192, num_layers=2).eval()
    return pipe


@pytest.fixture(scope="module")
def folder(wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    wide.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(WeightFormat))
def weights(request):
    return request.param


@pytest.fixture(scope="module")
def quantized(folder, weights):
    pipe = CausalVideoPipeline.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization(weights)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def velocity(pipe):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 3, 4, 4, generator=generator)
    context = torch.randn(1, 12, 16, generator=generator)
    return pipe.transformer(latents, torch.tensor([500.0]), context).sample.detach()


def test_velocity_is_close(wide, quantized, weights):
    expected = velocity(wide)
    error = (velocity(quantized) - expected).norm() / expected.norm()
    assert 0 < error < ERROR[weights]


def test_blocks_take_a_byte_for_each_weight(wide, quantized):
    kept, linear = [], 0
    for name, parameter in quantized.transformer.named_parameters():
        if name.startswith("blocks.") and name.endswith(".weight") and parameter.ndim == 2:
            stored = sum(getattr(parameter, part).nbytes for part in parameter.tensor_data_names)
            assert parameter.numel() < stored < 1.1 * parameter.numel()
            linear += 1
        else:
            kept.append((name, parameter))
    assert linear == 2 * 10
    originals = dict(wide.transformer.named_parameters())
    for name, parameter in kept:
        assert torch.equal(parameter, originals[name])


def test_a_stream_runs_and_is_restored(quantized, tmp_path):
    state = quantized.start(quantized.request(RED))
    quantized.step(state)
    quantized.save_state(state, tmp_path / "stream.safetensors")
    expected = quantized.step(state).latents
    restored = quantized.load_state(tmp_path / "stream.safetensors")
    assert torch.equal(quantized.step(restored).latents, expected)


def test_a_lora_works_on_it(quantized, build_lora):
    plain = quantized.start(quantized.request(RED))
    quantized.load_lora_weights(build_lora(quantized.transformer), "style")
    quantized.disable_lora()
    state = plain.clone()
    expected = quantized.step(plain).latents
    state.submit(LoraControl(name="style"))
    assert not torch.allclose(quantized.step(state).latents, expected, atol=1e-2)
    quantized.unload_lora_weights()
