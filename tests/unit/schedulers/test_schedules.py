import pytest
import torch

from genstream.schedulers.few_step import FewStepScheduler, FlowEulerScheduler
from genstream.schedulers.schedule import (
    EulerSchedule,
    FewStepSchedule,
    Schedule,
    euler_timesteps,
    few_step_timesteps,
    shifted,
    table_sigma,
)

STEPS = (1000.0, 750.0, 500.0, 250.0)


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (1.0, STEPS),
        (5.0, (1000, 937.5, 833.3333, 625)),
        (8.0, (1000, 960, 888.8889, 727.2727)),
    ],
)
def test_shifted_steps(shift, expected):
    assert few_step_timesteps(STEPS, shift) == pytest.approx(expected, abs=1e-4)
    assert FewStepScheduler(steps=STEPS, shift=shift).timesteps.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("shift", [0.3, 1.0, 5.0, 17.0])
def test_a_shift_keeps_the_ends_and_the_order(shift):
    sigmas = [shifted(i / 100, shift) for i in range(101)]
    assert (sigmas[0], sigmas[-1]) == pytest.approx((0, 1))
    assert sigmas == sorted(sigmas)
    assert [shifted(sigma, 1 / shift) for sigma in sigmas] == pytest.approx([i / 100 for i in range(101)])


def no_noise():
    raise AssertionError("no noise is needed")


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_euler_integrates_a_constant_velocity_exactly(steps, shift):
    clean, noise = torch.randn(2, 1, 4, 2, 3, 3)
    x, schedule = noise, EulerSchedule(euler_timesteps(steps, shift))
    for step in range(steps):
        x = schedule.advance(step, x, noise - clean, no_noise)
        following = (*schedule.sigmas[1:], 0.0)[step]
        torch.testing.assert_close(x, (1 - following) * clean + following * noise)
    torch.testing.assert_close(x, clean)


@pytest.mark.parametrize("steps", [STEPS, (1000.0,), (900.0, 20.0)])
def test_few_steps_with_a_perfect_velocity_give_the_clean_sample(steps):
    clean, noise = torch.randn(2, 1, 4, 2, 3, 3)
    schedule = FewStepSchedule(steps)
    x = (1 - schedule.sigmas[0]) * clean + schedule.sigmas[0] * noise
    for step, sigma in enumerate(schedule.sigmas):
        fresh = torch.randn_like(clean)
        velocity = (x - clean) / sigma
        x = schedule.advance(step, x, velocity, lambda fresh=fresh: fresh)
        if step + 1 < len(steps):
            following = schedule.sigmas[step + 1]
            torch.testing.assert_close(x, (1 - following) * clean + following * fresh)
    torch.testing.assert_close(x, clean)


def test_the_last_step_draws_no_noise():
    x = torch.randn(1, 4, 2, 3, 3)
    FewStepSchedule(STEPS).advance(3, x, x, no_noise)


@pytest.mark.parametrize("schedule", [FewStepSchedule(STEPS), EulerSchedule(STEPS)])
def test_dtype_stays(schedule):
    x = torch.randn(1, 4, 2, 3, 3).bfloat16()
    for step in range(4):
        assert schedule.advance(step, x, x, lambda: x).dtype == torch.bfloat16


@pytest.mark.parametrize("scheduler", [FewStepScheduler(), FlowEulerScheduler(num_steps=6)])
def test_the_shell_steps_like_the_schedule(scheduler):
    schedule = scheduler.schedule()
    scheduler.set_timesteps()
    assert scheduler.timesteps.tolist() == pytest.approx(schedule.timesteps)
    x = ours = torch.randn(1, 4, 2, 3, 3)
    shell, core = (torch.Generator().manual_seed(3) for _ in range(2))
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = torch.sin(x)
        x = scheduler.step(velocity, timestep, scheduler.scale_model_input(x, timestep), shell).prev_sample
        ours = schedule.advance(
            step, ours, torch.sin(ours), lambda shape=x.shape: torch.randn(shape, generator=core)
        )
        torch.testing.assert_close(x, ours, rtol=0, atol=0)


def test_noise_of_a_step_that_the_model_knows_under_another_level():
    krea = FewStepScheduler(steps=[1000.0, 750.0, 500.0, 250.0, 0.0])
    level = krea.schedule().sigmas[-1]
    assert level > 0
    noisy = krea.add_noise(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0.0]))
    torch.testing.assert_close(noisy, torch.full((1, 2), level))


def test_add_noise():
    clean, noise = torch.randn(2, 2, 4, 2, 3, 3)
    noisy = FewStepScheduler().add_noise(clean, noise, torch.tensor([0.0, 250.0]))
    torch.testing.assert_close(noisy[0], clean[0])
    torch.testing.assert_close(noisy[1], 0.75 * clean[1] + 0.25 * noise[1])


