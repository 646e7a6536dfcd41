"""Sampling as plain arithmetic: immutable lists of noise levels and the step between two of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from torch import Tensor

TRAIN_TIMESTEPS = 1000
_SAME_SIGMA = 1e-6
_CLEANING_SIGMA = 0.01
"""Largest noise that the tables of students hold for timestep 0."""


def shifted(sigma: float, shift: float) -> float:
    """Timestep shift: sigma' = s sigma / (1 + (s - 1) sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class Schedule:
    """Noise levels of the denoising steps of a chunk, noisiest first.

    Attributes:
        timesteps: what the model is told, in [0, 1000], strictly decreasing.
        sigmas: noise levels in (0, 1], strictly decreasing; a thousandth of the timesteps where not given.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.sigmas:
            sigmas = tuple(timestep / TRAIN_TIMESTEPS for timestep in self.timesteps)
            object.__setattr__(self, "sigmas", sigmas)
        if not self.timesteps or not _falls((1 + 1e-6, *self.sigmas, 0)) or not _falls(self.timesteps):
            raise ValueError(f"timesteps must fall from at most 1000 to above 0, got {list(self.timesteps)}")
        if len(self.sigmas) != len(self.timesteps):
            raise ValueError(
                f"sigmas must be one for each of {len(self.timesteps)} timesteps, got {len(self.sigmas)}"
            )

    def advance(self, step: int, x: Tensor, velocity: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """The sample after step `step`: the next noisy one, or the clean one after the last step.

        Args:
            step: index into `timesteps`.
            x: noisy sample at that noise level.
            velocity: the model's prediction there, noise minus clean sample.
            draw: standard normal noise shaped like `x`; called only where fresh noise is needed.
        """
        raise TypeError(f"{type(self).__name__} is abstract: use FewStepSchedule or EulerSchedule")

    def entry(self, level: float) -> float:
        """Noise level to start from when noise of at most `level`, in (0, 1], is put on a clean sample."""
        return level

    def until(self, step: int) -> Self:
        """The same sampling as far as step `step`, whose clean sample is the result."""
        if not 0 <= step < len(self.timesteps):
            raise ValueError(f"step must be in [0, {len(self.timesteps)}), got {step}")
        return type(self)(self.timesteps[: step + 1], self.sigmas[: step + 1])

    def starting_at(self, level: float) -> Self:
        """The same sampling from noise level `level` on: a step there, then the steps below it."""
        steps = list(zip(self.timesteps, self.sigmas, strict=True))
        start = next((step for step, sigma in steps if abs(sigma - level) <= _SAME_SIGMA), None)
        if start is None:
            start = TRAIN_TIMESTEPS * level
        later = [(step, sigma) for step, sigma in steps if step < start and sigma < level - _SAME_SIGMA]
        return type(self)((start, *(step for step, _ in later)), (level, *(sigma for _, sigma in later)))


class FewStepSchedule(Schedule):
    """Predict the clean sample, then noise it afresh to the next level (DMD and Self Forcing students)."""

    def advance(self, step: int, x: Tensor, velocity: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """x0 = x - sigma v, then x' = (1 - sigma') x0 + sigma' noise unless it was the last step."""
        clean = (x.float() - self.sigmas[step] * velocity.float()).to(x.dtype)
        if step + 1 == len(self.timesteps):
            return clean
        sigma = self.sigmas[step + 1]
        return (1 - sigma) * clean + sigma * draw()

    def entry(self, level: float) -> float:
        """The first trained step at or below `level`, since the student knows no others.

        Below all of them it is `level` itself, so that it can be as low as is wanted. A last step at timestep
        0 only cleans up: nothing starts there.
        """
        starts = (sigma for sigma in self.sigmas if sigma > _CLEANING_SIGMA)
        return next((sigma for sigma in starts if sigma <= level + _SAME_SIGMA), level)


class EulerSchedule(Schedule):
    """Euler steps along the velocity, from each level to the next and from the last to 0."""

    def advance(self, step: int, x: Tensor, velocity: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """X' = x + (sigma' - sigma) v."""
        following = (*self.sigmas[1:], 0.0)[step]
        return (x.float() + (following - self.sigmas[step]) * velocity.float()).to(x.dtype)


def few_step_timesteps(steps: Sequence[float], shift: float) -> tuple[float, ...]:
    """Timesteps warped by the timestep shift, in [0, 1000]."""
    return tuple(TRAIN_TIMESTEPS * shifted(step / TRAIN_TIMESTEPS, shift) for step in steps)


def table_sigma(timestep: float, shift: float) -> float:
    """Noise level that the table of Wan's students holds for a timestep: that of its nearest entry.

    The table is the shift of 1, 0.999, ... 0.001, so timestep 0 has a little noise, 0.005 at shift 5.
    """
    table = (shifted(step / TRAIN_TIMESTEPS, shift) for step in range(TRAIN_TIMESTEPS, 0, -1))
    return min(table, key=lambda sigma: abs(TRAIN_TIMESTEPS * sigma - timestep))


def _falls(values: Sequence[float]) -> bool:
    return all(a > b for a, b in pairwise(values))


def euler_timesteps(num_steps: int, shift: float) -> tuple[float, ...]:
    """`num_steps` timesteps from 1000, evenly spaced in sigma before the shift."""
    return few_step_timesteps([TRAIN_TIMESTEPS * (1 - i / num_steps) for i in range(num_steps)], shift)
