"""Sampling paths of a teacher: what a student with few steps learns to follow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FlowEulerScheduler
from genstream.schedulers.schedule import shifted
from genstream.shapes import frames_of
from genstream.streaming.engine import CacheEngine
from genstream.streaming.state import StreamState
from genstream.training.denoiser import Denoiser
from genstream.training.objectives import guided
from genstream.training.shards import in_shards

logger = logging.getLogger(__name__)

_SHARD = 16


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a teacher is sampled.

    Attributes:
        num_steps: of the student; states are kept at its noise levels.
        substeps: Euler steps of the teacher for each one of the student.
        shift: timestep shift of both.
        guidance_scale: of the teacher; 1 is off.
    """

    num_steps: int
    substeps: int
    shift: float
    guidance_scale: float

    @property
    def sigmas(self) -> list[float]:
        """Noise levels of the states, from 1 to 0."""
        return [float(shifted(1 - step / self.num_steps, self.shift)) for step in range(self.num_steps + 1)]


@dataclass(frozen=True)
class Trajectories:
    """States of many paths.

    Attributes:
        captions: what each path was told.
        states: `[N, levels, C, T, h, w]`, from noise to clean, float16.
    """

    captions: list[str]
    states: Tensor


@torch.no_grad()
def solve(teacher: Denoiser, noise: Tensor, captions: Sequence[str], sampling: Sampling) -> Tensor:
    """States `[B, levels, C, T, h, w]` on the way from noise `[B, C, T, h, w]` to a sample."""
    told = teacher.embed(captions)
    untold = teacher.embed([""] * len(captions))
    x, states = noise, [noise]
    times = np.linspace(1, 0, sampling.num_steps * sampling.substeps + 1)
    for step, (sigma, following) in enumerate(pairwise(shifted(float(t), sampling.shift) for t in times), 1):
        levels = x.new_full((len(x), x.shape[2]), sigma)
        velocity = teacher.velocity(x, levels, told)
        if sampling.guidance_scale > 1:
            velocity = guided(velocity, teacher.velocity(x, levels, untold), sampling.guidance_scale)
        x = x + (following - sigma) * velocity
        if step % sampling.substeps == 0:
            states.append(x)
    return torch.stack(states, dim=1)


@dataclass(frozen=True)
class PathEngine(CacheEngine):
    """A cache engine that keeps the states on the way to its chunks.

    Attributes:
        substeps: denoising steps from one state to the next.
        states: of the chunks so far, without their clean ends.
    """

    substeps: int = 1
    states: list[Tensor] = field(default_factory=list)

    def predict(self, x: Tensor, timestep: float, state: StreamState) -> Tensor:
        """Velocity of a noisy chunk; what is asked for at every `substeps`-th step is kept."""
        if state.request.schedule.timesteps.index(timestep) % self.substeps == 0:
            self.states.append(x)
        return super().predict(x, timestep, state)


def stream(
    teacher: CausalVideoPipeline,
    captions: Sequence[str],
    seeds: Sequence[int],
    chunks: int,
    sampling: Sampling,
) -> Tensor:
    """States `[B, levels, C, T, h, w]` on the way to each chunk of a causal teacher's streams."""
    teacher.scheduler = FlowEulerScheduler(
        num_steps=sampling.num_steps * sampling.substeps, shift=sampling.shift
    )
    request = teacher.request(
        list(captions),
        num_frames=frames_of(
            chunks * teacher.settings.chunk_frames, teacher.streaming_vae.spec.temporal_ratio
        ),
        seed=list(seeds),
        guidance_scale=sampling.guidance_scale,
        decode=False,
    )
    engine = PathEngine(
        teacher.transformer, teacher.streaming_vae, teacher.encode_prompt, substeps=sampling.substeps
    )
    paths = []
    for chunk in engine.stream(request):
        assert chunk.latents is not None
        paths.append(torch.stack([*engine.states, chunk.latents], dim=1))
        engine.states.clear()
    return torch.cat(paths, dim=3)


def collect(sample: Callable[[int, int], Trajectories], count: int, folder: Path) -> Trajectories:
    """Paths in shards that are sampled only once.

    Args:
        sample: makes the paths from a first number on, so many of them.
        count: paths.
        folder: of the shards.
    """

    def make(numbers: range) -> tuple[Tensor, list[str]]:
        made = sample(numbers.start, len(numbers))
        logger.info("sampled path %d of %d", numbers.stop, count)
        return made.states.half().cpu().contiguous(), made.captions

    states, captions = in_shards("states", make, range(count), _SHARD, folder)
    return Trajectories(list(captions), states)
