"""diffusers schedulers over the schedules: what a pipeline folder stores and other code can call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from genstream.schedulers.schedule import (
    TRAIN_TIMESTEPS,
    EulerSchedule,
    FewStepSchedule,
    Schedule,
    euler_timesteps,
    few_step_timesteps,
    table_sigma,
)
from genstream.shapes import check_count, check_number, check_positive

_SAME_TIMESTEP = 1e-3


@dataclass
class FlowSchedulerOutput(BaseOutput):
    """The sample at the next noise level, or the clean one after the last step."""

    prev_sample: Tensor


class _FlowScheduler(SchedulerMixin, ConfigMixin):
    """The stateful shell that diffusers expects around an immutable schedule."""

    order = 1
    init_noise_sigma = 1.0

    def schedule(self, num_inference_steps: int | None = None) -> Schedule:
        """The immutable schedule of a chunk."""
        raise TypeError(f"{type(self).__name__} has no schedule of its own")

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Start a new chunk."""
        self._schedule = self.schedule(num_inference_steps)
        self.timesteps = torch.tensor(self._schedule.timesteps, dtype=torch.float32, device=device)
        self.num_inference_steps = len(self._schedule.timesteps)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Flow matching models take the sample as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 - sigma) x0 + sigma noise for timesteps `[B]` in [0, 1000]."""
        sigma = self._sigmas(timesteps).to(original_samples).view(-1, *[1] * (original_samples.ndim - 1))
        return (1 - sigma) * original_samples + sigma * noise

    def _sigmas(self, timesteps: Tensor) -> Tensor:
        """Noise levels of timesteps: those of the schedule for its own, t / 1000 for others."""
        sigmas = timesteps / 1000
        for timestep, sigma in zip(self._schedule.timesteps, self._schedule.sigmas, strict=False):
            sigmas = torch.where((timesteps - timestep).abs() < _SAME_TIMESTEP, sigma, sigmas)
        return sigmas

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> FlowSchedulerOutput | tuple[Tensor]:
        """Advance `sample` from `timestep`, which must be one of `timesteps`."""
        matches = (self.timesteps.cpu() - float(timestep)).abs() < _SAME_TIMESTEP
        if not bool(matches.any()):
            raise ValueError(f"timestep must be one of {self.timesteps.tolist()}, got {float(timestep)}")

        def draw() -> Tensor:
            noise: Tensor = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            return noise

        following = self._schedule.advance(int(matches.nonzero()[0]), sample, model_output, draw)
        return FlowSchedulerOutput(prev_sample=following) if return_dict else (following,)


class FewStepScheduler(_FlowScheduler):
    """Steps of a distilled student: predict the clean sample, noise it afresh to the next level.

    Source: DMD2 (arXiv 2405.14867), Self Forcing (arXiv 2506.08009).

    Args:
        steps: timesteps in [0, 1000], falling.
        shift: timestep shift of the noise levels that the student was trained on.
        warped: the steps are given before the shift; otherwise they are what the model is told.
        num_train_timesteps: always 1000.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,  # diffusers' from_config forgets values that were given by position
        steps: Sequence[float] = (1000.0, 750.0, 500.0, 250.0),
        shift: float = 5.0,
        warped: bool = True,
        num_train_timesteps: int = 1000,
    ) -> None:
        check_positive("shift", shift)
        if isinstance(steps, str) or not isinstance(steps, Sequence):
            raise ValueError(f"steps must be a list of timesteps, got {steps!r}")
        for step in steps:
            check_number("steps", step)
        # Numbers of numpy become Python's, which can be saved.
        self.register_to_config(steps=[float(step) for step in steps], shift=float(shift))
        try:
            self.set_timesteps()
        except ValueError as error:
            raise ValueError(
                f"steps must make a schedule, got {list(steps)} with a shift of {shift}: {error}"
            ) from error

    def schedule(self, num_inference_steps: int | None = None) -> FewStepSchedule:
        """The trained steps; another number of steps was not trained.

        Raises:
            ValueError: `num_inference_steps` is not the number of trained steps.
        """
        steps = self.config.steps
        if num_inference_steps not in (None, len(steps)):
            raise ValueError(
                f"num_inference_steps must be {len(steps)}, the steps this model was trained for, "
                f"got {num_inference_steps}"
            )
        shift, warped = self.config.shift, self.config.warped
        timesteps = few_step_timesteps(steps, shift) if warped else tuple(map(float, steps))
        sigmas = (t / TRAIN_TIMESTEPS if warped and t else table_sigma(t, shift) for t in timesteps)
        return FewStepSchedule(timesteps, tuple(sigmas))


class FlowEulerScheduler(_FlowScheduler):
    """Euler sampler for many-step models.

    Args:
        num_steps: steps when the caller names none.
        shift: timestep shift.
        num_train_timesteps: always 1000.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, *, num_steps: int = 50, shift: float = 5.0, num_train_timesteps: int = 1000) -> None:
        check_positive("shift", shift)
        check_count("num_steps", num_steps)
        self.register_to_config(num_steps=int(num_steps), shift=float(shift))
        self.set_timesteps()

    def schedule(self, num_inference_steps: int | None = None) -> EulerSchedule:
        """Evenly spaced steps, warped by the shift."""
        steps = self.config.num_steps if num_inference_steps is None else num_inference_steps
        check_count("num_inference_steps", steps)
        return EulerSchedule(euler_timesteps(steps, self.config.shift))
