"""Trains a causal few-step student on latents: the embedded one on those of the toy world.

The student learns the velocity of noisy chunks, mostly at the noise levels of its few sampling steps: in
clean, slightly disturbed context (teacher forcing), or in context that is as noisy (diffusion forcing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genstream.schedulers.few_step import FewStepScheduler
from genstream.schedulers.schedule import shifted
from genstream.shapes import check_counts, check_not_negative, check_positive, check_unused
from genstream.streaming.settings import StreamSettings
from genstream.training.clips import Clips, ClipSet
from genstream.training.denoiser import Denoiser, velocity_in
from genstream.training.forcing import (
    Context,
    ForcedSequence,
    draw_context,
    from_middle,
    from_start,
    with_noisy_context,
)
from genstream.training.model_run import ModelTrainee, load_first_chunks, save_trained, train_model
from genstream.training.model_settings import ModelRunSettings
from genstream.training.objectives import add_noise, clean_from, flow_loss

Caption = Callable[[int, int], str]

_SHARED_LEVELS = 0.5
"""Share of noisy chunks at the sampling steps' own noise levels; the others are anywhere between."""
_TARGET_COPIES = 3
_KEPT_SINKS = 0.2
"""Share of prompt switches that keep the stream's first sinks."""
_SWITCHED = 0.1


