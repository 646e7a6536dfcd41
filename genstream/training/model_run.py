"""What training teachers and students has in common: latents in, a pipeline folder out."""

from __future__ import annotations

import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from genstream.data import vocabulary
from genstream.io.errors import writing
from genstream.io.model_folder import CARD_NAME, INDEX_NAME, RESULT_FOLDER, read_json, read_object
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler, FlowEulerScheduler
from genstream.shapes import frames_of
from genstream.streaming.presets import EngineKind
from genstream.streaming.settings import StreamSettings
from genstream.training.clips import Clips, ClipSet, encode_clips
from genstream.training.denoiser import Denoiser, copy_weights, for_training
from genstream.training.loop import run, steps_taken
from genstream.training.model_settings import ModelRunSettings
from genstream.training.precision import Precision
from genstream.training.processes import once, own_rng, process, shared_rng
from genstream.training.record import (
    RECORD_FOLDER,
    Origins,
    Training,
    claimed_run,
    is_finished,
    write_record,
)
from genstream.training.starting import (
    load_latents_vae,
    model_folder,
    new_model,
    starting_model,
)
from genstream.training.text_encoder import text_encoder_folder
from genstream.training.video_clips import CAPTION_SUFFIX, ClipGeometry, VideoClips, find_clips
from genstream.vae.loading import component_folder
from genstream.vae.wrapping import module_of

logger = logging.getLogger(__name__)

LATENTS_FOLDER = "latents"
_EVALUATION_BATCHES = 4


S = TypeVar("S", bound=ModelRunSettings)


class ModelTrainee(ABC, Generic[S]):
    """A model with its objective on the latents of clips.

    Args:
        settings: of the run.
        module: with weights to start from.
        clips: to train on, and behind them those for evaluation.
        latents: of all clips, `[clips, C, T, h, w]`.
    """

    def __init__(self, settings: S, module: Denoiser, clips: Clips, latents: Tensor) -> None:
        self.settings = settings
        self.clips = clips
        self.latents = latents
        self.module = for_training(module, checkpointing=settings.gradient_checkpointing)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of the velocity."""
        seed = self.settings.seed
        among = range(self.clips.count - self.clips.evaluation)
        return self._loss(shared_rng(seed, step), own_rng(seed, step), among), {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss on fixed batches of clips that are never trained on."""
        torch.manual_seed(self.settings.seed)
        among = range(self.clips.count - self.clips.evaluation, self.clips.count)
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
    build: Callable[[S, Denoiser, Clips, Tensor], ModelTrainee[S]],
    export: Callable[[Denoiser, S, Path], None],
) -> None:
    """Train what `build` makes of a model and the clips' latents, continuing what `output` already holds.

    The result is `output`/model, written by `export` from the model, its settings and the run's folder.
    """
    origins = _origins(settings)
    if is_finished(output / RESULT_FOLDER, output.name, settings, settings.total_steps, origins):
        return
    pipe = starting_model(settings)
    clips = _clips(settings, pipe)
    with claimed_run(output, settings, origins):
        clips, latents = encode_readable(clips, pipe, output.parent / LATENTS_FOLDER, settings.precision)
        trainee = build(settings, Denoiser.of(pipe), clips, latents)
        del pipe  # with its VAE, which has done its work
        run(settings.loop, trainee, output)
        once(lambda: export(trainee.module, settings, output))
    once(lambda: logger.info("trained model in %s", output / RESULT_FOLDER))


def _clips(settings: ModelRunSettings, pipe: CausalVideoPipeline) -> Clips:
    """What a model is trained and evaluated on."""
    if settings.videos is None:
        return settings.clip_set(pipe.streaming_vae.spec.temporal_ratio)
    length = (settings.clip_chunks, settings.chunk_frames)
    return clips_for(pipe, settings.videos, length, settings.clips, settings.evaluation_clips)


def clips_for(
    pipe: CausalVideoPipeline,
    videos: str,
    length: tuple[int, int],
    most: int,
    evaluation: int,
    others: Sequence[CausalVideoPipeline] = (),
) -> VideoClips:
    """Clips of videos that a model can be shown: of its size, with captions that it can read.

    Args:
        pipe: the model.
        videos: their folder.
        length: chunks of a clip, and latent frames of a chunk.
        most: of clips to train on.
        evaluation: further clips.
        others: models that read the captions too.
    """
    chunks, chunk_frames = length
    geometry = ClipGeometry(
        chunks=chunks,
        frames=frames_of(chunks * chunk_frames, pipe.streaming_vae.spec.temporal_ratio),
        height=pipe.config.default_height,
        width=pipe.config.default_width,
    )
    clips = find_clips(videos, geometry, most, evaluation)
    clips.check_captions([(each.tokenizer, each.config.text_tokens) for each in (pipe, *others)])
    once(lambda: clips.tell(pipe.config.default_fps))
    return clips


