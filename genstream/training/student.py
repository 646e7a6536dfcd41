"""Trains the embedded causal student on the latents of the toy world.

The student learns the velocity of noisy chunks in clean, slightly disturbed context (teacher forcing),
mostly at the noise levels of its few sampling steps.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from genstream.conditioning.text import embed_tokens
from genstream.data import vocabulary
from genstream.data.toyworld import ToyWorld
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.schedulers.schedule import shifted
from genstream.training.attention import MatmulAttention
from genstream.training.clips import SWITCHED_EVERY, ClipSet, encode_clips
from genstream.training.forcing import ForcedSequence, from_middle, from_start
from genstream.training.loop import LoopSettings, load_average, run, steps_taken
from genstream.training.record import RECORD_FOLDER, SETTINGS_NAME, Training, claim_run, write_record
from genstream.training.text import tiny_text_encoder, word_tokenizer
from genstream.transformer.attention import AttentionProcessor, CrossAttention, SelfAttention
from genstream.transformer.causal_dit import CausalDiT
from genstream.vae.tiny import TinyVideoVAE

logger = logging.getLogger(__name__)

Caption = Callable[[int, int], str]

_LATENTS_FOLDER = "latents"
_RESULT_FOLDER = "model"
_EVALUATION_BATCHES = 4
_SHARED_LEVELS = 0.5
"""Share of noisy chunks at the sampling steps' own noise levels; the others are anywhere between."""
_REDRAWN_LEVEL = 0.8
"""Largest noise under which a context is redrawn."""
_TARGET_COPIES = 3
_ENDS = ("transformer.patch_embedding.", "transformer.proj_out.")
_CAPTIONS = 16
"""Captions of one scene."""
_KEPT_SINKS = 0.2
"""Share of prompt switches that keep the stream's first sinks."""


