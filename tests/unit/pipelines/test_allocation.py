"""Counted allocations of passes whose allocations are known."""

import gc

import pytest
import torch
import torch.nn.functional as F

from genstream.pipelines.allocation import peak_bytes

MEGA = 2**20


@pytest.fixture
def x():
    """One MiB that is not there."""
    return torch.empty(MEGA // 4, device="meta")


def chain(x):
    for _ in range(10):
        x = x * 2
    return x


PASSES = [
    ("in place", lambda x: x.add_(1).mul_(2), 0),
    ("views", lambda x: x.view(2, -1).t()[1:].flatten(0)[0], 1),  # a transposed view is copied to be flat
    ("one", lambda x: x + 1, 1),
    ("in a row", chain, 2),
    ("kept", lambda x: [x + 1, x + 2, x + 3], 3),
    ("joined", lambda x: torch.cat([x + 1, x + 2]), 4),
    ("narrow", lambda x: x.to(torch.bfloat16), 0.5),
]


@pytest.mark.parametrize(("run", "expected"), [case[1:] for case in PASSES], ids=[case[0] for case in PASSES])
def test_known_passes(x, run, expected):
    assert peak_bytes(lambda: run(x), [x]) == pytest.approx(expected * MEGA, rel=1e-4)


def test_only_what_is_given_is_left_out(x):
    y = torch.empty_like(x)
    assert peak_bytes(lambda: y.view(-1) + x.view(-1), [x]) == 2 * MEGA
    assert peak_bytes(lambda: y.view(-1) + x.view(-1), [x, y]) == MEGA


def test_other_devices_do_not_count(x):
    assert peak_bytes(lambda: torch.ones(MEGA), [x]) == 0


def test_attention_has_no_matrix_of_scores():
    query, key, value = (torch.empty(1, 2, tokens, 64, device="meta") for tokens in (4096, 8192, 8192))
    found = [
        peak_bytes(lambda: F.scaled_dot_product_attention(query, key, value), [query, key, value]),
        peak_bytes(lambda: F.scaled_dot_product_attention(query=query, key=key, value=value), [query]),
    ]
    assert found == [query.nbytes, query.nbytes]


def test_a_second_pass_starts_from_nothing(x):
    gc.disable()
    try:
        assert [peak_bytes(lambda: chain(x), [x]) for _ in range(3)] == [2 * MEGA] * 3
    finally:
        gc.enable()
