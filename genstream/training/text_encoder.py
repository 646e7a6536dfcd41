"""Trains the small text encoder on captions alone: each word learns what it is that it speaks of.

Large models come with a text encoder that has read much before it sees a video. A small one that learns only
through the errors of a video model takes words for themselves: of two objects it tells which colours and
shapes there are, but not which belong together.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from genstream.conditioning.text import encode_prompts
from genstream.data import vocabulary
from genstream.data.captions import LONGEST_WORDS, Phrase, phrases
from genstream.data.scene import Scene, Split, sample_scene
from genstream.io.model_folder import check_component, read_object
from genstream.training.components import save_component
from genstream.training.loop import LoopSettings, run, steps_taken
from genstream.training.processes import once, own_rng
from genstream.training.record import Origins, Training, claimed_run, is_finished, write_record
from genstream.training.text import TEXT_HEADS, tiny_text_encoder, word_tokenizer
from genstream.training.vae_run import last_figures

logger = logging.getLogger(__name__)

RESULT_FOLDER = "text_encoder"
_FINITE_MOTIONS = {**vocabulary.HEADINGS, **vocabulary.FINITE_OTHER_MOTIONS}
_UNTOLD = -100
"""What `cross_entropy` passes over."""
_SEEDS = 2**31
_EVALUATION_CAPTIONS = 512


@dataclass(frozen=True, kw_only=True)
class TextTrainingSettings:
    """How a text encoder is trained on captions of the toy world.

    Attributes:
        width: of the embeddings.
        layers: of the encoder.
        tokens: longest prompt.
        pairs: share of captions of two objects.
        total_steps: optimiser steps.
        learning_rate: peak.
        batch_size: captions of a step.
        checkpoint_steps: steps between checkpoints.
        evaluate_steps: steps between evaluations.
        seed: of weights and captions.
    """

    width: int = 128
    layers: int = 2
    tokens: int = 32
    pairs: float = 0.6
    total_steps: int = 2000
    learning_rate: float = 2e-3
    batch_size: int = 64
    checkpoint_steps: int = 500
    evaluate_steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.loop  # checks its part
        for name in ("width", "layers", "tokens", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.width % TEXT_HEADS:
            raise ValueError(f"width must divide by {TEXT_HEADS}, the heads, got {self.width}")
        if self.tokens <= LONGEST_WORDS:
            raise ValueError(
                f"tokens must be more than {LONGEST_WORDS}, the words of the longest caption, "
                f"got {self.tokens}"
            )
        if not 0 <= self.pairs <= 1:
            raise ValueError(f"pairs must be in [0, 1], got {self.pairs}")

    @property
    def loop(self) -> LoopSettings:
        """How long and how to optimise."""
        return LoopSettings.of(self)


class Reader(nn.Module):
    """A text encoder, and what reads out of every word's embedding what the word speaks of.

    Args:
        encoder: text encoder.
    """

    def __init__(self, encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.attributes = nn.ModuleDict(
            {
                name: nn.Linear(encoder.config.d_model, len(words))
                for name, words in vocabulary.ATTRIBUTES.items()
            }
        )


class TextTrainee:
    """A text encoder with its objective.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: TextTrainingSettings) -> None:
        self.settings = settings
        self.tokenizer = word_tokenizer(vocabulary.words())
        self.module = Reader(tiny_text_encoder(len(self.tokenizer), settings.width, settings.layers))

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Sum over the attributes of the cross-entropy at every word of a phrase that tells them."""
        settings, rng = self.settings, own_rng(self.settings.seed, step)
        captions = [
            phrases(_scene(rng, "train", pair=bool(rng.random() < settings.pairs)), rng)
            for _ in range(settings.batch_size)
        ]
        loss, _ = self._read(captions)
        return loss, {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss, and shares that are read right, of captions of two objects; half hold unseen combinations."""
        rng = np.random.default_rng(self.settings.seed)
        captions = [phrases(_scene(rng, "eval", pair=True), rng) for _ in range(_EVALUATION_CAPTIONS)]
        loss, right = self._read(captions)
        return {"loss": loss.item(), **right}

    def _read(self, captions: list[list[Phrase]]) -> tuple[Tensor, dict[str, float]]:
        """Loss, and the share of words out of which each attribute is read."""
        texts = ["".join(phrase.text for phrase in caption) for caption in captions]
        embeds = encode_prompts(texts, self.tokenizer, self.module.encoder, self.settings.tokens)
        labels = [_labels(caption, self.tokenizer, self.settings.tokens) for caption in captions]
        wanted = torch.tensor(labels, device=embeds.device)  # [B, tokens, attributes]
        loss, right = embeds.new_zeros(()), {}
        for place, (name, read) in enumerate(self.module.attributes.items()):
            expected = wanted[..., place].flatten()
            told = expected != _UNTOLD
            logits = read(embeds.flatten(0, 1)[told])
            count = max(1, int(told.sum()))  # no caption of a small batch may tell it
            loss = loss + functional.cross_entropy(logits, expected[told], reduction="sum") / count
            right[name] = int((logits.argmax(1) == expected[told]).sum()) / count
        return loss, right


