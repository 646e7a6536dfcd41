"""Distils a student by self forcing: it streams, and what corrects it sees pieces of its streams.

Self Forcing (arXiv 2506.08009): the student learns from its own past. With distribution matching no videos
are needed, only prompts. Self-Forcing++ (arXiv 2510.02283): the streams are longer than what the teacher
sees, and the piece is the end of one, at any place with the same chance. A teacher that streams itself has no
horizon; it sees the chunks of a piece in their contexts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from genstream.io.model_folder import RESULT_FOLDER
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.shapes import check_guidance, check_not_negative, check_positive, check_unused, frames_of
from genstream.streaming.noise import SeededNoise
from genstream.streaming.presets import EngineKind
from genstream.streaming.request import StreamRequest
from genstream.streaming.settings import StreamSettings
from genstream.training.clips import SWITCHED_EVERY, Clips, ClipSet
from genstream.training.correctors import (
    Adversarial,
    Corrector,
    Discriminator,
    Matching,
    NoiseLevels,
    Piece,
)
from genstream.training.denoiser import Denoiser, copy_weights, for_training
from genstream.training.forcing import FORCED, Context
from genstream.training.loop import MOST_LEARNING_RATE, LoopSettings, run, steps_taken
from genstream.training.model_config import ModelConfig, check_same_latents, check_stream
from genstream.training.model_run import (
    LATENTS_FOLDER,
    card_of,
    clips_for,
    encode_readable,
    knows_toyworld,
    save_model,
)
from genstream.training.precision import Precision
from genstream.training.processes import evaluation_rng, once, own_rng, shared_rng
from genstream.training.prompts import Asked, ClipPieces, PromptSource, prompts_from
from genstream.training.record import Origins, Training, claimed_run, is_finished
from genstream.training.rollout import CONTEXTS, RolloutEngine, rollout
from genstream.training.starting import check_shown, load_model, model_folder
from genstream.training.video_clips import CAPTION_SUFFIX
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.wrapping import module_of

logger = logging.getLogger(__name__)

_ROLLED_OUT = {"engine": (EngineKind.CACHE,), "independent_first_frame": (False,), "context": CONTEXTS}
"""Of each setting of the student's stream the values that pieces of rollouts are right for."""
_SEEDS = 2**62
_EVALUATION_STREAMS = 16
"""Of each length, at least."""
_EVALUATION_CLIPS = 64


