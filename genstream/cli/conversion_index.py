"""The index of a model folder that is made of published weights, and how the model streams."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import diffusers

from genstream.cli.components import Component, indexed
from genstream.io.model_folder import INDEX_NAME, read_object
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler, FlowEulerScheduler
from genstream.streaming.presets import find_preset
from genstream.transformer.causal_dit import CausalDiT

DEFAULT_PRESET = "self-forcing"
_SCHEDULER_CONFIG = "scheduler_config.json"
# How Wan 2.1 is sampled by its own code: 81 frames, 50 steps, shift 5, guidance 5.
_WAN_LATENT_FRAMES, _WAN_STEPS, _WAN_SHIFT, _WAN_GUIDANCE = 21, 50, 5.0, 5.0
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


def streaming_of(
    source: Path,
    preset: str | None,
    text_tokens: int,
    config: Mapping[str, Any],
    *,
    is_original: bool,
) -> Streaming:
    """How a model streams: by its preset, or as a folder of ours already says.

    Args:
        source: file or folder of the weights.
        preset: name; None for what a folder of ours or another pipeline says, else the default.
        text_tokens: prompt length, unless a folder of ours says another.
        config: arguments of `CausalDiT`.
        is_original: whether the weights are Wan's own, and not a student's.
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
        scheduler = _indexed_scheduler(source)
        return Streaming(values=values, scheduler=scheduler, note=f"streams as {source.name} does")
    if preset is None and not is_own and (source / "scheduler" / _SCHEDULER_CONFIG).is_file():
        return _as_its_scheduler(source, values)
    if preset is None and is_original:
        return _many_steps(values, _WAN_SHIFT, "as nothing tells that they are a student's weights")
    name = preset or DEFAULT_PRESET
    if is_own and index.get("scheduler", ("", ""))[1] == FewStepScheduler.__name__:
        find_preset(name).check_chunk(name, values["chunk_frames"])
    scheduler = _apply(name, values, config)
    note = f"streams by the preset {name!r}" + ("" if preset else ", as none was given (--preset)")
    return Streaming(values=values, scheduler=scheduler, note=note)


def _indexed_scheduler(source: Path) -> Component:
    if (scheduler := indexed("scheduler", source)) is None:
        raise ValueError(f"{str(source / INDEX_NAME)!r} must name a scheduler; --preset makes one")
    return scheduler


def _as_its_scheduler(source: Path, values: dict[str, Any]) -> Streaming:
    """A pipeline of diffusers is no student."""
    file = source / "scheduler" / _SCHEDULER_CONFIG
    content = read_object(file)
    shift = content.get("flow_shift", content.get("shift", 1.0))
    if not isinstance(shift, int | float) or not shift > 0:
        raise ValueError(f"{str(file)!r} must have a shift above 0, got {shift!r}")
    kind = content.get("_class_name", "scheduler")
    return _many_steps(values, float(shift), f"as its {kind} is no student's")


def _many_steps(values: dict[str, Any], shift: float, why: str) -> Streaming:
    """Whole clips in many guided steps, as Wan makes them."""
    values |= {"chunk_frames": _WAN_LATENT_FRAMES, "window_frames": 0, "guidance_scale": _WAN_GUIDANCE}
    note = (
        f"makes clips of {_WAN_LATENT_FRAMES} latent frames in {_WAN_STEPS} steps at shift {shift:g} with "
        f"guidance {_WAN_GUIDANCE:g}, {why}; for a student convert with --preset"
    )
    scheduler = FlowEulerScheduler(num_steps=_WAN_STEPS, shift=shift)
    return Streaming(values=values, scheduler=_part(scheduler), note=note)


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
    return _part(FewStepScheduler(steps=list(preset.steps), shift=preset.shift, warped=preset.warped))


def _part(scheduler: FewStepScheduler | FlowEulerScheduler) -> Component:
    return Component(
        name="scheduler",
        library="genstream",
        kind=type(scheduler).__name__,
        config={},
        files=(),
        write=scheduler.save_pretrained,
    )
