"""Where the noise of a stream comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor

from genstream.shapes import check_whole


class NoiseSource(Protocol):
    """Noise of a request as a function of place, so that it needs no position of its own.

    `SeededNoise` draws it, `GivenNoise` holds tensors.
    """

    def initial(self, start: int, shape: Sequence[int]) -> Tensor:
        """Initial noise of the chunk at latent frame `start`; float32 `[B, C, T, h, w]` on the CPU."""

    def fresh(self, start: int, step: int, shape: Sequence[int]) -> Tensor:
        """The sample that noises the chunk at `start` afresh after denoising step `step`."""

    def meta(self) -> dict[str, object]:
        """What identifies the source in a snapshot."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it holds, for a snapshot."""


@dataclass(frozen=True)
class SeededNoise:
    """Gaussian noise from one seed for each element of the batch.

    Every draw has its own generator, seeded by (seed, chunk, step), so draws do not depend on what was
    drawn before, on the batch around them, or on the device.

    Attributes:
        seeds: one for each element of the batch, in [0, 2^63).
    """

    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for seed in self.seeds:
            check_whole("seed", seed)
            if not 0 <= seed < 2**63:
                raise ValueError(f"seed must be in [0, 2^63), got {seed}")

    def initial(self, start: int, shape: Sequence[int]) -> Tensor:
        """Initial noise of the chunk at latent frame `start`."""
        return self._draw(start, 0, shape)

    def fresh(self, start: int, step: int, shape: Sequence[int]) -> Tensor:
        """Noise between denoising steps `step` and `step + 1`."""
        return self._draw(start, step + 1, shape)

    def meta(self) -> dict[str, object]:
        """The seeds."""
        return {"seeds": list(self.seeds)}

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def _draw(self, start: int, draw: int, shape: Sequence[int]) -> Tensor:
        if shape[0] != len(self.seeds):
            raise ValueError(f"seed: one is needed for each of {shape[0]} prompts, got {len(self.seeds)}")
        return torch.stack([_gaussian(f"{seed} {start} {draw}", shape[1:]) for seed in self.seeds])


@dataclass(frozen=True, eq=False)
class GivenNoise:
    """Noise from tensors.

    Attributes:
        noise: initial noise `[B, C, T, h, w]` of latent frames 0 .. T - 1.
        renoise: for each denoising step but the last, samples shaped like `noise`.
        first_frame: latent frame that `noise` starts at.
    """

    noise: Tensor
    renoise: tuple[Tensor, ...] = ()
    first_frame: int = 0

    def initial(self, start: int, shape: Sequence[int]) -> Tensor:
        """The slice of `noise` for the chunk."""
        return self._cut("noise", self.noise, start, shape)

    def fresh(self, start: int, step: int, shape: Sequence[int]) -> Tensor:
        """The slice of `renoise[step]` for the chunk."""
        if step >= len(self.renoise):
            raise ValueError(
                f"renoise: denoising step {step} needs a tensor, only {len(self.renoise)} were given"
            )
        return self._cut(f"renoise[{step}]", self.renoise[step], start, shape)

    def meta(self) -> dict[str, object]:
        """How many tensors there are and where they start."""
        return {"renoise": len(self.renoise), "first_frame": self.first_frame}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors."""
        return {"noise": self.noise, **{f"renoise.{step}": x for step, x in enumerate(self.renoise)}}

    def _cut(self, name: str, tensor: Tensor, start: int, shape: Sequence[int]) -> Tensor:
        first = start - self.first_frame
        cut = tensor[:, :, first : first + shape[2]]
        if first < 0 or cut.shape != torch.Size(shape):
            raise ValueError(
                f"{name} must hold {list(shape)} from latent frame {start}, "
                f"got {list(tensor.shape)} from frame {self.first_frame}"
            )
        return cut.float()


def restore_noise(meta: Mapping[str, object], tensors: Mapping[str, Tensor]) -> NoiseSource:
    """The source that a snapshot describes."""
    if "seeds" in meta:
        return SeededNoise(tuple(meta["seeds"]))  # type: ignore[arg-type]
    renoise = tuple(tensors[f"renoise.{step}"] for step in range(int(str(meta["renoise"]))))
    return GivenNoise(tensors["noise"], renoise, int(str(meta["first_frame"])))


def _gaussian(key: str, shape: Sequence[int]) -> Tensor:
    seed = int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) >> 1
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator)