@dataclass(frozen=True, kw_only=True)
class StudentTrainingSettings:
    """What the student looks like and how it is trained.

    Attributes:
        vae: folder of the VAE whose latents it learns.
        initial: folder of a finished run to start from, whose patches may be of another size; random weights
            when None.
        total_steps: optimiser steps.
        learning_rate: peak.
        optimizer: "muon" needs fewer steps, each of them a little longer.
        batch_size: clips of a step.
        clips: clips to train on, encoded once, before training.
        evaluation_clips: further clips, for evaluation alone.
        clip_chunks: chunks of a clip.
        chunk_frames: latent frames of a chunk; the first chunk is the sink.
        window_chunks: chunks kept besides sink and current chunk.
        patch_size: latent pixels on each side of a token.
        width: of the transformer; heads have 48 channels.
        layers: transformer blocks.
        ffn_width: hidden width of the feed-forward layers.
        text_width: of the text encoder.
        text_layers: of the text encoder.
        text_tokens: longest prompt.
        steps: sampling timesteps before the shift, in (0, 1000].
        shift: timestep shift.
        guidance_scale: of the finished model; 1 is off.
        context_noise: largest noise on the clean context, in standard deviations of the latents, so that
            small errors of the student's own output do not grow.
        first: share of steps on first chunks alone, several times as many: all else follows from them, and
            nothing but the prompt tells what they show.
        first_chunks: first chunks of such a step, in batch sizes.
        redrawn: share of steps whose context the student draws itself, from the true one under noise, so that
            it learns to mend what it gets wrong while streaming.
        without_text: share of clips whose prompt is empty, so that sampling can guide away from it.
        image_start: share of steps with a single first frame, so that a stream can start from an image.
        middle: share of steps with a target far from the start.
        switched: share of steps with a target behind a prompt switch.
        checkpoint_steps: steps between checkpoints.
        evaluate_steps: steps between evaluations.
        seed: of weights, scenes and noise.
        precision: "bf16" is faster where the processor has it.
    """

    vae: str = "runs/vae/vae"
    initial: str | None = None
    total_steps: int = 8000
    learning_rate: float = 1.8e-3
    optimizer: Literal["adamw", "muon"] = "adamw"
    batch_size: int = 16
    clips: int = 3072
    evaluation_clips: int = 64
    clip_chunks: int = 8
    chunk_frames: int = 3
    window_chunks: int = 2
    patch_size: int = 2
    width: int = 192
    layers: int = 6
    ffn_width: int = 768
    text_width: int = 128
    text_layers: int = 2
    text_tokens: int = 32
    steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 12.0
    guidance_scale: float = 3.0
    context_noise: float = 0.15
    first: float = 0.35
    first_chunks: int = 4
    redrawn: float = 0.35
    without_text: float = 0.1
    image_start: float = 0.05
    middle: float = 0.3
    switched: float = 0.1
    checkpoint_steps: int = 200
    evaluate_steps: int = 500
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps}")
        if self.width % 48:
            raise ValueError(f"width must be a multiple of 48, got {self.width}")
        if not self.guidance_scale >= 1:
            raise ValueError(f"guidance_scale must be at least 1 (off), got {self.guidance_scale}")
        least = 2 * (self.window_chunks + 2)
        if self.clip_chunks < least:
            raise ValueError(f"clip_chunks must be at least {least}, got {self.clip_chunks}")
        for name in ("clips", "evaluation_clips"):
            if (count := getattr(self, name)) < SWITCHED_EVERY:
                raise ValueError(f"{name} must be at least {SWITCHED_EVERY}, got {count}")
        for name in ("first", "redrawn", "without_text", "image_start", "middle", "switched"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if (total := self.first + self.image_start + self.middle + self.switched) > 1:
            raise ValueError(
                f"first, image_start, middle and switched must add up to at most 1, got {total:g}"
            )

    def clip_set(self, temporal_ratio: int) -> ClipSet:
        """What it is trained and evaluated on."""
        return ClipSet(
            count=self.clips + self.evaluation_clips,
            chunks=self.clip_chunks,
            chunk_frames=self.chunk_frames,
            temporal_ratio=temporal_ratio,
        )

    @property
    def loop(self) -> LoopSettings:
        """How long and how to optimise."""
        return LoopSettings(
            total_steps=self.total_steps,
            learning_rate=self.learning_rate,
            checkpoint_steps=self.checkpoint_steps,
            evaluate_steps=self.evaluate_steps,
            seed=self.seed,
            precision=self.precision,
            optimizer=self.optimizer,
        )


class Student(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self, settings: StudentTrainingSettings, channels: int, vocabulary_size: int) -> None:
        super().__init__()
        self.transformer = CausalDiT(
            patch_size=(1, settings.patch_size, settings.patch_size),
            num_attention_heads=settings.width // 48,
            attention_head_dim=48,
            in_channels=channels,
            out_channels=channels,
            text_dim=settings.text_width,
            ffn_dim=settings.ffn_width,
            num_layers=settings.layers,
        )
        self.text_encoder = tiny_text_encoder(vocabulary_size, settings.text_width, settings.text_layers)


class StudentTrainee:
    """The student with its objective."""

    def __init__(self, settings: StudentTrainingSettings, clips: ClipSet, latents: Tensor) -> None:
        self.settings = settings
        self.clips = clips
        self.tokenizer = word_tokenizer(vocabulary.words())
        self.latents = latents  # [clips, C, T, h, w]
        self.module = Student(settings, latents.shape[1], len(self.tokenizer))
        if not torch.cuda.is_available():
            _set_attention(self.module, MatmulAttention())

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of the velocity."""
        return self._loss(np.random.default_rng((self.settings.seed, step)), range(self.settings.clips)), {}

    def _loss(self, rng: np.random.Generator, among: range) -> Tensor:
        sequence, clips, caption = self._draw(rng, among)
        device = self.module.transformer.device
        clean = self.latents[clips].to(device, torch.float32)
        captions = [caption(clip, int(rng.integers(_CAPTIONS))) for clip in clips]
        prompted = rng.random(len(clips)) >= self.settings.without_text
        text = self._text([text if kept else "" for text, kept in zip(captions, prompted, strict=True)])
        context = clean[:, :, sequence.clean_frames]
        if sequence.clean and rng.random() < self.settings.redrawn:
            context = self._redraw(context, sequence, text.detach())
        disturbance = torch.rand(len(clean), 1, 1, 1, 1, device=device) * self.settings.context_noise
        context = context + disturbance * torch.randn_like(context)
        target = clean[:, :, sequence.noisy_frames]
        sigma = self._sigma(sequence, len(clips), rng).to(device)  # [B, T noisy]
        noise = torch.randn_like(target)
        level = sigma[:, None, :, None, None]
        noisy = (1 - level) * target + level * noise
        timestep = torch.cat([sigma.new_zeros(len(clean), context.shape[2]), 1000 * sigma], dim=1)
        predicted = self._velocity(torch.cat([context, noisy], dim=2), timestep, text, sequence)
        return (predicted[:, :, context.shape[2] :] - (noise - target)).square().mean()

    def _velocity(self, x: Tensor, timestep: Tensor, text: Tensor, sequence: ForcedSequence) -> Tensor:
        """Velocity of the sequence's frames, or of its first ones if `x` has fewer."""
        frames = x.shape[2]
        velocity: Tensor = self.module.transformer(
            x,
            timestep,
            text,
            frame_positions=sequence.positions[:frames],
            attention_mask=torch.tensor(sequence.mask(), device=x.device)[:frames, :frames],
            return_dict=False,
        )[0]
        return velocity.float()

    @torch.no_grad()
    def _redraw(self, context: Tensor, sequence: ForcedSequence, text: Tensor) -> Tensor:
        """The context as the student predicts it in one step from its noisy version."""
        level = torch.rand(len(context), 1, 1, 1, 1, device=context.device) * _REDRAWN_LEVEL
        noisy = (1 - level) * context + level * torch.randn_like(context)
        timestep = 1000 * level.flatten(1).expand(-1, context.shape[2])
        return noisy - level * self._velocity(noisy, timestep, text, sequence)

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Loss of the averaged weights on fixed batches of clips that are never trained on."""
        trained, self.module = self.module, module  # type: ignore[assignment]
        try:
            torch.manual_seed(self.settings.seed)
            among = range(self.settings.clips, self.clips.count)
            rngs = [
                np.random.default_rng((self.settings.seed, batch)) for batch in range(_EVALUATION_BATCHES)
            ]
            losses = [self._loss(rng, among).item() for rng in rngs]
        finally:
            self.module = trained
        return {"loss": float(np.mean(losses))}

    def _draw(self, rng: np.random.Generator, among: range) -> tuple[ForcedSequence, list[int], Caption]:
        """The sequence of a step, its clips out of `among`, and what gives the caption of its targets."""
        settings, clips, kind = self.settings, self.clips, rng.random()
        if kind < settings.first:
            chosen = [clip for _ in range(settings.first_chunks) for clip in self._choose(among, rng)]
            return from_start([settings.chunk_frames], settings.window_chunks), chosen, clips.caption
        kind -= settings.first
        if kind < settings.switched:
            chosen = self._choose([clip for clip in among if clips.switches(clip)], rng)
            return self._after_switch(rng), chosen, clips.caption_after_switch
        kind -= settings.switched
        if kind < settings.middle:
            chosen = self._choose([clip for clip in among if not clips.switches(clip)], rng)
            return self._middle(rng), chosen, clips.caption
        kind -= settings.middle
        chunks = [settings.chunk_frames] * (settings.window_chunks + 2)
        if kind < settings.image_start:
            chunks[0] = 1
        chosen = self._choose(among, rng)
        return from_start(chunks, settings.window_chunks), chosen, clips.caption

    def _choose(self, clips: Sequence[int], rng: np.random.Generator) -> list[int]:
        return [clips[place] for place in rng.integers(len(clips), size=self.settings.batch_size)]

    def _middle(self, rng: np.random.Generator) -> ForcedSequence:
        """A target whose window begins anywhere behind the sink."""
        size, window = self.settings.chunk_frames, self.settings.window_chunks
        latest = (self.settings.clip_chunks - window - 1) * size
        first = int(rng.integers(size + 1, latest + 1))
        return from_middle([0, *(first + size * place for place in range(window + 1))], size, _TARGET_COPIES)

    def _after_switch(self, rng: np.random.Generator) -> ForcedSequence:
        """A target behind the switch; the sink is the stream's first, or the oldest chunk kept by it."""
        settings, switch = self.settings, self.clips.switch_chunk
        target = int(rng.integers(switch, settings.clip_chunks))
        oldest = switch - int(rng.integers(1, settings.window_chunks + 2))
        window = range(max(target - settings.window_chunks, oldest + 1), target)
        sink = 0 if rng.random() < _KEPT_SINKS else oldest
        starts = [chunk * settings.chunk_frames for chunk in (sink, *window, target)]
        recached = 1 + sum(chunk < switch for chunk in window)
        return from_middle(starts, settings.chunk_frames, _TARGET_COPIES, recached)

    def _sigma(self, sequence: ForcedSequence, clips: int, rng: np.random.Generator) -> Tensor:
        """One noise level for each noisy chunk of each clip, by frame `[B, T noisy]`."""
        size = (clips, len(sequence.noisy))
        levels = np.array([shifted(step / 1000, self.settings.shift) for step in self.settings.steps])
        anywhere = shifted(rng.random(size), self.settings.shift)  # type: ignore[arg-type]
        sigma = np.where(rng.random(size) < _SHARED_LEVELS, rng.choice(levels, size), anywhere)
        lengths = [len(piece.frames) for piece in sequence.noisy]
        return torch.from_numpy(np.repeat(sigma, lengths, axis=1)).float()

    def _text(self, captions: list[str]) -> Tensor:
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=self.settings.text_tokens, return_tensors="pt"
        )
        device = self.module.text_encoder.device
        return embed_tokens(
            tokens.input_ids.to(device), tokens.attention_mask.to(device), self.module.text_encoder
        )


