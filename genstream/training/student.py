"""Trains the embedded causal student on the latents of the toy world.

The student learns the velocity of noisy chunks in clean, slightly disturbed context (teacher forcing),
mostly at the noise levels of its few sampling steps.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from genstream.conditioning.text import embed_tokens
from genstream.data import vocabulary
from genstream.data.toyworld import ToyWorld
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.schedulers.schedule import shifted
from genstream.shapes import frames_of
from genstream.training.forcing import ForcedSequence, from_middle, from_start
from genstream.training.loop import LoopSettings, load_average, run
from genstream.training.text import tiny_text_encoder, word_tokenizer
from genstream.transformer.causal_dit import CausalDiT
from genstream.vae.tiny import TinyVideoVAE

logger = logging.getLogger(__name__)

_LATENTS_FOLDER = "latents"
_SHARD_CLIPS = 64
_EVALUATION_BATCHES = 4
_SHARED_LEVELS = 0.7
"""Share of noisy chunks at the sampling steps' own noise levels; the others are anywhere between."""


@dataclass(frozen=True, kw_only=True)
class StudentTrainingSettings:
    """What the student looks like and how it is trained.

    Attributes:
        vae: folder of the VAE whose latents it learns.
        total_steps: optimiser steps.
        learning_rate: peak.
        batch_size: clips of a step.
        clips: clips encoded once, before training.
        clip_chunks: chunks of a clip.
        chunk_frames: latent frames of a chunk; the first chunk is the sink.
        window_chunks: chunks kept besides sink and current chunk.
        width: of the transformer; heads have 48 channels.
        layers: transformer blocks.
        ffn_width: hidden width of the feed-forward layers.
        text_width: of the text encoder.
        text_layers: of the text encoder.
        text_tokens: longest prompt.
        steps: sampling timesteps before the shift, in (0, 1000].
        shift: timestep shift.
        context_noise: largest noise on the clean context, in standard deviations of the latents, so that
            small errors of the student's own output do not grow.
        image_start: share of steps with a single first frame, so that a stream can start from an image.
        middle: share of steps with a target far from the start.
        checkpoint_steps: steps between checkpoints.
        evaluate_steps: steps between evaluations.
        seed: of weights, scenes and noise.
        precision: "bf16" is faster where the processor has it.
    """

    vae: str
    total_steps: int = 6000
    learning_rate: float = 1.5e-3
    batch_size: int = 16
    clips: int = 3072
    clip_chunks: int = 8
    chunk_frames: int = 3
    window_chunks: int = 2
    width: int = 192
    layers: int = 6
    ffn_width: int = 768
    text_width: int = 128
    text_layers: int = 2
    text_tokens: int = 32
    steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0
    context_noise: float = 0.15
    image_start: float = 0.1
    middle: float = 0.4
    checkpoint_steps: int = 200
    evaluate_steps: int = 500
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        if self.width % 48:
            raise ValueError(f"width must be a multiple of 48, got {self.width}")
        least = self.window_chunks + 3
        if self.clip_chunks < least:
            raise ValueError(f"clip_chunks must be at least {least}, got {self.clip_chunks}")
        for name in ("image_start", "middle"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

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
        )


