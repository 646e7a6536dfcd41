"""The index of a model folder that is made of published weights, and how the model streams."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import diffusers

from genstream.cli.components import Component, copied
from genstream.io.model_folder import INDEX_NAME, read_object
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.streaming.presets import find_preset
from genstream.transformer.causal_dit import CausalDiT

DEFAULT_PRESET = "self-forcing"
_PARAMETERS = inspect.signature(CausalVideoPipeline.__init__).parameters
_OPTIONAL_PARTS = CausalVideoPipeline._optional_components
ACCEPTED_PARTS = frozenset(_PARAMETERS)
"""Names of the pipeline's parts, among others."""


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """How a model streams.

    Attributes:
        values: of the pipeline's own settings.
        scheduler: its part.
        note: where both come from.
    """

    values: dict[str, Any]
    scheduler: Component
    note: str

    def index(self, parts: Iterable[Component]) -> dict[str, Any]:
        """Content of the index of a folder with these parts."""
        entries = {part.name: (part.library, part.kind) for part in (*parts, self.scheduler)}
        return {
            "_class_name": CausalVideoPipeline.__name__,
            "_diffusers_version": diffusers.__version__,
            **dict.fromkeys((*_OPTIONAL_PARTS, "vae"), (None, None)),
            "transformer": ("genstream", CausalDiT.__name__),
            **entries,
            **self.values,
        }


def streaming_of(source: Path, preset: str | None, text_tokens: int, config: Mapping[str, Any]) -> Streaming:
    """How a model streams: by its preset, or as a folder of ours already says.

    Args:
        source: file or folder of the weights.
        preset: name; None for what a folder of ours says, else the default.
        text_tokens: prompt length, unless a folder of ours says another.
        config: arguments of `CausalDiT`.
    """
    values = {
        name: parameter.default
        for name, parameter in _PARAMETERS.items()
        if parameter.default is not parameter.empty and name not in _OPTIONAL_PARTS
    }
    values["text_tokens"] = text_tokens
    index = read_object(source / INDEX_NAME) if (source / INDEX_NAME).is_file() else {}
    is_own = index.get("_class_name") == CausalVideoPipeline.__name__
    if is_own:
        values |= {name: value for name, value in index.items() if name in values}
    if is_own and preset is None:
        library, kind = index["scheduler"]
        scheduler = copied("scheduler", library, kind, source / "scheduler")
        return Streaming(values=values, scheduler=scheduler, note=f"streams as {source.name} does")
    name = preset or DEFAULT_PRESET
    scheduler = _apply(name, values, config)
    return Streaming(values=values, scheduler=scheduler, note=f"streams by the preset {name!r}")


def _apply(name: str, values: dict[str, Any], config: Mapping[str, Any]) -> Component:
    """Put a preset's settings into `values`; gives its scheduler."""
    preset = find_preset(name)
    preset.check_channels(name, config["in_channels"], config["out_channels"])
    for setting in fields(preset.settings):
        value = getattr(preset.settings, setting.name)
        if setting.name not in values:
            raise ValueError(f"preset {name!r} sets {setting.name}, which the pipeline does not keep")
        values[setting.name] = value.value if isinstance(value, Enum) else value
    values["engine"] = preset.engine.value
    scheduler = FewStepScheduler(steps=list(preset.steps), shift=preset.shift, warped=preset.warped)
    return Component(
        name="scheduler",
        library="genstream",
        kind=FewStepScheduler.__name__,
        config={},
        files=(),
        write=scheduler.save_pretrained,
    )
