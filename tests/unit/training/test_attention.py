import pytest
import torch

from genstream.training.attention import MatmulAttention
from genstream.transformer.attention import AttentionProcessor


@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_dispatched_attention_with_its_gradients(masked):
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(7, 9, dtype=torch.bool).tril(2) if masked else None
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