@dataclass(frozen=True, kw_only=True)
class SelfForcingSettings:
    """How a student is distilled.

    Attributes:
        teacher: model that judges, or the run that made it. One of whole clips sees pieces as long as its one
            chunk, one that streams with a window or a sink sees each chunk in the context that it has there.
        initial: model that becomes the student, or the run that made it. Window, sinks and steps stay.
        shift: timestep shift that the student is sampled with from now on; the one it has when None.
        objective: "dmd" and "sid" match the teacher's distribution, "gan" that of real clips, which a
            discriminator tells apart that starts as the teacher.
        prompts: text file with a prompt on each line; captions of random scenes when None. "gan" takes those
            of its clips.
        videos: folder of videos with their captions, as `genstream train student` takes it, of which "gan"
            cuts its clips; None for the toy world, unless `initial` has learnt from videos.
        clips: clips that "gan" learns from; of videos the most of them.
        evaluation_clips: further clips, for evaluation alone; 64 when None. Those of videos are from videos
            of their own.
        total_steps: optimiser steps; with "dmd" the critic learns in all of them.
        critic_steps: steps of the critic alone for each one of the student.
        learning_rate: peak of the student's.
        critic_rate: factor on it for the critic.
        batch_size: streams of a step.
        stream_chunks: chunks of the longest streams; the teacher's horizon or more.
        teacher_guidance: guidance scale of the teacher; 1 is off.
        least_noise: least noise level that pieces are judged at.
        most_noise: likewise.
        sid_alpha: weight of the squared difference in "sid".
        smoothness: weight of the discriminator's squared slope in "gan".
        ema_decay: of the averaged weights, which are the result, in each step of theirs.
        checkpoint_steps: steps between checkpoints.
        evaluate_steps: steps between evaluations.
        log_steps: steps averaged into one row of log.csv.
        seed: of prompts and noise.
        precision: "bf16" is faster where the processor has it.
        gradient_checkpointing: compute what lies between blocks twice in place of keeping it.
    """

    teacher: str = "runs/teacher"
    initial: str = "runs/student"
    shift: float | None = None
    objective: Literal["dmd", "sid", "gan"] = "dmd"
    prompts: str | None = None
    videos: str | None = None
    clips: int = 3072
    evaluation_clips: int | None = None
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
    smoothness: float = 0.1
    ema_decay: float = 0.95
    checkpoint_steps: int = 120
    evaluate_steps: int = 300
    log_steps: int = 30
    seed: int = 0
    precision: Precision = "bf16"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _ = self.loop  # checks its part
        self._check_objective()
        check_not_negative(smoothness=self.smoothness)
        check_guidance("teacher_guidance", self.teacher_guidance)
        for name in ("critic_steps", "batch_size", "stream_chunks", "clips"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("critic_rate", "sid_alpha"):
            check_positive(name, getattr(self, name))
        if self.shift is not None:
            check_positive("shift", self.shift)
        if (rate := self.critic_rate * self.learning_rate) > MOST_LEARNING_RATE:
            raise ValueError(
                f"critic_rate must give the critic a learning rate of at most {MOST_LEARNING_RATE:g}, "
                f"got {rate:g} for {self.critic_rate}"
            )
        if not 0 < self.least_noise < self.most_noise <= 1:
            raise ValueError(
                "least_noise and most_noise must be in (0, 1], the least first, "
                f"got {self.least_noise} and {self.most_noise}"
            )

    def _check_objective(self) -> None:
        if self.objective not in ("dmd", "sid", "gan"):
            raise ValueError(f"objective must be 'dmd', 'sid' or 'gan', got {self.objective!r}")
        if self.objective == "gan" and self.prompts is not None:
            raise ValueError(f"prompts must be None for 'gan', which needs clips, got {self.prompts!r}")
        # One of the toy world that changes its scene, and others that do not.
        least = SWITCHED_EVERY if self.videos is None else 1
        if self.evaluation_clips is not None and self.evaluation_clips < least:
            raise ValueError(f"evaluation_clips must be at least {least}, got {self.evaluation_clips}")
        of_gan = ["videos", "clips", "evaluation_clips", "smoothness"]
        unused = ["teacher_guidance"] if self.objective == "gan" else of_gan
        if self.objective != "sid":
            unused.append("sid_alpha")
        check_unused(self, unused, f"for objective {self.objective!r}")

    def corrector(self, shift: float, teacher: Denoiser, context: Context | None) -> Corrector:
        """What corrects the student, for a timestep shift and what a streaming teacher sees."""
        levels = NoiseLevels(shift=shift, least=self.least_noise, most=self.most_noise)
        if self.objective == "gan":
            return Adversarial(levels, self.smoothness)
        return Matching(teacher, levels, self.objective, self.teacher_guidance, self.sid_alpha, context)

    def check_streams(self, teacher: StreamSettings, initial: StreamSettings) -> tuple[Context | None, int]:
        """What a teacher that streams so sees of a student's streams, and how many chunks of them together.

        Returns:
            Its context, None for a teacher of whole clips; and the chunks.

        Raises:
            ValueError: it cannot judge them, or they are shorter.
        """
        try:
            context = Context.of(teacher) if teacher.sees_past else None
        except ValueError as error:
            raise ValueError(f"teacher must stream as it was trained: {error}") from error
        together, chunk = teacher.chunk_frames, initial.chunk_frames
        if context is not None and chunk != together:
            raise ValueError(
                f"initial must have chunks of {together} like the streaming teacher, got {chunk}"
            )
        if together % chunk:
            raise ValueError(
                f"initial must have chunks that divide {together}, the teacher's frames, got {chunk}"
            )
        least = together // chunk if context is None else context.longest_chunks
        if self.stream_chunks < least:
            raise ValueError(
                f"stream_chunks must be at least {least}, what the teacher sees, got {self.stream_chunks}"
            )
        return context, least

    @property
    def loop(self) -> LoopSettings:
        """How long and how to optimise."""
        # The critic chases a student that moves: momentum would lag behind.
        return LoopSettings.of(self, betas=(0.0, 0.999))


class Distillation(nn.Module):
    """The student, and the critic that learns what it makes. Their text encoders are not trained."""

    def __init__(self, student: Denoiser, critic: Denoiser | Discriminator) -> None:
        super().__init__()
        self.student = student
        self.critic = critic
        self.let_learn("student", "critic")

    def let_learn(self, *parts: str) -> None:
        """Let gradient reach the weights of these parts alone."""
        for name, weight in self.named_parameters():
            weight.requires_grad_(name.startswith(parts) and "text_encoder." not in name)


class SelfForcingTrainee:
    """A student that learns from pieces of its own streams.

    Args:
        settings: of the distillation.
        module: student and critic with weights to start from.
        corrector: their losses.
        prompts: of the streams to learn from, and of those for evaluation.
        pipe: how the student streams.
        horizon_chunks: chunks of a piece; `settings.stream_chunks` of the longest streams.
    """

    def __init__(
        self,
        settings: SelfForcingSettings,
        module: Distillation,
        corrector: Corrector,
        prompts: tuple[PromptSource, PromptSource],
        pipe: CausalVideoPipeline,
        horizon_chunks: int,
    ) -> None:
        self.settings = settings
        self.module = module
        self.corrector = corrector
        self.prompts, self.held_out = prompts
        self.pipe = pipe
        self.horizon_chunks = horizon_chunks

    @property
    def rate_factors(self) -> Mapping[str, float]:
        """Of the critic."""
        return {"critic.": self.settings.critic_rate}

    @property
    def result(self) -> nn.Module:
        """The student."""
        return self.module.student

    @property
    def frozen(self) -> list[nn.Module]:
        """The teacher."""
        return [self.corrector.teacher] if isinstance(self.corrector, Matching) else []

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of the critic, or of the student where it is its turn.

        Where the student's gradient does not go through the critic, that learns from the same pieces too.
        """
        shared, rng = shared_rng(self.settings.seed, step), own_rng(self.settings.seed, step)
        asked = self.prompts.draw(self.settings.batch_size, rng)
        corrector, critic = self.corrector, self.module.critic
        if step % (self.settings.critic_steps + 1):
            self.module.let_learn("critic")
            with torch.no_grad():
                piece = self._draw_piece(asked, shared, rng)
            loss = corrector.critic_loss(critic, piece, asked, rng)
            return loss, {"critic": loss.item()}
        self.module.let_learn("student")
        piece = self._draw_piece(asked, shared, rng)
        students = corrector.student_loss(critic, piece, asked, rng)
        if corrector.through_critic:
            return students, {"student": students.item()}
        self.module.let_learn("student", "critic")
        critics = corrector.critic_loss(critic, piece.detach(), asked, rng)
        return students + critics, {"student": students.item(), "critic": critics.item()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """How far the student is from where it should be, as far as the critic knows.

        Mean over the shortest and the longest streams, as a viewer gets them; as many at once as in a step,
        for which there is memory.
        """
        seed, together, distances = self.settings.seed, self.settings.batch_size, []
        for chunks in sorted({self.horizon_chunks, self.settings.stream_chunks}):
            torch.manual_seed(seed)
            rng = evaluation_rng(seed)
            for _ in range(-(-_EVALUATION_STREAMS // together)):
                asked = self.held_out.draw(together, rng)
                piece = self._piece(asked, chunks, len(self.pipe.scheduler.schedule().timesteps) - 1, rng)
                distances.append(self.corrector.distance(self.module.critic, piece, asked, rng))
        return {"distance": float(np.mean(distances))}

    def _draw_piece(self, asked: Asked, shared: np.random.Generator, own: np.random.Generator) -> Piece:
        """A piece of streams of any length, whose chunks leave their denoising after any step."""
        chunks = int(shared.integers(self.horizon_chunks, self.settings.stream_chunks + 1))
        exit_step = int(shared.integers(len(self.pipe.scheduler.schedule().timesteps)))
        return self._piece(asked, chunks, exit_step, own)

    def _piece(self, asked: Asked, chunks: int, exit_step: int, rng: np.random.Generator) -> Piece:
        """The last horizon of a stream of so many chunks for each prompt."""
        pipe, schedule, student = self.pipe, self.pipe.scheduler.schedule(), self.module.student
        chunk = pipe.settings.chunk_frames
        first, last = (chunks - self.horizon_chunks) * chunk, chunks * chunk
        with torch.no_grad():
            request = StreamRequest(
                prompt=tuple(asked.captions),
                prompt_embeds=asked.embedded(student),
                height=pipe.config.default_height,
                width=pipe.config.default_width,
                num_frames=frames_of(last, pipe.streaming_vae.spec.temporal_ratio),
                noise=SeededNoise(tuple(rng.integers(_SEEDS, size=len(asked.captions)).tolist())),
                schedule=schedule,
                settings=replace(pipe.settings, guidance_scale=1.0),
                decode=False,
            )
        gradient_from = first if torch.is_grad_enabled() else last
        engine = RolloutEngine(
            student.transformer, pipe.streaming_vae, student.embed, gradient_from=gradient_from
        )
        latents = rollout(engine, request, exit_step).float()
        return Piece(latents[:, :, first:], latents[:, :, :first].detach())


@dataclass(frozen=True)
class Judged:
    """What a distillation is of, as the folders tell.

    Attributes:
        teacher: its configuration.
        student: likewise.
        context: what the teacher sees of a stream; None for one of whole clips.
        horizon_chunks: chunks of a piece: as many as the teacher sees together.
        same_text: both have the same text encoder; it is not trained, and loaded once.
    """

    teacher: ModelConfig
    student: ModelConfig
    context: Context | None
    horizon_chunks: int
    same_text: bool


def check_models(settings: SelfForcingSettings) -> Judged:
    """Whether teacher and student fit each other and the settings; nothing is loaded.

    Raises:
        ValueError: one is no model, or streams in a way that is not followed, or they do not.
    """
    teacher, student = (
        ModelConfig.of("teacher", settings.teacher),
        ModelConfig.of("initial", settings.initial),
    )
    check_stream("initial", student, _ROLLED_OUT)
    if teacher.settings.sees_past:
        check_stream("teacher", teacher, FORCED)
    check_same_latents(teacher, student)
    if settings.objective == "gan" and settings.videos is None and not knows_toyworld(student.folder):
        raise ValueError(
            "videos must be given for 'gan' where initial has learnt from videos, got None: clips of the toy "
            "world are nothing that it should show"
        )
    context, horizon_chunks = settings.check_streams(teacher.settings, student.settings)
    return Judged(teacher, student, context, horizon_chunks, student.reads_like(teacher))


def distill_student(settings: SelfForcingSettings, output: Path) -> None:
    """Distil, continuing what `output` already holds; the result is `output`/model."""
    origins = _origins(settings)
    if is_finished(output / RESULT_FOLDER, output.name, settings, settings.total_steps, origins):
        return
    judged = check_models(settings)
    taught = load_model("teacher", settings.teacher)
    pipe = _load_initial(settings, taught if judged.same_text else None)
    teacher, student = Denoiser.of(taught), Denoiser.of(pipe)
    # The text encoder is not trained, and may be larger than all else: both have the same one.
    critic = Denoiser(
        deepcopy(teacher.transformer), teacher.text_encoder, teacher.tokenizer, teacher.text_tokens
    )
    for each in (teacher, critic, student):
        for_training(each, checkpointing=settings.gradient_checkpointing)
    is_gan = settings.objective == "gan"
    torch.manual_seed(settings.seed)
    trainee = SelfForcingTrainee(
        settings,
        Distillation(student, Discriminator(critic) if is_gan else critic),
        settings.corrector(pipe.scheduler.config.shift, teacher.eval(), judged.context),
        _prompts(settings, pipe, taught, judged.horizon_chunks, output),
        pipe,
        judged.horizon_chunks,
    )
    with claimed_run(output, settings, origins):
        run(settings.loop, trainee, output)
        once(lambda: export(student, settings, output))
    once(lambda: logger.info("distilled student in %s", output / RESULT_FOLDER))


def _load_initial(
    settings: SelfForcingSettings, reader: CausalVideoPipeline | None = None
) -> CausalVideoPipeline:
    """The student as it is before, with the shift that it is to have; and the text encoder of `reader`."""
    pipe = load_model("initial", settings.initial, reader)
    if settings.shift is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=settings.shift)
    return pipe


def _prompts(
    settings: SelfForcingSettings,
    pipe: CausalVideoPipeline,
    teacher: CausalVideoPipeline,
    horizon_chunks: int,
    output: Path,
) -> tuple[PromptSource, PromptSource]:
    """Those to train with, and those to evaluate with, of which "gan" has clips of their own."""
    if settings.objective != "gan":
        prompts = prompts_from(settings.prompts, map(Denoiser.of, (pipe, teacher)))
        return prompts, prompts
    chunk, folder = pipe.settings.chunk_frames, output.parent / LATENTS_FOLDER
    clips, latents = encode_readable(_clips(settings, pipe, teacher), pipe, folder, settings.precision)
    module_of(pipe.vae).to("cpu")  # has done its work
    # Where the student's own pieces begin: nothing but their content must tell them apart.
    pieces = partial(ClipPieces, clips, latents, horizon_chunks * chunk, grid=chunk)
    training = clips.count - clips.evaluation
    return pieces(range(training)), pieces(range(training, clips.count))


def _clips(settings: SelfForcingSettings, pipe: CausalVideoPipeline, teacher: CausalVideoPipeline) -> Clips:
    """Real ones, as long as the longest streams."""
    evaluation = settings.evaluation_clips or _EVALUATION_CLIPS
    chunks, chunk_frames = settings.stream_chunks, pipe.settings.chunk_frames
    if settings.videos is not None:
        check_shown(pipe)
        length = (chunks, chunk_frames)
        return clips_for(pipe, settings.videos, length, settings.clips, evaluation, others=[teacher])
    if not isinstance(pipe.vae, TinyVideoVAE):
        raise ValueError(
            f"initial must have a TinyVideoVAE for 'gan' without videos, got a {type(pipe.vae).__name__}"
        )
    return ClipSet(
        count=settings.clips + evaluation,
        chunks=chunks,
        chunk_frames=chunk_frames,
        temporal_ratio=pipe.vae.spec.temporal_ratio,
        size_px=pipe.config.default_height,
        evaluation=evaluation,
    )


def export(student: Denoiser, settings: SelfForcingSettings, output: Path) -> None:
    """Write a distilled student as a pipeline folder; it needs no guidance."""
    pipe = _load_initial(settings)
    copy_weights(student, Denoiser.of(pipe))
    pipe.register_to_config(guidance_scale=1.0)
    name = output.name
    training = Training(
        name=name,
        part="student",
        verb="distill",
        run=output,
        settings=settings,
        logs={name: output / "log.csv"},
        steps=steps_taken(output),
    )
    card = card_of(model_folder("initial", settings.initial))
    save_model(pipe, output / RESULT_FOLDER, _origins(settings), training, card)


def _origins(settings: SelfForcingSettings) -> Origins:
    """What a student is made from."""
    finders = {
        "teacher": partial(model_folder, "teacher", settings.teacher),
        "initial": partial(model_folder, "initial", settings.initial),
    }
    return Origins(
        models=finders, prompts=settings.prompts, videos=settings.videos, beside_videos=(CAPTION_SUFFIX,)
    )