class Student(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self, settings: StudentTrainingSettings, channels: int, vocabulary_size: int) -> None:
        super().__init__()
        self.transformer = CausalDiT(
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

    def __init__(self, settings: StudentTrainingSettings, latents: Tensor) -> None:
        self.settings = settings
        self.world = ToyWorld()
        self.tokenizer = word_tokenizer(vocabulary.words())
        self.latents = latents  # [clips, C, T, h, w]
        self.module = Student(settings, latents.shape[1], len(self.tokenizer))

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of the velocity."""
        rng = np.random.default_rng((self.settings.seed, step))
        indices = rng.integers(len(self.latents), size=self.settings.batch_size)
        sequence = self._sequence(rng)
        device = self.module.transformer.device
        clean = self.latents[indices].to(device, torch.float32)
        captions = [
            self.world.caption(self.world.scene(int(index)), int(rng.integers(8))) for index in indices
        ]
        context = clean[:, :, sequence.clean_frames]
        disturbance = torch.rand(len(clean), 1, 1, 1, 1, device=device) * self.settings.context_noise
        context = context + disturbance * torch.randn_like(context)
        target = clean[:, :, sequence.noisy_frames]
        sigma = self._sigma(sequence, rng).to(device)  # [B, T noisy]
        noise = torch.randn_like(target)
        level = sigma[:, None, :, None, None]
        noisy = (1 - level) * target + level * noise
        timestep = torch.cat([sigma.new_zeros(len(clean), context.shape[2]), 1000 * sigma], dim=1)
        velocity = self.module.transformer(
            torch.cat([context, noisy], dim=2),
            timestep,
            self._text(captions),
            frame_positions=sequence.positions,
            attention_mask=torch.tensor(sequence.mask(), device=device),
            return_dict=False,
        )[0][:, :, context.shape[2] :]
        loss = (velocity.float() - (noise - target)).square().mean()
        return loss, {}

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Loss of the averaged weights on fixed batches."""
        trained, self.module = self.module, module  # type: ignore[assignment]
        try:
            torch.manual_seed(self.settings.seed)
            # Steps behind the last: their data are never trained on.
            steps = range(self.settings.total_steps, self.settings.total_steps + _EVALUATION_BATCHES)
            losses = [self.loss(step)[0].item() for step in steps]
        finally:
            self.module = trained
        return {"loss": float(np.mean(losses))}

    def _sequence(self, rng: np.random.Generator) -> ForcedSequence:
        settings, kind = self.settings, rng.random()
        chunks = [settings.chunk_frames] * (settings.window_chunks + 2)
        if kind < settings.image_start:
            return from_start([1, *chunks[1:]], settings.window_chunks)
        if kind < settings.image_start + settings.middle:
            first = int(rng.integers(2, settings.clip_chunks - settings.window_chunks))
            return from_middle(first, settings.chunk_frames, settings.window_chunks, copies=3)
        return from_start(chunks, settings.window_chunks)

    def _sigma(self, sequence: ForcedSequence, rng: np.random.Generator) -> Tensor:
        """One noise level for each noisy chunk of each clip, by frame `[B, T noisy]`."""
        size = (self.settings.batch_size, len(sequence.noisy))
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


def train_student(settings: StudentTrainingSettings, output: Path) -> None:
    """Encode the clips, train, and continue what `output` already holds; `export` takes the result."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "settings.json").write_text(json.dumps(asdict(settings), indent=1))
    latents = encode_clips(settings, output / _LATENTS_FOLDER)
    torch.manual_seed(settings.seed)
    run(settings.loop, StudentTrainee(settings, latents), output)


def encode_clips(settings: StudentTrainingSettings, folder: Path) -> Tensor:
    """Latents of all clips `[clips, C, T, h, w]`, float16, in shards that are encoded only once."""
    folder.mkdir(parents=True, exist_ok=True)
    vae = TinyVideoVAE.from_pretrained(settings.vae, dtype=torch.float32)
    world = ToyWorld()
    frames = frames_of(settings.clip_chunks * settings.chunk_frames, vae.spec.temporal_ratio)
    shards = []
    for first in range(0, settings.clips, _SHARD_CLIPS):
        path = folder / f"{first:06d}.safetensors"
        if not path.is_file():
            scenes = range(first, min(first + _SHARD_CLIPS, settings.clips))
            encoded = [_encode_clip(vae, world, seed, frames) for seed in scenes]
            save_file({"latents": torch.cat(encoded)}, path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)
            logger.info("encoded clip %d of %d", scenes.stop, settings.clips)
        shards.append(load_file(path)["latents"])
    return torch.cat(shards)


@torch.no_grad()
def _encode_clip(vae: TinyVideoVAE, world: ToyWorld, seed: int, frames: int) -> Tensor:
    clip = torch.from_numpy(world.frames(world.scene(seed), frames))
    pixels = clip.permute(3, 0, 1, 2)[None].float() / 127.5 - 1  # [1, 3, F, H, W]
    return vae.encode(pixels.to(vae.device)).half().cpu()


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
        FewStepScheduler(settings.steps, settings.shift),
        chunk_frames=settings.chunk_frames,
        sink_frames=settings.chunk_frames,
        window_frames=settings.window_chunks * settings.chunk_frames,
        positions="window",
        text_tokens=settings.text_tokens,
        default_height=world.height,
        default_width=world.width,
        default_fps=world.fps,
    )
    partial = folder.with_name(f"{folder.name}.partial")
    pipe.save_pretrained(partial)
    (partial / "model_card.json").write_text(json.dumps(_card(folder.name), indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _card(name: str) -> dict[str, object]:
    """What `genstream models` says of the model."""
    tables = {
        "colours": vocabulary.COLOURS,
        "shapes": vocabulary.SHAPES,
        "sizes": vocabulary.SIZES,
        "motions": {**vocabulary.HEADINGS, **vocabulary.OTHER_MOTIONS},
        "backgrounds": vocabulary.BACKGROUNDS,
    }
    return {
        "name": name,
        "description": "Coloured shapes that move over a dark background: one or two objects.",
        "vocabulary": {group: list(table) for group, table in tables.items()},
    }


def _saved_settings(run_folder: Path) -> StudentTrainingSettings:
    values = json.loads((run_folder / "settings.json").read_text())
    return StudentTrainingSettings(**{**values, "steps": tuple(values["steps"])})