def train_text_encoder(settings: TextTrainingSettings, output: Path) -> None:
    """Train, and continue what `output` already holds; the result is `output`/text_encoder."""
    if is_finished(output / RESULT_FOLDER, output.name, settings, settings.total_steps, Origins()):
        return
    with claimed_run(output, settings, Origins()):
        torch.manual_seed(settings.seed)
        trainee = TextTrainee(settings)
        run(settings.loop, trainee, output)
        once(lambda: _save(trainee.module.encoder, settings, output))
    once(lambda: logger.info("trained text encoder in %s", output / RESULT_FOLDER))


def text_encoder_folder(given: str) -> Path:
    """Folder of a text encoder, given itself or by the run that made it."""
    for place in (Path(given), Path(given) / RESULT_FOLDER):
        if (place / "config.json").is_file():
            return place
    raise ValueError(
        f"text_encoder must be the folder of a text encoder or of a finished run that trained it, "
        f"got {given!r}"
    )


def load_text_encoder(given: str, width: int, layers: int) -> UMT5EncoderModel:
    """A trained text encoder, in float32.

    Raises:
        ValueError: there is none, or its sizes are others.
    """
    folder = text_encoder_folder(given)
    config = read_object(folder / "config.json")
    if (kind := config.get("model_type")) != UMT5EncoderModel.config_class.model_type:
        raise ValueError(
            f"text_encoder must be the folder of a text encoder, got {given!r}, which holds a "
            f"{config.get('_class_name', kind)}"
        )
    check_component(folder, UMT5EncoderModel.__name__)
    encoder: UMT5EncoderModel = UMT5EncoderModel.from_pretrained(folder, dtype=torch.float32)
    own = (encoder.config.d_model, encoder.config.num_layers)
    if own != (width, layers):
        raise ValueError(
            f"text_encoder must have the model's text_width {width} and text_layers {layers}, "
            f"got {own[0]} and {own[1]} in {given!r}"
        )
    words = len(word_tokenizer(vocabulary.words()))
    if encoder.config.vocab_size != words:
        raise ValueError(
            f"text_encoder must know the {words} tokens of the toy world, got {encoder.config.vocab_size} "
            f"in {given!r}"
        )
    return encoder


def _save(encoder: UMT5EncoderModel, settings: TextTrainingSettings, output: Path) -> None:
    folder = output / RESULT_FOLDER
    save_component(encoder, folder)
    training = Training(
        name=output.name,
        part="text",
        run=output,
        settings=settings,
        logs={output.name: output / "log.csv"},
        steps=steps_taken(output),
        results=last_figures(output),
    )
    write_record(folder, training)


def _scene(rng: np.random.Generator, split: Split, *, pair: bool) -> Scene:
    """A random scene of one object or of two."""
    while True:
        scene = sample_scene(int(rng.integers(_SEEDS)), split)
        if (len(scene.objects) == 2) is pair:
            return scene


def _labels(caption: list[Phrase], tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[list[int]]:
    """For every token the number of each attribute of what it speaks of, where its phrase tells it."""
    labels: list[list[int]] = []
    for phrase in caption:
        count = len(tokenizer(phrase.text, add_special_tokens=False).input_ids)
        labels += [_told(phrase)] * count
    return labels + [[_UNTOLD] * len(vocabulary.ATTRIBUTES)] * (tokens - len(labels))


def _told(phrase: Phrase) -> list[int]:
    text = f" {phrase.text} "
    numbers = []
    for name, words in vocabulary.ATTRIBUTES.items():
        value: str | None = getattr(phrase if name == "background" else phrase.item, name, None)
        number = _UNTOLD
        if value is not None:
            ways = (*words[value], *(_FINITE_MOTIONS[value] if name == "motion" else ()))
            if any(f" {way} " in text for way in ways):
                number = list(words).index(value)
        numbers.append(number)
    return numbers
