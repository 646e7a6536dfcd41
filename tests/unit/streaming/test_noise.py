import pytest
import torch

from genstream.streaming.noise import GivenNoise, SeededNoise, restore_noise

SHAPE = (1, 4, 3, 4, 4)


def draws(source, batch=1):
    shape = (batch, *SHAPE[1:])
    places = [(start, step) for start in (0, 3, 6, 10**9) for step in (None, 0, 1, 2)]
    return {
        (start, step): source.initial(start, shape) if step is None else source.fresh(start, step, shape)
        for start, step in places
    }


def test_noise_is_a_function_of_place():
    first, second = draws(SeededNoise((7,))), SeededNoise((7,))
    for (start, step), noise in reversed(first.items()):
        again = second.initial(start, SHAPE) if step is None else second.fresh(start, step, SHAPE)
        assert torch.equal(again, noise)


def test_every_place_and_seed_has_its_own_noise():
    found = [noise for seed in (0, 1, 2**63 - 1) for noise in draws(SeededNoise((seed,))).values()]
    flat = torch.stack(found).flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 0.5
    assert len({tuple(row.tolist()) for row in flat}) == len(flat)


def test_a_batch_draws_what_its_streams_draw():
    seeds = (5, 0, 5)
    together = draws(SeededNoise(seeds), batch=3)
    for row, seed in enumerate(seeds):
        for place, noise in draws(SeededNoise((seed,))).items():
            assert torch.equal(together[place][row : row + 1], noise)


def test_moments():
    noise = SeededNoise((3,)).initial(0, (1, 16, 3, 60, 104)).flatten()
    assert noise.mean().abs() < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs(noise.pow(4).mean() - 3) < 0.1


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    draws(SeededNoise((1,)))
    assert torch.equal(torch.rand(1), expected)


def test_given_noise_is_cut_by_frame():
    noise, renoise = torch.randn(2, 4, 9, 4, 4), torch.randn(2, 4, 9, 4, 4)
    source = GivenNoise(noise, (renoise,), first_frame=3)
    assert torch.equal(source.initial(6, (2, 4, 3, 4, 4)), noise[:, :, 3:6])
    assert torch.equal(source.fresh(9, 0, (2, 4, 3, 4, 4)), renoise[:, :, 6:9])


@pytest.mark.parametrize(
    ("start", "shape"),
    [(0, (2, 4, 3, 4, 4)), (10, (2, 4, 3, 4, 4)), (3, (1, 4, 3, 4, 4)), (3, (2, 4, 3, 4, 8))],
)
def test_given_noise_that_does_not_cover_the_chunk(start, shape):
    source = GivenNoise(torch.randn(2, 4, 9, 4, 4), first_frame=3)
    with pytest.raises(ValueError, match=r"noise must .*from frame 3"):
        source.initial(start, shape)


def test_given_noise_without_enough_steps():
    source = GivenNoise(torch.randn(SHAPE), (torch.randn(SHAPE),))
    with pytest.raises(ValueError, match=r"renoise: denoising step 1 .* only 1"):
        source.fresh(0, 1, SHAPE)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match=f"seed must be .*, got {seed}"):
        SeededNoise((0, seed))


def test_one_seed_for_each_stream():
    with pytest.raises(ValueError, match="each of 3 prompts, got 2"):
        SeededNoise((0, 1)).initial(0, (3, 4, 1, 2, 2))


@pytest.mark.parametrize(
    "source",
    [SeededNoise((4, 9)), GivenNoise(torch.randn(1, 4, 40, 4, 4), (torch.randn(1, 4, 40, 4, 4),) * 2, 2)],
    ids=["seeded", "given"],
)
def test_restored_noise_is_the_same(source):
    restored = restore_noise(source.meta(), source.tensors())
    shape = (len(source.seeds) if isinstance(source, SeededNoise) else 1, 4, 3, 4, 4)
    for start in (2, 7, 30):
        assert torch.equal(restored.initial(start, shape), source.initial(start, shape))
        assert torch.equal(restored.fresh(start, 1, shape), source.fresh(start, 1, shape))
