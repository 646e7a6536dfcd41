"""How teachers and students are trained: what they have in common."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from genstream.shapes import check_counts, check_guidance, check_unused
from genstream.training.clips import SWITCHED_EVERY, ClipSet
from genstream.training.denoiser import DenoiserSettings
from genstream.training.loop import LoopSettings
from genstream.training.precision import Precision

_OF_NEW_MODELS = ("vae", "text_encoder", "size_px", *(field.name for field in fields(DenoiserSettings)))


@dataclass(frozen=True, kw_only=True)
class ModelRunSettings(DenoiserSettings):
    """How a model is trained on the toy world, or on a folder of videos.

    Attributes:
        videos: folder, searched with all folders in it, of video files (mp4, mov, mkv, webm, avi, gif) and
            folders of frame_*.png; None for the toy world. The captions of clip.mp4 are the lines of
            clip.txt beside it, those of a folder of frames the lines of FOLDER.txt beside it. What cannot be
            read, has no caption, or is shorter than a clip, is skipped and listed. Architecture, VAE, text
            encoder, tokenizer and size are then those of `initial`; `vae`, `text_encoder`, `size_px`, patch,
            widths, layers and text settings stay at their defaults.
        vae: folder of the VAE whose latents it learns.
        initial: model to start from, or the run that made it; its patches may be of another size, and it may
            have fewer layers. Random weights when None.
        text_encoder: one that `genstream train text` made, or the run that made it; it stays as it is. When
            None the model's own is trained with it, but for that of `initial` with `videos`.
        total_steps: optimiser steps.
        learning_rate: peak.
        optimizer: "muon" needs fewer steps, each of them a little longer.
        batch_size: clips of a step.
        clips: clips to train on, encoded once, before training; of videos the most of them.
        evaluation_clips: further clips, for evaluation alone; those of videos are from videos of their own.
        size_px: side of the toy world's frames.
        clip_chunks: chunks of a clip.
        chunk_frames: latent frames of a chunk.
        shift: timestep shift.
        guidance_scale: of the finished model; 1 is off.
        without_text: share of clips whose prompt is empty, so that sampling can guide away from it.
        checkpoint_steps: steps between checkpoints.
        evaluate_steps: steps between evaluations.
        seed: of weights, scenes and noise.
        precision: "bf16" is faster where the processor has it.
        gradient_checkpointing: compute what lies between blocks twice in place of keeping it.
    """

    videos: str | None = None
    vae: str = "runs/vae/vae"
    initial: str | None = None
    text_encoder: str | None = None
    total_steps: int = 8000
    learning_rate: float = 1.8e-3
    optimizer: Literal["adamw", "muon"] = "adamw"
    batch_size: int = 16
    clips: int = 3072
    evaluation_clips: int = 64
    size_px: int = 128
    clip_chunks: int = 8
    chunk_frames: int = 3
    shift: float = 12.0
    guidance_scale: float = 3.0
    without_text: float = 0.1
    checkpoint_steps: int = 200
    evaluate_steps: int = 500
    seed: int = 0
    precision: Precision = "bf16"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.loop  # checks its part
        check_counts(
            batch_size=self.batch_size,
            size_px=self.size_px,
            clip_chunks=self.clip_chunks,
            chunk_frames=self.chunk_frames,
        )
        check_guidance("guidance_scale", self.guidance_scale)
        if not 0 <= self.without_text <= 1:
            raise ValueError(f"without_text must be in [0, 1], got {self.without_text}")
        # One of the toy world that changes its scene, and others that do not.
        least = SWITCHED_EVERY if self.videos is None else 1
        for name in ("clips", "evaluation_clips"):
            if (count := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {count}")
        if self.videos is not None:
            self._check_initial()

    def _check_initial(self) -> None:
        """What videos are learnt by is another model, as it is."""
        if self.initial is None:
            raise ValueError("initial must be the model to start from where videos are given, got None")
        check_unused(self, _OF_NEW_MODELS, "where videos are given, since initial decides it")

    def clip_set(self, temporal_ratio: int) -> ClipSet:
        """The clips of the toy world that it is trained and evaluated on."""
        return ClipSet(
            count=self.clips + self.evaluation_clips,
            chunks=self.clip_chunks,
            chunk_frames=self.chunk_frames,
            temporal_ratio=temporal_ratio,
            size_px=self.size_px,
            evaluation=self.evaluation_clips,
        )

    @property
    def loop(self) -> LoopSettings:
        """How long and how to optimise."""
        return LoopSettings.of(self)
