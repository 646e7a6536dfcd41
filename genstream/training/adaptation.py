"""Causal adaptation: a teacher's weights learn to follow its sampling paths in few steps, chunk by chunk.

The teacher makes whole clips, or is causal itself and needs more steps or guidance. Every chunk stands at a
noise level of its own, in the context that a stream would show it. "ode" predicts
where a path ends (CausVid, arXiv 2412.07772; Self Forcing starts from such a student); "multistep" predicts
the mean velocity of the next part of the path (StreamDiT, arXiv 2507.03745). The paths are guided, the
student needs no guidance.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genstream.io.model_folder import RESULT_FOLDER
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler, FlowEulerScheduler
from genstream.shapes import check_guidance, check_not_negative, check_positive, check_unused
from genstream.streaming.settings import StreamSettings
from genstream.training.denoiser import Denoiser, copy_weights, for_training, velocity_in
from genstream.training.forcing import (
    FORCED,
    Context,
    ForcedSequence,
    draw_context,
    from_middle,
    from_start,
    with_noisy_context,
)
from genstream.training.loop import LoopSettings, run, steps_taken
from genstream.training.model_config import ModelConfig, check_stream
from genstream.training.model_run import card_of, save_model
from genstream.training.objectives import clean_from, segment_velocity
from genstream.training.precision import Precision, computing_in
from genstream.training.processes import evaluation_rng, once, own_rng, process
from genstream.training.prompts import prompts_from
from genstream.training.record import Origins, Training, claimed_run, is_finished
from genstream.training.starting import load_model, model_folder
from genstream.training.trajectories import Sampling, Trajectories, collect, solve, stream

logger = logging.getLogger(__name__)

_TRAJECTORIES_FOLDER = "trajectories"
_EVALUATION_PATHS = 16
_EVALUATION_SEQUENCES = 8
_SEEDS = 2**62
_TARGET_COPIES = 3
_MIDDLE = 0.3
"""Share of steps with a target far from the start."""


@dataclass(frozen=True, kw_only=True)
class AdaptationSettings:
    """How a teacher becomes a causal student of few steps.

    Attributes:
        teacher: model whose paths are followed and whose weights the student starts from; or the run that
            made it. It makes whole clips, or streams with a window or sinks.
        objective: "ode" predicts the end of the path, "multistep" its next part.
        prompts: text file with a prompt on each line; captions of random scenes when None.
        trajectories: paths to learn from, sampled once, before training; the last 16 are for evaluation.
        num_steps: of the student.
        substeps: Euler steps of the teacher for each one of the student.
        guidance_scale: of the teacher; its own when None.
        shift: timestep shift of both; the teacher's when None.
        chunk_frames: latent frames of a chunk; they divide those that the teacher sees, or are its own.
        window_chunks: chunks kept besides the first, which is the sink, and the current one; a path is as
            long as all of them or longer.
        stream_chunks: chunks of a path of a causal teacher; those of others are as long as what they see.
        forcing: what a noisy chunk's context is, "diffusion" noisy chunks, "teacher" the clean stream.
        context_noise: largest noise on the clean context, in standard deviations of the latents.
        random_masks: every step draws a chunk size up to `chunk_frames`, a window in whole chunks up to that
            of `window_chunks`, and whether there is a sink, so that the model can be run with any of them.
            Chunks of a causal teacher's paths stay as they are: all noise of one shaped each of its frames.
        total_steps: optimiser steps.
        learning_rate: peak.
        optimizer: "adamw" or "muon".
        batch_size: paths of a step.
        checkpoint_steps: steps between checkpoints.
        evaluate_steps: steps between evaluations.
        seed: of prompts and noise.
        precision: "bf16" is faster where the processor has it.
        gradient_checkpointing: compute what lies between blocks twice in place of keeping it.
    """

    teacher: str = "runs/teacher"
    objective: Literal["ode", "multistep"] = "ode"
    prompts: str | None = None
    trajectories: int = 1024
    num_steps: int = 4
    substeps: int = 6
    guidance_scale: float | None = None
    shift: float | None = None
    chunk_frames: int = 3
    window_chunks: int = 2
    stream_chunks: int = 6
    forcing: Literal["teacher", "diffusion"] = "diffusion"
    context_noise: float = 0.0
    random_masks: bool = False
    total_steps: int = 2000
    learning_rate: float = 5e-4
    optimizer: Literal["adamw", "muon"] = "adamw"
    batch_size: int = 16
    checkpoint_steps: int = 200
    evaluate_steps: int = 500
    seed: int = 0
    precision: Precision = "bf16"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _ = self.loop  # checks its part
        if self.objective not in ("ode", "multistep"):
            raise ValueError(f"objective must be 'ode' or 'multistep', got {self.objective!r}")
        if self.trajectories <= _EVALUATION_PATHS:
            raise ValueError(
                f"trajectories must be more than {_EVALUATION_PATHS}, which are kept for evaluation, "
                f"got {self.trajectories}"
            )
        if self.forcing not in ("teacher", "diffusion"):
            raise ValueError(f"forcing must be 'teacher' or 'diffusion', got {self.forcing!r}")
        check_not_negative(context_noise=self.context_noise)
        if self.context_noise > 0 and self.forcing == "diffusion":
            raise ValueError(f"context_noise must be 0 for forcing 'diffusion', got {self.context_noise}")
        for name in ("num_steps", "substeps", "chunk_frames", "stream_chunks", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.window_chunks < (least := 1 if self.random_masks else 0):
            raise ValueError(f"window_chunks must be at least {least}, got {self.window_chunks}")
        if self.guidance_scale is not None:
            check_guidance("guidance_scale", self.guidance_scale)
        if self.shift is not None:
            check_positive("shift", self.shift)

    def check_streams(self, teacher: StreamSettings) -> None:
        """Raise ValueError unless a teacher that streams so makes paths with all contexts of the student."""
        chunk, together = self.chunk_frames, teacher.chunk_frames
        if teacher.sees_past and chunk != together:
            raise ValueError(f"chunk_frames must be {together} like the causal teacher's, got {chunk}")
        if together % chunk:
            raise ValueError(f"chunk_frames must divide {together}, the teacher's frames, got {chunk}")
        name, chunks = "stream_chunks", self.stream_chunks
        if not teacher.sees_past:
            check_unused(self, ["stream_chunks"], "for a teacher of whole clips")
            name, chunks = f"the teacher's chunks of {chunk} frames", together // chunk
        if chunks < (least := Context.of(self.stream).longest_chunks):
            raise ValueError(
                f"{name} must be at least {least}, the sink, window_chunks = {self.window_chunks} and the "
                f"current one, got {chunks}"
            )

    @property
    def stream(self) -> StreamSettings:
        """How the student streams, but for what it takes over from the teacher."""
        return Context(self.chunk_frames, self.window_chunks).stream()

    @property
    def loop(self) -> LoopSettings:
        """How long and how to optimise."""
        return LoopSettings.of(self)


class AdaptationTrainee:
    """A student that learns from paths.

    Args:
        settings: of the run.
        module: with weights to start from.
        paths: to learn from, the last ones for evaluation.
        sigmas: noise levels of their states, from 1 to 0.
        sizes: latent frames of a chunk that random masks draw from.
    """

    def __init__(
        self,
        settings: AdaptationSettings,
        module: Denoiser,
        paths: Trajectories,
        sigmas: list[float],
        sizes: Sequence[int],
    ) -> None:
        self.settings = settings
        self.module = module
        self.paths = paths
        self.sigmas = torch.tensor(sigmas)
        self.sizes = sizes
        module.text_encoder.requires_grad_(requires_grad=False)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of what is predicted."""
        seed, count = self.settings.seed, len(self.paths.captions) - _EVALUATION_PATHS
        return self._loss(own_rng(seed, step), range(count)), {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The same on paths that are never trained on, in the same sequences every time."""
        count, seed = len(self.paths.captions), self.settings.seed
        torch.manual_seed(seed)
        rngs = [evaluation_rng(seed, draw) for draw in range(_EVALUATION_SEQUENCES)]
        among = range(count - _EVALUATION_PATHS, count)
        return {"loss": float(np.mean([self._loss(rng, among).item() for rng in rngs]))}

    def _loss(self, rng: np.random.Generator, among: range) -> Tensor:
        module = self.module
        device = module.transformer.device
        sequence = self._sequence(rng)
        chosen = rng.choice(among, self.settings.batch_size)
        paths = self.paths.states[chosen]
        states = paths[:, :, :, sequence.noisy_frames].to(device, torch.float32)
        context = paths[:, -1, :, sequence.clean_frames].to(device, torch.float32)
        disturbance = torch.rand(len(chosen), 1, 1, 1, 1, device=device) * self.settings.context_noise
        context = context + disturbance * torch.randn_like(context)
        with torch.no_grad():
            text = module.embed([self.paths.captions[path] for path in chosen])
        # One level for each chunk. The last is clean, which shows what a stream's past looks like where none
        # of it is given.
        count = len(self.sigmas) - (self.settings.forcing == "teacher")
        by_chunk = rng.integers(count, size=(len(chosen), len(sequence.noisy)))
        by_frame = np.repeat(by_chunk, [len(piece.frames) for piece in sequence.noisy], axis=1)
        levels = torch.from_numpy(by_frame).to(device)
        sigmas = self.sigmas.to(device)
        x, sigma = _at(states, levels), sigmas[levels]
        velocity = velocity_in(module, context, x, sigma, text, sequence)
        if self.settings.objective == "ode":
            error = clean_from(x, velocity, sigma) - states[:, -1]
        else:
            later = (levels + 1).clamp(max=len(sigmas) - 1)
            error = velocity - segment_velocity(x, _at(states, later), sigma, sigmas[later])
        noisy = (sigma > 0)[:, None, :, None, None].expand_as(error)
        return error.square()[noisy].sum() / noisy.sum().clamp(min=1)

    def _sequence(self, rng: np.random.Generator) -> ForcedSequence:
        settings = self.settings
        context = Context(settings.chunk_frames, settings.window_chunks)
        if settings.random_masks:
            context = draw_context(rng, self.sizes, settings.window_chunks * settings.chunk_frames)
        size, window, sink = context.chunk_frames, context.window_chunks, context.sink
        chunks = self.paths.states.shape[3] // size
        if chunks > window + 1 and rng.random() < _MIDDLE:
            first = int(rng.integers(1, chunks - window))
            starts = [size * (first + place) for place in range(window + 1)]
            sequence = from_middle([0, *starts] if sink else starts, size, _TARGET_COPIES)
        else:
            length = int(rng.integers(1, min(window + 2, chunks) + 1))
            sequence = from_start([size] * length, window, sink=sink)
        return sequence if settings.forcing == "teacher" else with_noisy_context(sequence)


def _at(states: Tensor, levels: Tensor) -> Tensor:
    """Of states `[B, levels, C, T, h, w]` the ones at levels `[B, T]`, `[B, C, T, h, w]`."""
    batch, frames = (torch.arange(size, device=levels.device) for size in levels.shape)
    return states.permute(0, 3, 1, 2, 4, 5)[batch[:, None], frames, levels].movedim(1, 2)


def adapt_teacher(settings: AdaptationSettings, output: Path) -> None:
    """Sample the paths, train, and continue what `output` already holds; the result is `output`/model."""
    origins = _origins(settings)
    if is_finished(output / RESULT_FOLDER, output.name, settings, settings.total_steps, origins):
        return
    model = ModelConfig.of("teacher", settings.teacher)
    check_stream("teacher", model, FORCED)  # the student streams so too
    settings.check_streams(model.settings)
    chunk, is_causal = settings.chunk_frames, model.settings.sees_past
    guided = model.settings
    if settings.guidance_scale is not None:
        guided = replace(guided, guidance_scale=settings.guidance_scale)
    pipe = load_model("teacher", settings.teacher)
    prompts = prompts_from(settings.prompts, [Denoiser.of(pipe)])
    torch.manual_seed(settings.seed)
    denoiser = for_training(Denoiser.of(pipe), checkpointing=settings.gradient_checkpointing)
    denoiser.to(process().device)
    sampling = Sampling(
        num_steps=settings.num_steps,
        substeps=settings.substeps,
        shift=pipe.scheduler.config.shift if settings.shift is None else settings.shift,
        guidance_scale=guided.guidance_scale,
    )
    shape = _latents_shape(pipe)

    def sample(first: int, count: int) -> Trajectories:
        rng = np.random.default_rng((settings.seed, first))
        captions = prompts.draw(count, rng).captions
        with computing_in(settings.precision, denoiser.transformer.device.type):
            if is_causal:
                seeds = rng.integers(_SEEDS, size=count).tolist()
                return Trajectories(captions, stream(pipe, captions, seeds, settings.stream_chunks, sampling))
            generator = torch.Generator().manual_seed(int(rng.integers(2**32)))
            noise = torch.randn(count, *shape, generator=generator).to(denoiser.transformer.device)
            return Trajectories(captions, solve(denoiser, noise, captions, sampling))

    with claimed_run(output, settings, origins):
        paths = collect(sample, settings.trajectories, output / _TRAJECTORIES_FOLDER)
        sizes = [chunk] if is_causal else range(1, chunk + 1)
        run(settings.loop, AdaptationTrainee(settings, denoiser, paths, sampling.sigmas, sizes), output)
        once(lambda: export(denoiser, settings, sampling.shift, output))
    once(lambda: logger.info("causal student in %s", output / RESULT_FOLDER))


def export(student: Denoiser, settings: AdaptationSettings, shift: float, output: Path) -> None:
    """Write a student as a pipeline folder."""
    pipe = load_model("teacher", settings.teacher)
    copy_weights(student, Denoiser.of(pipe))
    if settings.objective == "ode":
        steps = [1000 * (1 - step / settings.num_steps) for step in range(settings.num_steps)]
        pipe.scheduler = FewStepScheduler(steps=steps, shift=shift)
    else:
        pipe.scheduler = FlowEulerScheduler(num_steps=settings.num_steps, shift=shift)
    made = settings.stream
    pipe.register_to_config(
        chunk_frames=made.chunk_frames,
        sink_frames=made.sink_frames,
        window_frames=made.window_frames,
        positions=str(made.positions),
        guidance_scale=made.guidance_scale,
    )
    training = Training(
        name=output.name,
        part="causal",
        verb="distill",
        run=output,
        settings=settings,
        logs={output.name: output / "log.csv"},
        steps=steps_taken(output),
    )
    card = card_of(model_folder("teacher", settings.teacher))
    save_model(pipe, output / RESULT_FOLDER, _origins(settings), training, card)


def _origins(settings: AdaptationSettings) -> Origins:
    """What a student is made from."""
    finders = {"teacher": partial(model_folder, "teacher", settings.teacher)}
    return Origins(models=finders, prompts=settings.prompts)


def _latents_shape(pipe: CausalVideoPipeline) -> tuple[int, int, int, int]:
    """[C, T, h, w] of what the teacher sees."""
    spec = pipe.streaming_vae.spec
    height, width = (
        side // spec.spatial_ratio for side in (pipe.config.default_height, pipe.config.default_width)
    )
    return spec.latent_channels, pipe.settings.chunk_frames, height, width