@dataclass(frozen=True, kw_only=True)
class StudentTrainingSettings(ModelRunSettings):
    """What is particular to the student.

    Attributes:
        forcing: what a noisy chunk's context is, "teacher" the clean video, "diffusion" noisy chunks.
        window_chunks: chunks kept besides the first, which is the sink, and the current one.
        random_masks: every step draws a chunk size up to `chunk_frames`, a window in whole chunks up to that
            of `window_chunks`, and whether there is a sink, so that the model can be run with any of them.
        steps: sampling timesteps before the shift, in (0, 1000].
        context_noise: largest noise on the clean context, in standard deviations of the latents, so that
            small errors of the student's own output do not grow.
        first: share of steps on first chunks alone, several times as many: all else follows from them, and
            nothing but the prompt tells what they show.
        first_chunks: first chunks of such a step, in batch sizes.
        first_clips: further clips of which only the first chunk is encoded, for such steps: what prompts
            mean, above all those of two objects, is learnt from many scenes. 0 for those of `clips`.
        redrawn: share of steps whose context the student draws itself, from the true one under noise, so that
            it learns to mend what it gets wrong while streaming.
        redrawn_level: largest noise under which it does so. From 0.6 on objects come out somewhere else, and
            what follows no longer fits the context.
        image_start: share of steps with a single first frame, so that a stream can start from an image.
        middle: share of steps with a target far from the start.
        switched: share of steps with a target behind a prompt switch. In `videos` nothing switches: left at
            its default it falls to streams from their start.
        hard_weight: how much more often clips are drawn that show two objects or one that bounces; 1 with
            `videos`, like a `first_clips` of 0.
    """

    forcing: Literal["teacher", "diffusion"] = "teacher"
    window_chunks: int = 2
    random_masks: bool = False
    steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    context_noise: float = 0.15
    first: float = 0.35
    first_chunks: int = 4
    first_clips: int = 0
    redrawn: float = 0.35
    redrawn_level: float = 0.8
    image_start: float = 0.05
    middle: float = 0.3
    switched: float = _SWITCHED
    hard_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.forcing not in ("teacher", "diffusion"):
            raise ValueError(f"forcing must be 'teacher' or 'diffusion', got {self.forcing!r}")
        check_counts(first_chunks=self.first_chunks)
        for name, least in (("window_chunks", int(self.random_masks)), ("first_clips", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.clip_chunks < self._least_chunks:
            raise ValueError(f"clip_chunks must be at least {self._least_chunks}, got {self.clip_chunks}")
        check_not_negative(context_noise=self.context_noise)
        check_positive("hard_weight", self.hard_weight)
        if self.videos is not None:  # they do not tell what is hard in them, and nothing switches
            check_unused(self, ("switched", "first_clips", "hard_weight"), "where videos are given")
        if self.forcing == "diffusion":  # its context is as noisy as what is learnt
            check_unused(self, ("context_noise", "redrawn", "redrawn_level"), "for forcing 'diffusion'")
        self._check_shares()
        _ = self.scheduler, self.stream  # check their parts

    def _check_shares(self) -> None:
        for name in ("first", "redrawn", "redrawn_level", "image_start", "middle", "switched"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if (total := self.first + self.image_start + self.middle + self.switched_share) > 1:
            raise ValueError(
                f"first, image_start, middle and switched must add up to at most 1, got {total:g}"
            )

    @property
    def _least_chunks(self) -> int:
        """A target in the middle must have room behind the sink; where the scene changes, twice."""
        return self.window_chunks + 3 if self.videos is not None else 2 * (self.window_chunks + 2)

    @property
    def switched_share(self) -> float:
        """Share of steps with a target behind a prompt switch."""
        return self.switched if self.videos is None else 0.0

    @property
    def scheduler(self) -> FewStepScheduler:
        """Denoising steps of the finished model."""
        made: FewStepScheduler = FewStepScheduler(steps=self.steps, shift=self.shift)
        return made

    @property
    def stream(self) -> StreamSettings:
        """How the finished model streams."""
        return Context(self.chunk_frames, self.window_chunks).stream(self.guidance_scale)


class StudentTrainee(ModelTrainee[StudentTrainingSettings]):
    """The student with its objective.

    Args:
        settings: of the run.
        module: with weights to start from.
        clips: to train on, and behind them those for evaluation.
        latents: of all clips, `[clips, C, T, h, w]`.
        first_latents: of the first chunks of further clips, whose numbers follow on `clips`.
    """

    def __init__(
        self,
        settings: StudentTrainingSettings,
        module: Denoiser,
        clips: Clips,
        latents: Tensor,
        first_latents: Tensor | None = None,
    ) -> None:
        super().__init__(settings, module, clips, latents)
        self.first_latents = first_latents

    def _loss(self, shared: np.random.Generator, own: np.random.Generator, among: range) -> Tensor:
        module, rng = self.module, own
        sequence, clips, caption = self._draw(shared, own, among)
        if self.settings.forcing == "diffusion":
            sequence = with_noisy_context(sequence)
        device = module.transformer.device
        clean = self._latents_of(clips).to(device, torch.float32)
        captions = [caption(clip, int(rng.integers(self.clips.caption_count(clip)))) for clip in clips]
        prompted = rng.random(len(clips)) >= self.settings.without_text
        told = [text if kept else "" for text, kept in zip(captions, prompted, strict=True)]
        text = module.embed(told)
        context = clean[:, :, sequence.clean_frames]
        if sequence.clean and shared.random() < self.settings.redrawn:
            context = _redraw(module, context, sequence, text.detach(), self.settings.redrawn_level)
        disturbance = torch.rand(len(clean), 1, 1, 1, 1, device=device) * self.settings.context_noise
        context = context + disturbance * torch.randn_like(context)
        target = clean[:, :, sequence.noisy_frames]
        sigma = self._sigma(sequence, len(clips), rng).to(device)  # [B, T noisy]
        noise = torch.randn_like(target)
        noisy = add_noise(target, noise, sigma)
        predicted = velocity_in(module, context, noisy, sigma, text, sequence)
        return flow_loss(predicted, target, noise)

    def _draw(
        self, shared: np.random.Generator, own: np.random.Generator, among: range
    ) -> tuple[ForcedSequence, list[int], Caption]:
        """The sequence of a step, its clips out of `among`, and what gives the caption of its targets."""
        settings, clips, kind = self.settings, self.clips, shared.random()
        context = Context(settings.chunk_frames, settings.window_chunks)
        if settings.random_masks:
            sizes = range(1, settings.chunk_frames + 1)
            context = draw_context(shared, sizes, settings.window_chunks * settings.chunk_frames)
        if kind < settings.first:
            is_training = among.start == 0
            if self.first_latents is not None and is_training:
                among = range(clips.count, clips.count + len(self.first_latents))
            chosen = self._choose(among, own, settings.first_chunks)
            return from_start([context.chunk_frames], context.window_chunks), chosen, clips.caption
        kind -= settings.first
        if kind < settings.switched_share:
            chosen = self._choose([clip for clip in among if clips.switches(clip)], own)
            return self._after_switch(shared, context), chosen, clips.caption_after_switch
        kind -= settings.switched_share
        if kind < settings.middle:
            chosen = self._choose([clip for clip in among if not clips.switches(clip)], own)
            return self._middle(shared, context), chosen, clips.caption
        kind -= settings.middle
        window = context.window_chunks
        chunks = [context.chunk_frames] * (window + 2)
        if kind < settings.image_start:
            chunks[0] = 1
        return from_start(chunks, window, sink=context.sink), self._choose(among, own), clips.caption

    def _latents_of(self, clips: Sequence[int]) -> Tensor:
        """Of clips, or of the further ones of which there is the first chunk alone."""
        behind = self.clips.count
        if self.first_latents is not None and clips[0] >= behind:
            return self.first_latents[[clip - behind for clip in clips]]
        return self.latents[clips]

    def _choose(self, clips: Sequence[int], rng: np.random.Generator, batches: int = 1) -> list[int]:
        weights = np.array([self.settings.hard_weight if self.clips.is_hard(clip) else 1 for clip in clips])
        places = rng.choice(len(clips), size=batches * self.settings.batch_size, p=weights / weights.sum())
        return [clips[place] for place in places]

    def _middle(self, rng: np.random.Generator, context: Context) -> ForcedSequence:
        """A target whose window begins anywhere behind the sink."""
        size, window = context.chunk_frames, context.window_chunks
        latest = self.settings.clip_chunks * self.settings.chunk_frames - (window + 1) * size
        first = int(rng.integers(size + 1, latest + 1))
        starts = [first + size * place for place in range(window + 1)]
        return from_middle([0, *starts] if context.sink else starts, size, _TARGET_COPIES)

    def _after_switch(self, rng: np.random.Generator, context: Context) -> ForcedSequence:
        """A target behind the switch; the sink is the stream's first, or the oldest chunk kept by it."""
        settings, size, window = self.settings, context.chunk_frames, context.window_chunks
        switch = self.clips.switch_chunk * settings.chunk_frames
        # Chunks are counted from the switch, where one begins.
        target = int(rng.integers((settings.clip_chunks * settings.chunk_frames - switch) // size))
        oldest = -int(rng.integers(1, window + 2))
        kept = range(max(target - window, oldest + 1), target)
        sink = 0 if rng.random() < _KEPT_SINKS else switch + size * oldest
        starts = [sink, *(switch + size * chunk for chunk in (*kept, target))]
        recached = 1 + sum(chunk < 0 for chunk in kept)
        return from_middle(starts, size, _TARGET_COPIES, recached)

    def _sigma(self, sequence: ForcedSequence, clips: int, rng: np.random.Generator) -> Tensor:
        """One noise level for each noisy chunk of each clip, by frame `[B, T noisy]`."""
        size = (clips, len(sequence.noisy))
        levels = np.array([shifted(step / 1000, self.settings.shift) for step in self.settings.steps])
        # Clean contexts come in streams: with noisy ones, low noise levels must be as usual as high ones.
        shift = self.settings.shift if self.settings.forcing == "teacher" else 1.0
        anywhere = shifted(rng.random(size), shift)  # type: ignore[arg-type]
        sigma = np.where(rng.random(size) < _SHARED_LEVELS, rng.choice(levels, size), anywhere)
        lengths = [len(piece.frames) for piece in sequence.noisy]
        return torch.from_numpy(np.repeat(sigma, lengths, axis=1)).float()


@torch.no_grad()
def _redraw(
    module: Denoiser, context: Tensor, sequence: ForcedSequence, text: Tensor, level: float
) -> Tensor:
    """The context as the student predicts it in one step from its noisy version."""
    sigma = torch.rand(len(context), 1, device=context.device) * level
    sigma = sigma.expand(-1, context.shape[2])
    noisy = add_noise(context, torch.randn_like(context), sigma)
    frames = noisy.shape[2]
    mask = torch.tensor(sequence.mask(), device=noisy.device)[:frames, :frames]
    velocity = module.velocity(noisy, sigma, text, sequence.positions[:frames], mask)
    return clean_from(noisy, velocity, sigma)


def train_student(settings: StudentTrainingSettings, output: Path) -> None:
    """Encode the clips, train, and continue what `output` already holds; the result is `output`/model."""

    def build(
        settings: StudentTrainingSettings, module: Denoiser, clips: Clips, latents: Tensor
    ) -> StudentTrainee:
        further = None
        if settings.first_clips:
            assert isinstance(clips, ClipSet)  # of videos there are none
            further = load_first_chunks(settings, clips, settings.first_clips, output)
        return StudentTrainee(settings, module, clips, latents, further)

    train_model(settings, output, build, export)


def export(student: Denoiser, settings: StudentTrainingSettings, run_folder: Path) -> None:
    """Write the student of a run as a pipeline folder."""
    save_trained(student, settings, run_folder, "student", settings.scheduler, settings.stream)