def _set_attention(module: nn.Module, processor: AttentionProcessor) -> None:
    for part in module.modules():
        if isinstance(part, SelfAttention | CrossAttention):
            part.processor = processor


def train_student(settings: StudentTrainingSettings, output: Path) -> None:
    """Encode the clips, train, and continue what `output` already holds; the result is `output`/model."""
    if not (Path(settings.vae) / "config.json").is_file():
        raise ValueError(f"vae must be the folder of a trained VAE, got {settings.vae!r}")
    claim_run(output, settings)
    vae = TinyVideoVAE.from_pretrained(settings.vae, dtype=torch.float32).to(PartialState().device)
    clips = settings.clip_set(vae.spec.temporal_ratio)
    latents = encode_clips(clips, vae, output / _LATENTS_FOLDER, settings.precision)
    torch.manual_seed(settings.seed)
    trainee = StudentTrainee(settings, clips, latents)
    if settings.initial is not None:
        load_initial(trainee.module, Path(settings.initial))
    run(settings.loop, trainee, output)
    export(output, Path(settings.vae), output / _RESULT_FOLDER)
    logger.info("trained model in %s", output / _RESULT_FOLDER)


def load_initial(student: Student, run_folder: Path) -> None:
    """Load the averaged weights of a run; where its patches are of another size, both ends stay random."""
    settings = _saved_settings(run_folder)
    initial = Student(
        settings, student.transformer.config.in_channels, student.text_encoder.config.vocab_size
    )
    load_average(initial, run_folder)
    own = student.state_dict()
    weights = initial.state_dict()
    ends = {name for name in weights if name.startswith(_ENDS) and weights[name].shape != own[name].shape}
    student.load_state_dict({name: own[name] if name in ends else weights[name] for name in weights})


