"""What training teachers and students of the toy world has in common: latents in, a pipeline folder out."""

from __future__ import annotations

import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from genstream.data import vocabulary
from genstream.data.toyworld import ToyWorld
from genstream.io.model_folder import INDEX_NAME, installed_folder, read_json
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler, FlowEulerScheduler
from genstream.training.clips import SWITCHED_EVERY, ClipSet, encode_clips
from genstream.training.denoiser import Denoiser, DenoiserSettings, copy_weights, for_training
from genstream.training.loop import LoopSettings, run, steps_taken
from genstream.training.precision import Precision
from genstream.training.processes import once, own_rng, process, shared_rng
from genstream.training.record import RECORD_FOLDER, Training, claim_run, write_record
from genstream.training.text_encoder import load_text_encoder, text_encoder_folder
from genstream.vae.tiny import TinyVideoVAE

logger = logging.getLogger(__name__)

RESULT_FOLDER = "model"
LATENTS_FOLDER = "latents"
_EVALUATION_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class ModelRunSettings(DenoiserSettings):
    """How a model is trained on the toy world.

    Attributes:
        vae: folder of the VAE whose latents it learns.
        initial: model to start from, or the run that made it; its patches may be of another size, and it may
            have fewer layers. Random weights when None.
        text_encoder: one that `genstream train text` made, or the run that made it; it stays as it is. When
            None the model's own is trained with it.
        total_steps: optimiser steps.
        learning_rate: peak.
        optimizer: "muon" needs fewer steps, each of them a little longer.
        batch_size: clips of a step.
        clips: clips to train on, encoded once, before training.
        evaluation_clips: further clips, for evaluation alone.
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
        if not self.guidance_scale >= 1:
            raise ValueError(f"guidance_scale must be at least 1 (off), got {self.guidance_scale}")
        if not 0 <= self.without_text <= 1:
            raise ValueError(f"without_text must be in [0, 1], got {self.without_text}")
        for name in ("clips", "evaluation_clips"):
            if (count := getattr(self, name)) < SWITCHED_EVERY:
                raise ValueError(f"{name} must be at least {SWITCHED_EVERY}, got {count}")

    def clip_set(self, temporal_ratio: int) -> ClipSet:
        """What it is trained and evaluated on."""
        return ClipSet(
            count=self.clips + self.evaluation_clips,
            chunks=self.clip_chunks,
            chunk_frames=self.chunk_frames,
            temporal_ratio=temporal_ratio,
            size_px=self.size_px,
        )

    @property
    def loop(self) -> LoopSettings:
        """How long and how to optimise."""
        return LoopSettings.of(self)


S = TypeVar("S", bound=ModelRunSettings)


class ModelTrainee(ABC, Generic[S]):
    """A model with its objective on the latents of clips.

    Args:
        settings: of the run.
        clips: to train on, and behind them those for evaluation.
        latents: of all clips, `[clips, C, T, h, w]`.
    """

    def __init__(self, settings: S, clips: ClipSet, latents: Tensor) -> None:
        self.settings = settings
        self.clips = clips
        self.latents = latents
        self.module = for_training(
            Denoiser.new(settings, latents.shape[1]), checkpointing=settings.gradient_checkpointing
        )

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of the velocity."""
        seed = self.settings.seed
        return self._loss(shared_rng(seed, step), own_rng(seed, step), range(self.settings.clips)), {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss on fixed batches of clips that are never trained on."""
        torch.manual_seed(self.settings.seed)
        among = range(self.settings.clips, self.clips.count)
        losses = []
        for batch in range(_EVALUATION_BATCHES):
            shared, own = (np.random.default_rng((self.settings.seed, batch, kind)) for kind in range(2))
            losses.append(self._loss(shared, own, among).item())
        return {"loss": float(np.mean(losses))}

    @abstractmethod
    def _loss(self, shared: np.random.Generator, own: np.random.Generator, among: range) -> Tensor:
        """Loss on a random batch of the clips `among`; `shared` numbers decide how many passes are made."""


def train_model(
    settings: S,
    output: Path,
    build: Callable[[S, ClipSet, Tensor], ModelTrainee[S]],
    export: Callable[[Denoiser, S, Path], None],
) -> None:
    """Train what `build` makes of the clips' latents, continuing what `output` already holds.

    The result is `output`/model, written by `export` from the model, its settings and the run's folder.
    """
    if not (Path(settings.vae) / "config.json").is_file():
        raise ValueError(f"vae must be the folder of a trained VAE, got {settings.vae!r}")
    initial = None if settings.initial is None else Denoiser.of(load_model("initial", settings.initial))
    reader = None
    if settings.text_encoder is not None:
        reader = load_text_encoder(settings.text_encoder, settings.text_width, settings.text_layers)
    once(lambda: claim_run(output, settings))
    clips, latents = load_latents(settings, output)
    torch.manual_seed(settings.seed)
    trainee = build(settings, clips, latents)
    if initial is not None:
        copy_weights(initial, trainee.module)
    if reader is not None:
        trainee.module.text_encoder = reader.requires_grad_(requires_grad=False)
    run(settings.loop, trainee, output)
    once(lambda: export(trainee.module, settings, output))
    logger.info("trained model in %s", output / RESULT_FOLDER)


def load_latents(settings: ModelRunSettings, output: Path) -> tuple[ClipSet, Tensor]:
    """The clips of a run and their latents `[clips, C, T, h, w]`, encoded once for all runs beside it."""
    vae = _load_vae(settings)
    clips = settings.clip_set(vae.spec.temporal_ratio)
    return clips, encode_clips(clips, vae, output.parent / LATENTS_FOLDER, settings.precision)


def load_first_chunks(settings: ModelRunSettings, clips: ClipSet, count: int, output: Path) -> Tensor:
    """Latents `[count, C, T, h, w]` of the first chunks of further clips, whose numbers follow on `clips`."""
    starts = replace(clips, count=count, chunks=1)
    folder = output.parent / LATENTS_FOLDER
    return encode_clips(starts, _load_vae(settings), folder, settings.precision, start=clips.count)


def _load_vae(settings: ModelRunSettings) -> TinyVideoVAE:
    vae: TinyVideoVAE = TinyVideoVAE.from_pretrained(settings.vae, dtype=torch.float32).to(process().device)
    return vae


def model_folder(name: str, given: str) -> Path:
    """Folder of a model that the setting `name` gives, itself or by the run that made it."""
    folder = installed_folder(given) or Path(given)
    for place in (folder, folder / RESULT_FOLDER):
        if (place / INDEX_NAME).is_file():
            return place
    raise ValueError(
        f"{name} must be an installed model or the folder of a model or of a finished run, got {given!r}"
    )


def load_model(name: str, given: str) -> CausalVideoPipeline:
    """The model that the setting `name` gives, in float32."""
    return CausalVideoPipeline.from_pretrained(model_folder(name, given), dtype=torch.float32)


def save_trained(
    trained: Denoiser,
    settings: ModelRunSettings,
    run_folder: Path,
    part: str,
    scheduler: FewStepScheduler | FlowEulerScheduler,
    **stream: object,
) -> None:
    """Write the model of a run as a pipeline folder, with its VAE and the record of its training.

    Args:
        trained: the model.
        settings: of the run.
        run_folder: of the run.
        part: what was trained, as in `genstream train PART`.
        scheduler: the model's denoising steps.
        **stream: how it streams, as in `CausalVideoPipeline`.
    """
    vae_folder = Path(settings.vae)
    vae = TinyVideoVAE.from_pretrained(vae_folder, dtype=torch.float32)
    denoiser = Denoiser.new(settings, vae.spec.latent_channels)
    copy_weights(trained, denoiser)
    pipe = CausalVideoPipeline(
        denoiser.tokenizer,
        denoiser.text_encoder,
        denoiser.transformer,
        vae,
        scheduler,
        text_tokens=settings.text_tokens,
        default_height=settings.size_px,
        default_width=settings.size_px,
        default_fps=ToyWorld().fps,
        guidance_scale=settings.guidance_scale,
        **stream,  # type: ignore[arg-type]
    )
    earlier = [vae_folder]
    if settings.text_encoder is not None:
        earlier.append(text_encoder_folder(settings.text_encoder))
    if settings.initial is not None:
        earlier.append(model_folder("initial", settings.initial))
    name = run_folder.name  # as in the command lines of its descendants
    training = Training(
        name=name,
        part=part,
        run=run_folder,
        settings=settings,
        logs={name: run_folder / "log.csv"},
        steps=steps_taken(run_folder),
    )
    save_model(pipe, run_folder / RESULT_FOLDER, earlier, training)


def save_model(
    pipe: CausalVideoPipeline, folder: Path, ancestors: Sequence[Path], training: Training
) -> None:
    """Write a model as a pipeline folder, weights in float16.

    Args:
        pipe: the model.
        folder: to write to; replaced if it is there.
        ancestors: folders of what it was made from, whose records it keeps.
        training: how it was made.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    # Each alone would warn of what it computes in float32 whatever its weights are stored in.
    parts = (pipe.transformer, pipe.text_encoder, pipe.vae)
    nn.ModuleList([part for part in parts if part is not None]).half()
    pipe.save_pretrained(partial)
    _forget_places(partial)
    (partial / "model_card.json").write_text(json.dumps(_card(), indent=1) + "\n")
    for ancestor in ancestors:
        if (ancestor / RECORD_FOLDER).is_dir():
            shutil.copytree(ancestor / RECORD_FOLDER, partial / RECORD_FOLDER, dirs_exist_ok=True)
    write_record(partial, training)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _forget_places(folder: Path) -> None:
    """Take out where parts were loaded from: a path of this machine says nothing elsewhere."""
    for path in (folder / INDEX_NAME, *folder.glob("*/config.json")):
        content = read_json(path)
        content.pop("_name_or_path", None)
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _card() -> dict[str, object]:
    """What `genstream models` says of the model."""
    return {
        "name": "toyworld",
        "description": "Coloured shapes that move over a dark background: one or two objects.",
        "vocabulary": {f"{name}s": list(words) for name, words in vocabulary.ATTRIBUTES.items()},
    }
