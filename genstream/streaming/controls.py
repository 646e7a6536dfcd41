"""Live changes of a stream. They take effect at chunk boundaries, in the order of their sequence numbers."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from genstream.shapes import check_count, check_whole
from genstream.streaming.settings import RecachePolicy
from genstream.transformer.adapters import LoraUse


@dataclass(frozen=True)
class Control:
    """Base of all controls."""


def _check_recache(policy: RecachePolicy | None) -> None:
    if policy is not None and not isinstance(policy, RecachePolicy):
        raise ValueError(
            f"recache must be one of {[str(each) for each in RecachePolicy]} as RecachePolicy, got {policy!r}"
        )


@dataclass(frozen=True, kw_only=True)
class PromptControl(Control):
    """Continue with another prompt.

    Attributes:
        prompt: the new prompt, for every element of the batch; empty where its embeddings are given.
        prompt_embeds: `[1 or B, text_tokens, text_dim]` instead.
        recache: what happens to the kept keys and values, so that the past no longer speaks for the old
            prompt; the model's own way when None.
        blend_chunks: chunks over which the prompt embedding moves from the old to the new; 1 switches
            at once.
    """

    prompt: str = ""
    prompt_embeds: Tensor | None = field(default=None, compare=False)
    recache: RecachePolicy | None = None
    blend_chunks: int = 1

    def __post_init__(self) -> None:
        if self.prompt_embeds is not None:
            if self.prompt:
                raise ValueError("prompt and prompt_embeds exclude each other, got both")
            if not isinstance(self.prompt_embeds, Tensor):
                kind = type(self.prompt_embeds).__name__
                raise ValueError(f"prompt_embeds must be a tensor [1 or B, tokens, C], got {kind}")
            if self.prompt_embeds.ndim != 3 or not bool(self.prompt_embeds.isfinite().all()):
                raise ValueError(
                    f"prompt_embeds must be finite [B, tokens, C], got {list(self.prompt_embeds.shape)}"
                )
        elif not isinstance(self.prompt, str):
            raise ValueError(f"prompt must be one text for the whole batch, got {self.prompt!r}")
        elif not self.prompt.strip():
            raise ValueError("prompt must not be empty")
        check_count("blend_chunks", self.blend_chunks)
        object.__setattr__(self, "blend_chunks", int(self.blend_chunks))
        _check_recache(self.recache)


@dataclass(frozen=True, kw_only=True)
class LoraControl(Control):
    """Continue with one loaded LoRA, with several, or with none.

    The prompt is embedded anew by the changed weights. Only this stream changes: others on the same weights
    go on with theirs.

    Attributes:
        name: of a loaded LoRA, or of several, which replace all that are in use: a student whose own LoRA was
            kept apart needs it beside another. None for the model alone.
        scale: factor on what each adds to the weights, or one for each; 1 is as it was trained.
        recache: what happens to the kept keys and values, so that the past no longer speaks for the old
            weights; the model's own way when None. Where nothing happens, the change comes gradually, as the
            old past leaves the window; a past that is built anew for every chunk follows at once.
    """

    name: str | Sequence[str] | None
    scale: float | Sequence[float] = 1.0
    recache: RecachePolicy | None = None

    def __post_init__(self) -> None:
        for given in ("name", "scale"):
            if isinstance(value := getattr(self, given), list):
                object.__setattr__(self, given, tuple(value))
        if self.name is None and self.scale != 1.0:
            raise ValueError(f"scale needs the name of a LoRA, got {self.scale} and no name")
        names = [use.name for use in self.uses]
        if len(set(names)) < len(names):
            raise ValueError(f"name must hold each LoRA once, got {names}")
        _check_recache(self.recache)

    @property
    def uses(self) -> tuple[LoraUse, ...]:
        """The LoRAs, each with its scale."""
        if self.name is None:
            return ()
        names = (self.name,) if isinstance(self.name, str) else tuple(self.name)
        scales = tuple(self.scale) if isinstance(self.scale, Sequence) else (self.scale,) * len(names)
        if len(scales) != len(names):
            raise ValueError(f"scale must be one number, or one for each of {len(names)}, got {len(scales)}")
        return tuple(LoraUse(name=name, scale=scale) for name, scale in zip(names, scales, strict=True))


@dataclass(frozen=True)
class PauseControl(Control):
    """Generate nothing until resumed."""


@dataclass(frozen=True)
class ResumeControl(Control):
    """Go on after a pause."""


@dataclass(frozen=True)
class StopControl(Control):
    """End the stream."""


@dataclass(frozen=True)
class ResetControl(Control):
    """Forget the past and start anew with the current prompt.

    Attributes:
        seed: seed of the new start, in [0, 2^63); None repeats the request's own noise.
    """

    seed: int | None = None

    def __post_init__(self) -> None:
        if self.seed is not None:
            check_whole("seed", self.seed)
            if not 0 <= self.seed < 2**63:
                raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")


_KINDS: dict[str, type[Control]] = {
    kind.__name__: kind
    for kind in (PromptControl, LoraControl, PauseControl, ResumeControl, StopControl, ResetControl)
}


@dataclass(frozen=True)
class Submitted:
    """A control on its way.

    Attributes:
        sequence: number given by the stream, counted from 1.
        control: what is to change.
        not_before: it waits for the first chunk that starts at or after this frame.
    """

    sequence: int
    control: Control
    not_before: int = 0


@dataclass(frozen=True)
class Applied:
    """A control that took effect.

    Attributes:
        sequence: its number.
        control: what changed.
        frame: first frame that it could change, counted over the whole stream.
    """

    sequence: int
    control: Control
    frame: int


def to_json(control: Control) -> dict[str, Any]:
    """A control as plain values."""
    values = {each.name: getattr(control, each.name) for each in fields(control)}
    embeds = values.get("prompt_embeds")
    if embeds is not None:
        data = embeds.detach().float().cpu().contiguous().numpy().tobytes()
        values["prompt_embeds"] = {"shape": list(embeds.shape), "float32": b64encode(data).decode()}
    return {"kind": type(control).__name__, **values}


def from_json(values: dict[str, Any]) -> Control:
    """The control that `to_json` wrote.

    Raises:
        ValueError: the kind is unknown.
    """
    kind = values.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"control kind must be one of {sorted(_KINDS)}, got {kind!r}")
    given = {name: value for name, value in values.items() if name != "kind"}
    if given.get("recache") is not None:
        given["recache"] = RecachePolicy(given["recache"])
    if (embeds := given.get("prompt_embeds")) is not None:
        data = torch.frombuffer(bytearray(b64decode(embeds["float32"])), dtype=torch.float32)
        given["prompt_embeds"] = data.view(embeds["shape"])
    return _KINDS[kind](**given)
