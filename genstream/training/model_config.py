"""Models as their folders describe them: what is known of them before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from genstream.io.digest import folder_digest
from genstream.io.model_folder import INDEX_NAME, read_object
from genstream.pipelines.memory import bare_vae
from genstream.streaming.presets import EngineKind
from genstream.streaming.settings import StreamSettings
from genstream.training.starting import model_folder
from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import whole_config
from genstream.vae.protocol import StreamingVAE
from genstream.vae.wrapping import module_of

_STATISTICS = ("latents_mean", "latents_std", "shift_factor", "scaling_factor")
_STREAM = [field.name for field in fields(StreamSettings)]
_DIGITS = 3
"""Of statistics that are compared: published ones have four."""


@dataclass(frozen=True)
class ModelConfig:
    """A model folder's configuration.

    Attributes:
        index: of the pipeline.
        transformer: of the transformer, with its defaults.
        folder: where it is.
    """

    index: Mapping[str, Any]
    transformer: Mapping[str, Any]
    folder: Path

    @classmethod
    def of(cls, name: str, given: str) -> ModelConfig:
        """Of the model that the setting `name` gives, itself or by the run that made it."""
        folder = model_folder(name, given)
        index = read_object(folder / INDEX_NAME)
        return cls(index, whole_config(read_object(folder / "transformer" / "config.json")), folder)

    @property
    def settings(self) -> StreamSettings:
        """How it is run."""
        return StreamSettings(**{name: self.index[name] for name in _STREAM if name in self.index})

    @property
    def engine(self) -> str:
        """What generates its chunks."""
        return str(self.index.get("engine", EngineKind.CACHE))

    @property
    def chunk_frames(self) -> int:
        """Latent frames generated together."""
        return self.settings.chunk_frames

    @property
    def text_tokens(self) -> int:
        """Of the longest prompt."""
        return int(self.index.get("text_tokens", 512))

    def reads_like(self, other: ModelConfig) -> bool:
        """Whether prompts become the same to both, so that one text encoder does for both."""
        return self.text_tokens == other.text_tokens and all(
            self.index.get(part) == other.index.get(part)
            and folder_digest(self.folder / part) == folder_digest(other.folder / part)
            for part in ("text_encoder", "tokenizer")
        )

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width."""
        return self.index["default_height"], self.index["default_width"]

    def transformer_of(self, layers: int | None = None) -> CausalDiT:
        """The transformer without weights, or one like it with so many layers."""
        known = dict(self.transformer) if layers is None else {**self.transformer, "num_layers": layers}
        with torch.device("meta"):
            transformer: CausalDiT = CausalDiT(**known)
        return transformer

    def text_encoder(self) -> nn.Module | None:
        """Likewise."""
        entry = self.index.get("text_encoder", [None, None])
        if entry[1] is None:
            return None
        with torch.device("meta"):
            built: nn.Module = getattr(transformers, entry[1])(
                AutoConfig.from_pretrained(self.folder / "text_encoder")
            )
        return built

    def vae(self) -> StreamingVAE:
        """Likewise."""
        return bare_vae(self.folder)


def check_stream(name: str, model: ModelConfig, followed: Mapping[str, Collection[object]]) -> None:
    """Refuse a model that streams in a way that training does not follow.

    Args:
        name: setting that gives the model.
        model: the model.
        followed: values that are followed, of each setting of its stream that matters.

    Raises:
        ValueError: one of its settings has another value, or its past is made from decoded frames.
    """
    values = {**asdict(model.settings), "engine": model.engine}
    for setting, allowed in followed.items():
        if (value := values[setting]) not in allowed:
            texts = " or ".join(map(_text, allowed))
            raise ValueError(
                f"{setting} of {name} must be {texts}, which training can follow, got {_text(value)}"
            )
    if model.settings.reencodes:
        raise ValueError(
            f"sink_frames of {name} must be above 0 for context 'recompute', which is made from decoded "
            "frames without sinks, and training decodes none; got 0"
        )


def _text(value: object) -> str:
    """A setting's value as it is written; policies and engines by their names."""
    return repr(str(value) if isinstance(value, str) else value)


def check_same_latents(teacher: ModelConfig, student: ModelConfig) -> None:
    """Refuse a teacher that cannot judge what a student makes, as far as their configurations tell.

    Raises:
        ValueError: their latents or their sizes differ, or one needs more than latents and a prompt.
    """
    own, asked = dict(_traits("teacher", teacher)), dict(_traits("initial", student))
    for name in own:
        if name in asked and own[name] != asked[name]:
            raise ValueError(f"teacher must have {name} {asked[name]} like initial, got {own[name]}")


def _traits(name: str, model: ModelConfig) -> Iterator[tuple[str, object]]:
    """What must be the same in both; statistics only where they are told, as weights may hold them."""
    vae = model.vae()
    config: Mapping[str, Any] = module_of(vae).config  # type: ignore[assignment]
    channels, taken = vae.spec.latent_channels, model.transformer["in_channels"]
    if taken != channels:
        raise ValueError(f"{name} must take {channels} channels, those of its latents alone, got {taken}")
    yield "latent_channels", channels
    yield "temporal_ratio", vae.spec.temporal_ratio
    yield "spatial_ratio", vae.spec.spatial_ratio
    yield "default size", "{}x{}".format(*reversed(model.size_px))
    for statistic in _STATISTICS:
        if (value := config.get(statistic)) is not None:
            values = value if isinstance(value, list | tuple) else [value]
            yield statistic, [round(each, _DIGITS) for each in values]