@pytest.mark.parametrize(
    "scheduler",
    [
        FewStepScheduler(steps=(1000.0, 400.0), shift=3.0),
        FewStepScheduler(steps=(1000.0, 400.0, 0.0), shift=3.0, warped=False),
        FlowEulerScheduler(num_steps=7, shift=2.0),
    ],
)
def test_configuration_survives_a_file(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    assert loaded.schedule() == scheduler.schedule()
    assert type(scheduler).from_config(scheduler.config).schedule() == scheduler.schedule()


@pytest.mark.parametrize(
    "timesteps", [(), (1001.0,), (500.0, 500.0), (250.0, 500.0), (500.0, 0.0), (500.0, -1.0)]
)
def test_bad_timesteps(timesteps):
    with pytest.raises(ValueError, match="timesteps must fall"):
        FewStepSchedule(timesteps)


@pytest.mark.parametrize("sigmas", [(0.9, 0.9), (0.5, 0.9), (0.9, 0.0), (1.1, 0.5), (0.9,)])
def test_bad_sigmas(sigmas):
    with pytest.raises(ValueError, match=r"timesteps must fall|sigmas must be one for each of 2"):
        FewStepSchedule((900.0, 500.0), sigmas)


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_sigmas_of_the_table(shift):
    """Entries of the table are themselves; what lies between takes the nearest; 0 takes the last."""
    table = torch.tensor([shifted(step / 1000, shift) for step in range(1000, 0, -1)], dtype=torch.float64)
    for timestep in (0.0, 0.3, 100.0, 522.0, 757.0, 999.9, 1000.0):
        nearest = table[(1000 * table - timestep).abs().argmin()]
        assert table_sigma(timestep, shift) == pytest.approx(float(nearest), abs=1e-12)
    for step in (1, 250, 500, 999, 1000):
        sigma = shifted(step / 1000, shift)
        assert table_sigma(1000 * sigma, shift) == pytest.approx(sigma, abs=1e-12)


def test_a_last_step_at_timestep_0_has_a_little_noise():
    schedule = FewStepScheduler(steps=(*STEPS, 0.0)).schedule()
    assert schedule.timesteps == pytest.approx((1000, 937.5, 833.3333, 625, 0), abs=1e-4)
    assert schedule.sigmas == pytest.approx((1, 0.9375, 0.8333333, 0.625, 0.0049801), abs=1e-6)


def test_steps_that_are_not_warped_are_told_as_they_are():
    schedule = FewStepScheduler(steps=(1000.0, 757.0, 522.0), shift=8.0, warped=False).schedule()
    assert schedule.timesteps == (1000.0, 757.0, 522.0)
    assert schedule.sigmas == pytest.approx((1, 0.757, 0.522), abs=1e-3)
    assert schedule.sigmas[1:] != (0.757, 0.522)


def test_errors_name_argument_and_value():
    for kind in (FewStepScheduler, FlowEulerScheduler):
        with pytest.raises(ValueError, match="shift must be a positive number, got -1"):
            kind(shift=-1.0)
    with pytest.raises(ValueError, match=r"num_inference_steps must be 4, .* got 8"):
        FewStepScheduler().schedule(8)
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        FlowEulerScheduler().schedule(0)
    with pytest.raises(ValueError, match=r"timestep must be one of .*, got 123\.0"):
        FewStepScheduler().step(torch.zeros(1), 123.0, torch.zeros(1))
    with pytest.raises(TypeError, match="abstract"):
        Schedule(STEPS).advance(0, torch.zeros(1), torch.zeros(1), no_noise)


def test_values_by_position_are_refused():
    with pytest.raises(TypeError):
        FewStepScheduler((1000.0, 500.0), 3.0)


@pytest.mark.parametrize(
    "scheduler",
    [FewStepScheduler(steps=(1000.0, 400.0), shift=3.0), FlowEulerScheduler(num_steps=7, shift=2.0)],
)
def test_from_config_keeps_every_value(scheduler):
    again = type(scheduler).from_config(scheduler.config)
    assert again.schedule().timesteps == scheduler.schedule().timesteps


LEVELS = [1e-9, 0.1, 0.25, 0.26, 0.7, 0.75, 0.9999, 1.0]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", [FewStepSchedule, EulerSchedule])
def test_sampling_from_a_level_on_is_the_end_of_the_sampling(kind, level):
    part = kind(STEPS).starting_at(level)
    first, *rest = part.timesteps
    assert type(part) is kind
    assert first == pytest.approx(1000 * level)
    assert tuple(rest) == STEPS[len(STEPS) - len(rest) :]
    assert all(step >= first for step in STEPS[: len(STEPS) - len(rest)])


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.3, 5.0, 17.0])
def test_all_levels_are_the_whole_sampling(shift):
    schedule = FewStepSchedule(few_step_timesteps(STEPS, shift))
    assert schedule.starting_at(schedule.entry(1.0)).timesteps == pytest.approx(schedule.timesteps)


@pytest.mark.parametrize("level", LEVELS)
def test_a_student_enters_at_a_trained_step(level):
    schedule = FewStepSchedule(STEPS)
    at_or_below = [sigma for sigma in schedule.sigmas if sigma <= level]
    assert schedule.entry(level) == (max(at_or_below) if at_or_below else level)
    assert EulerSchedule(STEPS).entry(level) == level


@pytest.mark.parametrize("level", [0.5, 0.6, 0.8, 1.0])
def test_nothing_starts_at_a_step_that_only_cleans_up(level):
    steps = few_step_timesteps((1000.0, 750.0, 500.0, 250.0, 0.0), 5.0)
    sigmas = (*(step / 1000 for step in steps[:-1]), table_sigma(0.0, 5.0))
    schedule = FewStepSchedule(steps, sigmas)
    entry = schedule.entry(level)
    assert entry == (level if level < 0.625 else max(sigma for sigma in sigmas if sigma <= level))
    assert schedule.starting_at(entry).timesteps[-1] == 0.0
