import pytest
import torch

from genstream.training.attention import MatmulAttention
from genstream.transformer.attention import AttentionProcessor

MASKS = {
    "none": None,
    "everything": torch.ones(7, 9, dtype=torch.bool),
    "triangle": torch.ones(7, 9, dtype=torch.bool).tril(2),
    "pieces with holes": torch.tensor([[1, 1, 0, 0, 0, 1, 0, 0, 1]] * 3 + [[0, 0, 1, 1, 1, 0, 1, 0, 0]] * 4)
    == 1,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_equals_the_dispatched_attention_with_its_gradients(mask):
    generator = torch.Generator().manual_seed(0)
    results = []
    for processor in (AttentionProcessor(), MatmulAttention()):
        generator.manual_seed(0)
        q, k, v = (
            torch.randn(2, length, 3, 8, generator=generator, dtype=torch.float64).requires_grad_()
            for length in (7, 9, 9)
        )
        out = processor(torch.nn.Identity(), q, k, v, mask)
        out.square().sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
