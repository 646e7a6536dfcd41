"""Distils a student by self forcing: it streams, and a teacher corrects whole pieces of its streams.

Self Forcing (arXiv 2506.08009) with distribution matching (DMD, arXiv 2311.18828, or SiD, arXiv 2404.04057):
what a frozen teacher and a critic, which learns what the student makes, see in the same noisy piece tells
where to go. No videos are needed, only prompts. Self-Forcing++ (arXiv 2510.02283): the streams are longer
than what the teacher sees, and the piece is the end of one, at any place with the same chance.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from genstream.cache.layout import PositionPolicy
from genstream.data.toyworld import ToyWorld
from genstream.schedulers.few_step import FewStepScheduler
from genstream.schedulers.schedule import shifted
from genstream.shapes import frames_of
from genstream.streaming.noise import SeededNoise
from genstream.streaming.request import StreamRequest
from genstream.streaming.settings import StreamSettings
from genstream.training.denoiser import Denoiser, for_training
from genstream.training.loop import LoopSettings, load_average, run, steps_taken
from genstream.training.model_run import CAPTIONS, RESULT_FOLDER, save_model, saved_settings, trainings
from genstream.training.objectives import (
    add_noise,
    clean_from,
    flow_loss,
    guided,
    identity_loss,
    matching_gradient,
    matching_loss,
)
from genstream.training.record import Training, claim_run
from genstream.training.rollout import RolloutEngine, rollout
from genstream.training.student import StudentTrainingSettings
from genstream.training.teacher import TeacherTrainingSettings
from genstream.vae.tiny import TinyVideoVAE

logger = logging.getLogger(__name__)

_SCENES = 2**31
_EVALUATION_SCENES = 16


@dataclass(frozen=True, kw_only=True)
class SelfForcingSettings:
    """How a student is distilled.

    Attributes:
        teacher: folder of a finished run of `genstream train teacher`.
        initial: folder of a finished run of `genstream train student`, whose window, sinks, steps and shift
            the student keeps.
        vae: folder of the VAE whose latents both know.
        objective: "dmd" or "sid".
        total_steps: of student and critic together.
        critic_steps: steps of the critic for each one of the student.
        learning_rate: peak of the student's.
        critic_rate: factor on it for the critic.
        batch_size: streams of a step.
        stream_chunks: chunks of the longest streams; the teacher's horizon or more.
        teacher_guidance: guidance scale of the teacher; 1 is off.
        least_noise: least noise level that teacher and critic are asked at.
        most_noise: likewise.
        sid_alpha: weight of the squared difference in "sid".
        ema_decay: of the averaged weights, which are the result.
        checkpoint_steps: steps between checkpoints.
        evaluate_steps: steps between evaluations.
        log_steps: steps averaged into one row of log.csv.
        seed: of prompts and noise.
        precision: "bf16" is faster where the processor has it.
    """

    teacher: str = "runs/teacher"
    initial: str = "runs/student"
    vae: str = "runs/vae/vae"
    objective: Literal["dmd", "sid"] = "dmd"
    total_steps: int = 1800
    critic_steps: int = 5
    learning_rate: float = 1e-4
    critic_rate: float = 1.0
    batch_size: int = 8
    stream_chunks: int = 6
    teacher_guidance: float = 3.0
    least_noise: float = 0.02
    most_noise: float = 0.98
    sid_alpha: float = 1.0
    ema_decay: float = 0.99
    checkpoint_steps: int = 120
    evaluate_steps: int = 300
    log_steps: int = 30
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        _ = self.loop  # checks its part
        if self.objective not in ("dmd", "sid"):
            raise ValueError(f"objective must be 'dmd' or 'sid', got {self.objective!r}")
        for name in ("critic_steps", "batch_size", "stream_chunks"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("critic_rate", "sid_alpha"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not self.teacher_guidance >= 1:
            raise ValueError(f"teacher_guidance must be at least 1 (off), got {self.teacher_guidance}")
        if not 0 < self.least_noise < self.most_noise <= 1:
            raise ValueError(
                "least_noise and most_noise must be in (0, 1], the least first, "
                f"got {self.least_noise} and {self.most_noise}"
            )

    @property
    def loop(self) -> LoopSettings:
        """How long and how to optimise."""
        return LoopSettings(
            total_steps=self.total_steps,
            learning_rate=self.learning_rate,
            # The critic chases a student that moves: momentum would lag behind.
            betas=(0.0, 0.999),
            ema_decay=self.ema_decay,
            checkpoint_steps=self.checkpoint_steps,
            evaluate_steps=self.evaluate_steps,
            log_steps=self.log_steps,
            seed=self.seed,
            precision=self.precision,
        )


class Distillation(nn.Module):
    """The student, and the critic that knows what it makes. Their text encoders are not trained."""

    def __init__(self, student: Denoiser, critic: Denoiser) -> None:
        super().__init__()
        self.student = student
        self.critic = critic
        for part in (student, critic):
            part.text_encoder.requires_grad_(requires_grad=False)


class SelfForcingTrainee:
    """A student with its critic and its teacher.

    Args:
        settings: of the distillation.
        module: student and critic with weights to start from; the critic's are the teacher's.
        teacher: frozen.
        stream: how the student streams.
        horizon_chunks: chunks that teacher and critic see.
        vae: whose latents they know; it decodes nothing.
    """

    def __init__(
        self,
        settings: SelfForcingSettings,
        module: Distillation,
        teacher: Denoiser,
        stream: StudentTrainingSettings,
        horizon_chunks: int,
        vae: TinyVideoVAE,
    ) -> None:
        if settings.stream_chunks < horizon_chunks:
            raise ValueError(
                f"stream_chunks must be at least {horizon_chunks}, what the teacher sees, "
                f"got {settings.stream_chunks}"
            )
        self.settings = settings
        self.module = module
        self.stream = stream
        self.teacher = teacher.requires_grad_(requires_grad=False)
        self.horizon_chunks = horizon_chunks
        self.vae = vae
        self.world = ToyWorld()

    @property
    def rate_factors(self) -> Mapping[str, float]:
        """Of the critic."""
        return {"critic.": self.settings.critic_rate}

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of the student in every step that is its turn, else of the critic."""
        rng = np.random.default_rng((self.settings.seed, step))
        students_turn = step % (self.settings.critic_steps + 1) == 0
        return self._student_loss(rng) if students_turn else self._critic_loss(rng)

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """How far teacher and critic are apart on the averaged student's streams, in the teacher's errors."""
        assert isinstance(module, Distillation)
        trained, self.module = self.module, module
        try:
            torch.manual_seed(self.settings.seed)
            rng = np.random.default_rng((self.settings.seed, self.settings.total_steps))
            captions = self._captions(rng, _EVALUATION_SCENES)
            piece = self._streams(module.student, captions, rng)
            _, real, fake = self._judged(piece, captions, rng)
        finally:
            self.module = trained
        return {"distance": matching_gradient(piece, real, fake).abs().mean().item()}

    def _student_loss(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        captions = self._captions(rng, self.settings.batch_size)
        piece = self._streams(self.module.student, captions, rng)
        if self.settings.objective == "sid":
            _, real, fake = self._judged(piece, captions, rng)
            loss = identity_loss(piece, real, fake, self.settings.sid_alpha)
        else:
            with torch.no_grad():
                _, real, fake = self._judged(piece, captions, rng)
            loss = matching_loss(piece, real, fake)
        return loss, {"student": loss.item()}

    def _critic_loss(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        captions = self._captions(rng, self.settings.batch_size)
        with torch.no_grad():
            piece = self._streams(self.module.student, captions, rng)
        sigma, critic = self._sigma(piece, rng), self.module.critic
        noise = torch.randn_like(piece)
        velocity = critic.velocity(add_noise(piece, noise, sigma), sigma, critic.embed(captions))
        loss = flow_loss(velocity, piece, noise)
        return loss, {"critic": loss.item()}

    def _streams(self, student: Denoiser, captions: list[str], rng: np.random.Generator) -> Tensor:
        """The last horizon of a stream for each caption, `[B, C, T, h, w]`."""
        stream, chunk = self.stream, self.stream.chunk_frames
        chunks = int(rng.integers(self.horizon_chunks, self.settings.stream_chunks + 1))
        settings = StreamSettings(
            chunk_frames=chunk,
            sink_frames=chunk,
            window_frames=stream.window_chunks * chunk,
            positions=PositionPolicy.WINDOW,
        )
        with torch.no_grad():
            embeds = student.embed(captions)
        request = StreamRequest(
            prompt=tuple(captions),
            prompt_embeds=embeds,
            height=self.world.height,
            width=self.world.width,
            num_frames=frames_of(chunks * chunk, self.vae.spec.temporal_ratio),
            noise=SeededNoise(tuple(int(seed) for seed in rng.integers(2**62, size=len(captions)))),
            schedule=FewStepScheduler(steps=stream.steps, shift=stream.shift).schedule(),
            settings=settings,
            decode=False,
        )
        first = (chunks - self.horizon_chunks) * chunk
        gradient_from = first if torch.is_grad_enabled() else chunks * chunk
        engine = RolloutEngine(student.transformer, self.vae, student.embed, gradient_from=gradient_from)
        exit_step = int(rng.integers(len(stream.steps)))
        return rollout(engine, request, exit_step)[:, :, first:].float()

    def _judged(
        self, piece: Tensor, captions: list[str], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noise levels, and what teacher and critic make of a piece under the same noise."""
        sigma, teacher, critic = self._sigma(piece, rng), self.teacher, self.module.critic
        noisy = add_noise(piece, torch.randn_like(piece), sigma)
        fake = clean_from(noisy, critic.velocity(noisy, sigma, critic.embed(captions)), sigma)
        toward = teacher.velocity(noisy, sigma, teacher.embed(captions))
        if self.settings.teacher_guidance > 1:
            away = teacher.velocity(noisy, sigma, teacher.embed([""] * len(captions)))
            toward = guided(toward, away, self.settings.teacher_guidance)
        return sigma, clean_from(noisy, toward, sigma), fake

    def _sigma(self, piece: Tensor, rng: np.random.Generator) -> Tensor:
        """The same noise level for all frames of a clip, `[B, T]`."""
        levels = shifted(torch.from_numpy(rng.random(len(piece))).float(), self.stream.shift)  # type: ignore[arg-type]
        assert isinstance(levels, Tensor)
        levels = levels.clamp(self.settings.least_noise, self.settings.most_noise)
        return levels.to(piece.device)[:, None].expand(-1, piece.shape[2])

    def _captions(self, rng: np.random.Generator, count: int) -> list[str]:
        """Captions of random scenes."""
        scenes = [self.world.scene(int(seed), "train") for seed in rng.integers(_SCENES, size=count)]
        return [self.world.caption(scene, int(rng.integers(CAPTIONS))) for scene in scenes]


def distill_student(settings: SelfForcingSettings, output: Path) -> None:
    """Distil, continuing what `output` already holds; the result is `output`/model."""
    for name in ("teacher", "initial"):
        if not (Path(getattr(settings, name)) / "settings.json").is_file():
            raise ValueError(f"{name} must be the folder of a finished run, got {getattr(settings, name)!r}")
    device = PartialState().device
    teacher_settings = saved_settings(Path(settings.teacher), TeacherTrainingSettings)
    stream = saved_settings(Path(settings.initial), StudentTrainingSettings)
    vae = TinyVideoVAE.from_pretrained(settings.vae, dtype=torch.float32)
    channels = vae.spec.latent_channels
    teacher, critic = (for_training(Denoiser(teacher_settings, channels)) for _ in range(2))
    for each in (teacher, critic):
        load_average(each, Path(settings.teacher))
    student = for_training(Denoiser(stream, channels))
    load_average(student, Path(settings.initial))
    trainee = SelfForcingTrainee(
        settings,
        Distillation(student, critic),
        teacher.to(device).eval(),
        stream,
        teacher_settings.horizon_chunks,
        vae,
    )
    claim_run(output, settings)
    average = run(settings.loop, trainee, output)
    assert isinstance(average, Distillation)
    export(average.student, settings, stream, output)
    logger.info("distilled student in %s", output / RESULT_FOLDER)


def export(
    student: Denoiser, settings: SelfForcingSettings, stream: StudentTrainingSettings, output: Path
) -> None:
    """Write a distilled student as a pipeline folder, weights in float16; it needs no guidance."""
    records = [
        *trainings(Path(settings.teacher), "teacher", TeacherTrainingSettings),
        *trainings(Path(settings.initial), "student", StudentTrainingSettings),
        Training(
            name="distilled_student",
            part="student",
            verb="distill",
            run=output,
            settings=settings,
            logs={"distilled_student": output / "log.csv"},
            steps=steps_taken(output),
        ),
    ]
    save_model(
        student.eval().half(),
        FewStepScheduler(steps=stream.steps, shift=stream.shift),
        Path(settings.vae),
        output / RESULT_FOLDER,
        records,
        chunk_frames=stream.chunk_frames,
        sink_frames=stream.chunk_frames,
        window_frames=stream.window_chunks * stream.chunk_frames,
        positions="window",
    )
