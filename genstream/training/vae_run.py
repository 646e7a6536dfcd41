"""What training a causal VAE and distilling a decoder have in common."""

import csv
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from genstream.shapes import check_not_negative
from genstream.training.loop import LoopSettings
from genstream.training.perceptual import FeatureDistance, load_perceptual
from genstream.training.precision import Precision
from genstream.training.record import Origins
from genstream.training.vae_clips import ClipSettings


@dataclass(frozen=True, kw_only=True)
class VAERunSettings(ClipSettings):
    """How long and how to optimise.

    Attributes:
        total_steps: optimiser steps of the whole run.
        learning_rate: peak, reached after `warmup_steps`; falls to zero along a half cosine.
        warmup_steps: linear warm-up.
        ema_decay: of the averaged weights, which are the result.
        perceptual_weight: of the distance in features of `perceptual_model`; 0 switches it off.
        perceptual_model: folder of a vision model of transformers with its preprocessor_config.json.
        checkpoint_steps: steps between checkpoints.
        evaluate_steps: steps between evaluations.
        log_steps: steps averaged into one row of log.csv.
        precision: "bf16" runs convolutions and matrix products in bfloat16.
    """

    total_steps: int = 10_000
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    ema_decay: float = 0.999
    perceptual_weight: float = 0.0
    perceptual_model: str | None = None
    checkpoint_steps: int = 500
    evaluate_steps: int = 500
    log_steps: int = 20
    precision: Precision = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.loop  # checks its part
        check_not_negative(perceptual_weight=self.perceptual_weight)
        if self.perceptual_weight > 0 and self.perceptual_model is None:
            raise ValueError(
                f"perceptual_model must be given for perceptual_weight = {self.perceptual_weight}, got None"
            )

    @property
    def loop(self) -> LoopSettings:
        """Settings of the training loop."""
        return LoopSettings.of(self)

    @property
    def origins(self) -> Origins:
        """What a VAE is made from."""
        if self.perceptual_weight == 0 or self.perceptual_model is None:
            return Origins(videos=self.videos)
        return Origins(models={"perceptual_model": partial(Path, self.perceptual_model)}, videos=self.videos)

    def perceptual(self, device: torch.device) -> FeatureDistance | None:
        """The perceptual distance, None where it is switched off."""
        if self.perceptual_weight == 0 or self.perceptual_model is None:
            return None
        return load_perceptual(self.perceptual_model, device)


def last_figures(run_folder: Path) -> dict[str, float]:
    """Figures of a finished run's last evaluation."""
    with (run_folder / "evaluation.csv").open(newline="") as file:
        *_, last = csv.DictReader(file)
    return {name: json.loads(value) for name, value in last.items() if name != "step"}
