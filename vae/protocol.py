"""The streaming codec protocol: what every video VAE offers to a stream, and the state it carries."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol, get_args, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from genstream.vae.devices import check_device

Direction = Literal["encode", "decode"]

RGB: Final = 3
"""Channels of frames."""
STATE_FORMAT = 3
_METADATA_KEY = "genstream_vae_state"


@dataclass(frozen=True, kw_only=True)
class VAESpec:
    """What a stream has to know about a VAE.

    Attributes:
        temporal_ratio: frames per latent frame, after the first latent frame, which is one frame.
        spatial_ratio: pixels per latent pixel, along each of height and width.
        latent_channels: channels of a latent.
        memory_latents: how many latent frames back a decoded frame depends on; None if without bound.
        first_frames: frames of the first latent frame.
        first_latents: latent frames that are decoded together at a stream's start.
        chunk_latents: latent frames that are decoded together afterwards, where the model fixes that.
        lookahead_latents: latent frames that must be known behind a frame before it can be decoded.
        exactness: "exact": any chunking equals the whole clip. "partition": equals the whole clip, which is
            itself defined by `first_latents` and `chunk_latents`. "approximate": differs from the whole clip.
            Equal is up to rounding: of adapters, whose exactness is measured, errors of up to the square root
            of the precision of their weights, relative to the largest value, count as that.
    """

    temporal_ratio: int
    spatial_ratio: int
    latent_channels: int
    memory_latents: int | None
    first_frames: int = 1
    first_latents: int = 1
    chunk_latents: int = 1
    lookahead_latents: int = 0
    exactness: Literal["exact", "partition", "approximate"] = "exact"


@dataclass(kw_only=True)
class VAEState:
    """Everything that changes while one stream is encoded or decoded; advanced in place by the VAE.

    A step puts new tensors into `slots` and leaves those of before as they are: `copy.copy` of a state is
    enough to go back to.

    Attributes:
        direction: what the state is for.
        vae: class, settings and weights of the VAE that made it; any other refuses the state.
        batch_size: streams side by side.
        height: pixels.
        width: pixels.
        steps: latent frames produced (encode) or consumed (decode) so far.
        ended: after `flush`; nothing may follow.
        slots: remembered tensors by name.
    """

    direction: Direction
    vae: str
    batch_size: int
    height: int
    width: int
    steps: int = 0
    ended: bool = False
    slots: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory of the remembered tensors in bytes."""
        return sum(slot.nbytes for slot in self.slots.values())

    def advance(self, steps: int, slots: dict[str, Tensor]) -> None:
        """Take over the outcome of a finished step. Called last, so that a failed step changes nothing."""
        self.steps += steps
        self.slots = slots

    def clone(self) -> "VAEState":
        """An independent copy, to fork or rewind a stream."""
        slots = {name: slot.clone() for name, slot in self.slots.items()}
        return VAEState.restore(slots, self.meta())

    def tensors(self) -> dict[str, Tensor]:
        """The remembered tensors by name, to store beside `meta`."""
        return dict(self.slots)

    def meta(self) -> dict[str, Any]:
        """Everything but the tensors, as json values."""
        return {
            "format": STATE_FORMAT,
            "direction": self.direction,
            "vae": self.vae,
            "batch_size": self.batch_size,
            "height": self.height,
            "width": self.width,
            "steps": self.steps,
            "ended": self.ended,
            "slots": sorted(self.slots),
        }

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> "VAEState":
        """The state that `tensors` and `meta` were taken from.

        Raises:
            ValueError: they do not belong together, or are no such.
        """
        if not isinstance(meta, dict) or meta.get("format") != STATE_FORMAT:
            given = meta.get("format") if isinstance(meta, dict) else meta
            raise ValueError(f"VAE state format must be {STATE_FORMAT}, got {given!r}")
        fields = cls(direction="decode", vae="", batch_size=1, height=1, width=1).meta().keys()
        if meta.keys() != fields:
            raise ValueError(f"meta must hold {sorted(fields)}, got {sorted(meta)}")
        _check_meta(meta)
        names = set(meta["slots"])
        missing, unexpected = sorted(names - tensors.keys()), sorted(tensors.keys() - names)
        if missing or unexpected:
            raise ValueError(f"tensors must be those of meta, got {missing} missing, {unexpected} unexpected")
        values = {name: value for name, value in meta.items() if name not in ("format", "slots")}
        return cls(**values, slots=dict(tensors))

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {name: slot.contiguous() for name, slot in self.slots.items()}
        try:
            save_file(tensors, str(path), metadata={_METADATA_KEY: json.dumps(self.meta())})
        except SafetensorError as error:
            raise OSError(f"path {str(path)!r} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "VAEState":
        """Read a state that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is another file, or cut off; or there is no such device.
        """
        device = check_device(device)
        if Path(path).is_dir():
            raise ValueError(f"path must be a file written by VAEState.save, got the folder {str(path)!r}")
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"path must be a whole safetensors file, got {str(path)!r}: {error}") from error
        if _METADATA_KEY not in metadata:
            raise ValueError(f"path must be a file written by VAEState.save, got {str(path)!r}")
        return cls.restore(tensors, json.loads(metadata[_METADATA_KEY]))


def _check_meta(meta: dict[str, Any]) -> None:
    kinds = {
        "vae": str,
        "ended": bool,
        "slots": list,
        **dict.fromkeys(("height", "width", "batch_size"), int),
    }
    for name, kind in {**kinds, "steps": int}.items():
        if type(meta[name]) is not kind or (kind is int and meta[name] < (name != "steps")):
            raise ValueError(f"{name} of a VAE state must be a valid {kind.__name__}, got {meta[name]!r}")
    if meta["direction"] not in get_args(Direction):
        raise ValueError(f"direction must be 'encode' or 'decode', got {meta['direction']!r}")


@runtime_checkable
class StreamingVAE(Protocol):
    """A video VAE that works chunk by chunk; any chunking gives the same result as the whole clip.

    Frames are [B, 3, F, H, W] in [-1, 1], latents [B, C, T, h, w] in the diffusion model's normalised space.
    """

    @property
    def spec(self) -> VAESpec:
        """Ratios and channels."""
        ...

    def init_state(self, direction: Direction, batch_size: int, height: int, width: int) -> VAEState:
        """State of a stream that has not started; size in pixels, dtype and device of the module."""
        ...

    def encode_chunk(self, frames: Tensor, state: VAEState) -> Tensor:
        """Latents that become complete with `frames` (any number, also 0); leftovers wait in `state`."""
        ...

    def decode_chunk(self, latents: Tensor, state: VAEState) -> Tensor:
        """Frames of `latents` (any number, also 0): one for the stream's first latent frame, then r each."""
        ...

    def flush(self, state: VAEState) -> Tensor:
        """What still waits in `state`: a last latent frame (encode) or frames (decode), else length 0.

        The stream is then at its end, and takes nothing more.
        """
        ...

    def encode(self, frames: Tensor) -> Tensor:
        """Latents of a whole clip."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Frames of a whole clip: F = 1 + r (T - 1)."""
        ...