def export(run_folder: Path, vae_folder: Path, folder: Path) -> None:
    """Write the averaged student of a run with its VAE as a pipeline folder, weights in float16."""
    settings = _saved_settings(run_folder)
    tokenizer: PreTrainedTokenizerFast = word_tokenizer(vocabulary.words())
    vae = TinyVideoVAE.from_pretrained(vae_folder, dtype=torch.float16)
    student = Student(settings, vae.spec.latent_channels, len(tokenizer))
    load_average(student, run_folder)
    world = ToyWorld()
    pipe = CausalVideoPipeline(
        tokenizer,
        student.text_encoder.eval().half(),
        student.transformer.eval().half(),
        vae,
        FewStepScheduler(steps=settings.steps, shift=settings.shift),
        chunk_frames=settings.chunk_frames,
        sink_frames=settings.chunk_frames,
        window_frames=settings.window_chunks * settings.chunk_frames,
        positions="window",
        guidance_scale=settings.guidance_scale,
        text_tokens=settings.text_tokens,
        default_height=world.height,
        default_width=world.width,
        default_fps=world.fps,
    )
    partial = folder.with_name(f"{folder.name}.partial")
    pipe.save_pretrained(partial)
    (partial / "model_card.json").write_text(json.dumps(_card(), indent=1) + "\n")
    if (vae_folder / RECORD_FOLDER).is_dir():
        shutil.copytree(vae_folder / RECORD_FOLDER, partial / RECORD_FOLDER)
    for training in _trainings(run_folder):
        write_record(partial, training)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _trainings(run_folder: Path) -> list[Training]:
    """The run and those whose weights it started from, the first one first."""
    settings = _saved_settings(run_folder)
    earlier = [] if settings.initial is None else _trainings(Path(settings.initial))
    name = f"student_{len(earlier) + 1}"
    logs = {name: run_folder / "log.csv"}
    training = Training(
        name=name,
        part="student",
        run=run_folder,
        settings=settings,
        logs=logs,
        steps=steps_taken(run_folder),
    )
    return [*earlier, training]


def _card() -> dict[str, object]:
    """What `genstream models` says of the model."""
    tables = {
        "colours": vocabulary.COLOURS,
        "shapes": vocabulary.SHAPES,
        "sizes": vocabulary.SIZES,
        "motions": {**vocabulary.HEADINGS, **vocabulary.OTHER_MOTIONS},
        "backgrounds": vocabulary.BACKGROUNDS,
    }
    return {
        "name": "toyworld",
        "description": "Coloured shapes that move over a dark background: one or two objects.",
        "vocabulary": {group: list(table) for group, table in tables.items()},
    }


def _saved_settings(run_folder: Path) -> StudentTrainingSettings:
    values = json.loads((run_folder / SETTINGS_NAME).read_text())
    return StudentTrainingSettings(**{**values, "steps": tuple(values["steps"])})