def encode_readable(
    clips: Clips, pipe: CausalVideoPipeline, folder: Path, precision: Precision
) -> tuple[Clips, Tensor]:
    """Those of the clips that can be read, and their latents, as `encode_clips` makes them."""
    module_of(pipe.vae).to(process().device)
    latents = encode_clips(clips, pipe.streaming_vae, folder, precision)
    return clips.readable(latents) if isinstance(clips, VideoClips) else (clips, latents)


def load_first_chunks(settings: ModelRunSettings, clips: ClipSet, count: int, output: Path) -> Tensor:
    """Latents `[count, C, T, h, w]` of the first chunks of further clips, whose numbers follow on `clips`."""
    starts = replace(clips, count=count, chunks=1)
    vae = load_latents_vae(settings)
    module_of(vae).to(process().device)
    return encode_clips(starts, vae, output.parent / LATENTS_FOLDER, settings.precision, start=clips.count)


def save_trained(
    trained: Denoiser,
    settings: ModelRunSettings,
    run_folder: Path,
    part: str,
    scheduler: FewStepScheduler | FlowEulerScheduler,
    stream: StreamSettings,
) -> None:
    """Write the model of a run as a pipeline folder, with its VAE and the record of its training.

    Args:
        trained: the model.
        settings: of the run.
        run_folder: of the run.
        part: what was trained, as in `genstream train PART`.
        scheduler: the model's denoising steps.
        stream: how it streams.
    """
    pipe = new_model(settings)
    copy_weights(trained, Denoiser.of(pipe))
    pipe.scheduler = scheduler
    values = asdict(stream).items()
    pipe.register_to_config(
        engine=str(EngineKind.CACHE),
        **{name: str(value) if isinstance(value, str) else value for name, value in values},
    )
    name = run_folder.name  # as in the command lines of its descendants
    training = Training(
        name=name,
        part=part,
        run=run_folder,
        settings=settings,
        logs={name: run_folder / "log.csv"},
        steps=steps_taken(run_folder),
    )
    card = _toyworld_card() if settings.videos is None else _video_card(settings, name)
    save_model(pipe, run_folder / RESULT_FOLDER, _origins(settings), training, card)


def _origins(settings: ModelRunSettings) -> Origins:
    """What a model is made from."""
    models: dict[str, Callable[[], Path]] = {}
    if settings.videos is None:
        models["vae"] = partial(component_folder, settings.vae)
    if settings.text_encoder is not None:
        models["text_encoder"] = partial(text_encoder_folder, settings.text_encoder)
    if settings.initial is not None:
        models["initial"] = partial(model_folder, "initial", settings.initial)
    return Origins(models=models, videos=settings.videos, beside_videos=(CAPTION_SUFFIX,))


def save_model(
    pipe: CausalVideoPipeline,
    folder: Path,
    origins: Origins,
    training: Training,
    card: Mapping[str, object] | None,
) -> None:
    """Write a model as a pipeline folder, weights in float16.

    Args:
        pipe: the model.
        folder: to write to; replaced if it is there.
        origins: what it was made from; it keeps the records of the models.
        training: how it was made.
        card: what `genstream models` says of it; None for its name alone.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    # Each alone would warn of what it computes in float32 whatever its weights are stored in.
    parts = (pipe.transformer, pipe.text_encoder, pipe.vae)
    nn.ModuleList([part for part in parts if part is not None]).half()
    with writing(folder):
        pipe.save_pretrained(partial)
    _forget_places(partial)
    if card is not None:
        (partial / CARD_NAME).write_text(json.dumps(card, indent=1) + "\n")
    for find in origins.models.values():
        if (record := find() / RECORD_FOLDER).is_dir():
            shutil.copytree(record, partial / RECORD_FOLDER, dirs_exist_ok=True)
    write_record(partial, training)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def card_of(folder: Path) -> dict[str, object] | None:
    """The card of a model, to take over; None where it has none."""
    path = folder / CARD_NAME
    return read_object(path) if path.is_file() else None


def _forget_places(folder: Path) -> None:
    """Take out where parts were loaded from: a path of this machine says nothing elsewhere."""
    for path in (folder / INDEX_NAME, *folder.glob("*/config.json")):
        content = read_json(path)
        content.pop("_name_or_path", None)
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def knows_toyworld(folder: Path) -> bool:
    """Whether a model shows the toy world, as far as its card tells; without one it may."""
    card = card_of(folder)
    return card is None or card.get("description") == _toyworld_card()["description"]


def _toyworld_card() -> dict[str, object]:
    return {
        "name": "toyworld",
        "description": "Coloured shapes that move over a dark background: one or two objects.",
        "vocabulary": {f"{name}s": list(words) for name, words in vocabulary.ATTRIBUTES.items()},
    }


def _video_card(settings: ModelRunSettings, name: str) -> dict[str, object]:
    """Of a model that knows the words of the one it started from, but has learnt to show something else."""
    assert settings.initial is not None
    before = card_of(model_folder("initial", settings.initial)) or {}
    return {
        "name": name,
        "description": "Learnt from a folder of videos; training/ tells what it was made from.",
        "vocabulary": before.get("vocabulary", {}),
    }
