"""Sampling as plain arithmetic: immutable lists of noise levels and the step between two of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

TRAIN_TIMESTEPS = 1000


def shifted(sigma: float, shift: float) -> float:
    """Timestep shift: sigma' = s sigma / (1 + (s - 1) sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class Schedule:
    """Noise levels of the denoising steps of a chunk, noisiest first.

    Attributes:
        timesteps: in (0, 1000], strictly decreasing; sigma is a thousandth of it.
    """

    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        bounds = (TRAIN_TIMESTEPS + 1e-3, *self.timesteps, 0)
        if not self.timesteps or any(a <= b for a, b in pairwise(bounds)):
            raise ValueError(f"timesteps must fall from at most 1000 to above 0, got {list(self.timesteps)}")

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels in (0, 1]."""
        return tuple(timestep / TRAIN_TIMESTEPS for timestep in self.timesteps)

    def advance(self, step: int, x: Tensor, velocity: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """The sample after step `step`: the next noisy one, or the clean one after the last step.

        Args:
            step: index into `timesteps`.
            x: noisy sample at that noise level.
            velocity: the model's prediction there, noise minus clean sample.
            draw: standard normal noise shaped like `x`; called only where fresh noise is needed.
        """
        raise TypeError(f"{type(self).__name__} is abstract: use FewStepSchedule or EulerSchedule")


class FewStepSchedule(Schedule):
    """Predict the clean sample, then noise it afresh to the next level (DMD and Self Forcing students)."""

    def advance(self, step: int, x: Tensor, velocity: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """x0 = x - sigma v, then x' = (1 - sigma') x0 + sigma' noise unless it was the last step."""
        clean = (x.float() - self.sigmas[step] * velocity.float()).to(x.dtype)
        if step + 1 == len(self.timesteps):
            return clean
        sigma = self.sigmas[step + 1]
        return (1 - sigma) * clean + sigma * draw()


class EulerSchedule(Schedule):
    """Euler steps along the velocity, from each level to the next and from the last to 0."""

    def advance(self, step: int, x: Tensor, velocity: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """X' = x + (sigma' - sigma) v."""
        following = (*self.sigmas[1:], 0.0)[step]
        return (x.float() + (following - self.sigmas[step]) * velocity.float()).to(x.dtype)


def few_step_timesteps(steps: Sequence[float], shift: float) -> tuple[float, ...]:
    """Timesteps warped by the timestep shift, in [0, 1000]."""
    return tuple(TRAIN_TIMESTEPS * shifted(step / TRAIN_TIMESTEPS, shift) for step in steps)


def euler_timesteps(num_steps: int, shift: float) -> tuple[float, ...]:
    """`num_steps` timesteps from 1000, evenly spaced in sigma before the shift."""
    return few_step_timesteps([TRAIN_TIMESTEPS * (1 - i / num_steps) for i in range(num_steps)], shift)
