"""Trains a teacher: a model of whole clips that sees all frames at once and takes many steps.

Flow matching (arXiv 2210.02747) with logit-normal times and a timestep shift (arXiv 2403.03206). It is the
same transformer as the student's, without a mask. Its clips are cut out anywhere of longer ones, so that it
can judge any piece of a stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genstream.schedulers.few_step import FlowEulerScheduler
from genstream.shapes import check_positive
from genstream.streaming.settings import StreamSettings
from genstream.training.denoiser import Denoiser
from genstream.training.model_run import ModelTrainee, save_trained, train_model
from genstream.training.model_settings import ModelRunSettings
from genstream.training.objectives import add_noise, flow_loss, logit_normal_sigmas
from genstream.training.prompts import ClipPieces


@dataclass(frozen=True, kw_only=True)
class TeacherTrainingSettings(ModelRunSettings):
    """What is particular to the teacher.

    Attributes:
        horizon_chunks: chunks that it sees; its videos are as long.
        time_mean: of the normal numbers whose sigmoid is the noise level before the shift.
        time_std: likewise.
        starts: share of clips that are the start of a longer one.
        sampling_steps: of the finished model.
    """

    horizon_chunks: int = 6
    time_mean: float = 0.0
    time_std: float = 1.0
    starts: float = 0.3
    sampling_steps: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.horizon_chunks <= self.clip_chunks:
            raise ValueError(
                f"horizon_chunks must be in [1, {self.clip_chunks}], the chunks of a clip, "
                f"got {self.horizon_chunks}"
            )
        if not math.isfinite(self.time_mean):
            raise ValueError(f"time_mean must be finite, got {self.time_mean}")
        check_positive("time_std", self.time_std)
        if not 0 <= self.starts <= 1:
            raise ValueError(f"starts must be in [0, 1], got {self.starts}")
        if self.sampling_steps < 1:
            raise ValueError(f"sampling_steps must be at least 1, got {self.sampling_steps}")
        _ = self.scheduler, self.stream  # check their parts

    @property
    def horizon_frames(self) -> int:
        """Latent frames that it sees."""
        return self.horizon_chunks * self.chunk_frames

    @property
    def scheduler(self) -> FlowEulerScheduler:
        """Denoising steps of the finished model."""
        made: FlowEulerScheduler = FlowEulerScheduler(num_steps=self.sampling_steps, shift=self.shift)
        return made

    @property
    def stream(self) -> StreamSettings:
        """How the finished model streams: its videos are a single chunk, longer ones know no past."""
        return StreamSettings(
            chunk_frames=self.horizon_frames, window_frames=0, guidance_scale=self.guidance_scale
        )


class TeacherTrainee(ModelTrainee[TeacherTrainingSettings]):
    """The teacher with its objective."""

    def _loss(self, shared: np.random.Generator, own: np.random.Generator, among: range) -> Tensor:
        settings, module = self.settings, self.module
        asked = self._pieces(among).draw(settings.batch_size, own)
        assert asked.pieces is not None
        clean = asked.pieces.to(module.transformer.device)
        told = [caption if own.random() >= settings.without_text else "" for caption in asked.captions]
        levels = logit_normal_sigmas(len(clean), settings.shift, settings.time_mean, settings.time_std)
        sigma = levels.to(clean.device)[:, None].expand(-1, clean.shape[2])
        noise = torch.randn_like(clean)
        velocity = module.velocity(add_noise(clean, noise, sigma), sigma, module.embed(told))
        return flow_loss(velocity, clean, noise)

    def _pieces(self, among: range) -> ClipPieces:
        settings = self.settings
        return ClipPieces(self.clips, self.latents, settings.horizon_frames, among, starts=settings.starts)


def train_teacher(settings: TeacherTrainingSettings, output: Path) -> None:
    """Encode the clips, train, and continue what `output` already holds; the result is `output`/model."""
    train_model(settings, output, TeacherTrainee, export)


def export(teacher: Denoiser, settings: TeacherTrainingSettings, run_folder: Path) -> None:
    """Write the teacher of a run as a pipeline folder."""
    save_trained(teacher, settings, run_folder, "teacher", settings.scheduler, settings.stream)
