"""Attention for training equals torch's own, for every mask and with its gradients."""

import gc

import pytest
import torch

from genstream.training.attention import FlexAttention, MatmulAttention, block_mask
from genstream.training.denoiser import Denoiser, DenoiserSettings, for_training, set_attention
from genstream.training.forcing import from_middle, from_start, with_noisy_context
from genstream.transformer.attention import AttentionProcessor, FrameMask

SEQUENCES = {
    "one chunk": from_start([3], 1),
    "from start": from_start([1, 2, 2, 2], 1),
    "without sink": from_start([2, 2, 2], 1, sink=False),
    "from middle": from_middle([0, 5, 7], 2, copies=3),
}
MASKS = {
    "everything": torch.ones(4, 4, dtype=torch.bool),
    "triangle": torch.ones(5, 5, dtype=torch.bool).tril(),
    **{f"teacher forcing {name}": torch.tensor(each.mask()) for name, each in SEQUENCES.items()},
    **{
        f"diffusion forcing {name}": torch.tensor(with_noisy_context(each).mask())
        for name, each in SEQUENCES.items()
    },
}
HERE = torch.nn.Identity()
# On CPUs FlexAttention is not compiled, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def _gradient_on_cpus(monkeypatch):
    """Torch has FlexAttention's gradient on CPUs, but not compiled, and so refuses to begin."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *inputs: None)


def attended(processor, lengths, mask, **kind):
    """Output for random inputs, and gradients of all three."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, length, 3, 16, generator=generator).to(**kind).requires_grad_() for length in lengths
    )
    out = processor(HERE, q, k, v, mask)
    out.square().sum().backward()
    return out, q.grad, k.grad, v.grad


def check_equal(processor, lengths, mask, **kind):
    expected = attended(AttentionProcessor(), lengths, mask, dtype=torch.float64)
    for one, other in zip(attended(processor, lengths, mask, **kind), expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("processor", [MatmulAttention(), FlexAttention()], ids=["matmul", "flex"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("tokens_per_frame", [1, 17, 50])
def test_masked_attention_equals_the_dispatched_one(processor, mask, tokens_per_frame):
    lengths = [len(mask) * tokens_per_frame] * 3
    check_equal(processor, lengths, FrameMask(mask, tokens_per_frame), dtype=torch.float32)


@pytest.mark.parametrize("processor", [MatmulAttention(), FlexAttention()], ids=["matmul", "flex"])
@pytest.mark.parametrize("weights", [None, torch.linspace(-3, 0, 9)[None]], ids=["none", "weights on keys"])
def test_other_attention_equals_the_dispatched_one(processor, weights):
    check_equal(processor, (7, 9, 9), weights, dtype=torch.float32)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("tokens_per_frame", [1, 40, 128, 300])
def test_blocks_are_those_of_the_dense_mask(mask, tokens_per_frame):
    dense = FrameMask(mask, tokens_per_frame).dense
    rest = -len(dense) % 128
    padded = torch.nn.functional.pad(dense, (0, rest, 0, rest))
    blocks = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))  # [rows, 128, columns, 128]
    some, every = blocks.any(3).any(1), blocks.all(3).all(1)
    found = block_mask(FrameMask(mask, tokens_per_frame))
    assert torch.equal(found.to_dense()[0, 0] > 0, some)
    for counts, indices, expected in (
        (found.kv_num_blocks, found.kv_indices, some & ~every),
        (found.full_kv_num_blocks, found.full_kv_indices, every),
    ):
        for row, count in enumerate(counts[0, 0].tolist()):
            columns = sorted(indices[0, 0, row, :count].tolist())
            assert columns == expected[row].nonzero().flatten().tolist()


def test_blocks_are_made_once_for_all_layers_and_kept_no_longer(monkeypatch):
    made = []
    monkeypatch.setattr(
        "genstream.training.attention.block_mask", lambda mask: made.append(mask) or block_mask(mask)
    )
    processor, mask = FlexAttention(), FrameMask(torch.ones(2, 2, dtype=torch.bool), 5)
    for _ in range(3):
        attended(processor, (10, 10, 10), mask, dtype=torch.float32)
    assert len(made) == len(processor._blocks) == 1
    made.clear()
    del mask
    gc.collect()
    assert not processor._blocks


def trained_with(processor, *, checkpointing):
    """Gradients of a model of two blocks in bfloat16 or float32, for a sequence with two kinds of frames."""
    torch.manual_seed(0)
    settings = DenoiserSettings(width=48, layers=2, ffn_width=48, text_width=16, text_layers=1)
    denoiser = for_training(Denoiser.new(settings, 4), checkpointing=checkpointing)
    set_attention(denoiser, processor)
    sequence = SEQUENCES["from start"]
    mask = torch.tensor(sequence.mask())
    x, sigma, text = torch.randn(2, 4, len(mask), 6, 6), torch.rand(2, len(mask)), torch.randn(2, 5, 16)
    denoiser.velocity(x, sigma, text, sequence.positions, mask).square().sum().backward()
    return {name: weight.grad for name, weight in denoiser.transformer.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_learns_the_same(checkpointing):
    expected = trained_with(AttentionProcessor(), checkpointing=False)
    found = trained_with(FlexAttention(), checkpointing=checkpointing)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("processor", [MatmulAttention(), FlexAttention()], ids=["matmul", "flex"])
def test_a_model_learns_in_bfloat16(processor):
    with torch.autocast("cpu", torch.bfloat16):
        gradients = trained_with(processor, checkpointing=True)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("is_there", [False, True])
def test_training_takes_flex_attention_on_gpus(monkeypatch, is_there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    settings = DenoiserSettings(width=48, layers=1, ffn_width=48, text_width=16, text_layers=1)
    (block,) = for_training(Denoiser.new(settings, 4)).transformer.blocks
    kind = FlexAttention if is_there else MatmulAttention
    assert type(block.attn1.processor) is type(block.attn2.processor) is kind


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_compiled_attention_equals_the_dispatched_one(mask):
    for tokens_per_frame in (17, 128, 300):
        lengths = [len(mask) * tokens_per_frame] * 3
        on_gpu = FrameMask(mask.cuda(), tokens_per_frame)
        found = attended(FlexAttention(), lengths, on_gpu, device="cuda")
        expected = attended(AttentionProcessor(), lengths, FrameMask(mask, tokens_per_frame))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-2, atol=1e-2)
