"""Intervals are those of prompts and seeds, however many values each of them has."""

from math import isnan

import numpy as np
import pytest

from genstream.evaluation.bootstrap import DIFFERENCE, SHARE, Estimate, estimate


def bits(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2, shape).astype(float)


def each_its_own(count):
    return np.arange(count)


def test_one_value_a_prompt_is_a_proportion():
    values = np.tile([0.0, 1.0], 50)[None, :, None]
    result = estimate(values, each_its_own(100))
    assert result.value == 0.5
    assert (result.low, result.high) == pytest.approx((0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=0.01)


def test_further_values_of_a_prompt_say_nothing_new_when_they_are_alike():
    values, prompts = bits((1, 20, 1)), each_its_own(20)
    once = estimate(values, prompts, SHARE)
    assert estimate(np.repeat(values, 10, axis=2), prompts, SHARE) == once  # moments
    assert estimate(np.repeat(values, 3, axis=1), np.repeat(prompts, 3), SHARE) == once  # objects
    assert estimate(np.repeat(values, 3, axis=0), prompts, SHARE) == once  # seeds


def test_seeds_that_differ_widen_the_interval():
    prompts = each_its_own(200)
    alike = estimate(np.full((3, 200, 1), 0.5), prompts)
    assert alike == Estimate(value=0.5, low=0.5, high=0.5, prompts=200)
    apart = np.broadcast_to(np.array([0.2, 0.5, 0.8])[:, None, None], (3, 200, 1))
    result = estimate(apart, prompts)
    assert (result.value, result.low, result.high) == pytest.approx((0.5, 0.2, 0.8))


def test_prompts_with_more_objects_count_for_more():
    values = np.array([1.0, 0.0, 0.0])[None, :, None]
    assert estimate(values, np.array([3, 7, 7])).value == pytest.approx(1 / 3)


def test_unknown_values_are_left_out():
    nan = float("nan")
    values = np.array([[[1.0, nan], [nan, nan], [4.0, 7.0]]])
    result = estimate(values, each_its_own(3))
    assert result.value == 4
    assert result.low == 1
    assert result.high == 5.5
    nothing = estimate(np.full((1, 3, 2), nan), each_its_own(3), SHARE)
    assert all(isnan(number) for number in (nothing.value, nothing.low, nothing.high))
    assert (result.prompts, nothing.prompts) == (2, 0)


@pytest.mark.parametrize("added", [(), SHARE, DIFFERENCE])
def test_one_prompt_does_not_tell_how_much_prompts_differ(added):
    values = np.full((3, 4, 2), float("nan"))
    values[:, 1:3, 0] = [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]  # seeds and objects do not make up for it
    result = estimate(values, np.array([3, 7, 7, 9]), added)
    assert result.value == pytest.approx(4 / 6)
    assert isnan(result.low) and isnan(result.high)
    assert result.prompts == 1


def test_a_share_of_all_is_not_certain():
    prompts = each_its_own(24)
    result = estimate(np.ones((1, 24, 5)), prompts, SHARE)
    assert result.value == result.high == 1
    assert 0.75 < result.low < 0.9  # Wilson's is 0.86
    none = estimate(np.zeros((1, 24, 5)), prompts, DIFFERENCE)
    assert none.value == 0
    assert -0.15 < none.low < -0.05 and 0.05 < none.high < 0.15


@pytest.mark.parametrize(
    ("seeds", "prompts", "mean", "spread"), [(3, 64, 0.4, 0.3), (3, 64, 2.5, 0.3), (1, 24, 1.5, 0.0)]
)
def test_intervals_hold_what_they_promise(seeds, prompts, mean, spread):
    """Of shares whose log-odds differ by prompt and by seed, one in ten prompts with two objects."""
    generator = np.random.default_rng(1)
    of_prompts = np.repeat(np.arange(prompts), np.where(np.arange(prompts) % 10 == 9, 2, 1))

    def shares(count):
        odds = (
            mean
            + generator.normal(0, 1, (count, 1, prompts))
            + generator.normal(0, spread, (count, seeds, 1))
        )
        return 1 / (1 + np.exp(-odds))

    true = shares(20_000).mean()
    held = []
    for share in shares(150):
        values = (generator.random((seeds, len(of_prompts))) < share[:, of_prompts]).astype(float)
        result = estimate(values[..., None], of_prompts, SHARE)
        held.append(result.low <= true <= result.high)
    assert np.mean(held) >= 0.9


def test_draws_are_the_same_in_each_call():
    values, prompts = bits((2, 10, 3)), each_its_own(10)
    assert estimate(values, prompts) == estimate(values, prompts)


def test_values_that_have_no_prompt_are_refused():
    with pytest.raises(ValueError, match=r"prompts must be one for each of .*, got \[2\] for \[1, 3, 4\]"):
        estimate(np.zeros((1, 3, 4)), np.arange(2))
