"""Latent statistics: the one place where latents are normalised."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentScale:
    """Maps a VAE's raw latents to those of the diffusion model and back: latent = (raw - mean) / std.

    Attributes:
        mean: [1, C or 1, N, 1, 1], for latent frames 0 to N - 1; the last one counts from then on.
        std: like `mean`.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if self.mean.shape != self.std.shape:
            raise ValueError(
                f"mean must have the shape of std {list(self.std.shape)}, got {list(self.mean.shape)}"
            )
        if bool((self.std == 0).any()):
            raise ValueError("std must not be 0 for any channel")

    @classmethod
    def uniform(cls, factor: float, shift: float = 0.0) -> "LatentScale":
        """One factor for all channels: latent = (raw - shift) * factor."""
        return cls.per_channel([shift], [1.0], 1, factor)

    @classmethod
    def per_channel(
        cls, mean: Sequence[float], std: Sequence[float], channels: int, factor: float = 1.0
    ) -> "LatentScale":
        """Of each channel: latent = (raw - mean) * factor / std."""
        for name, values in (("latents_mean", mean), ("latents_std", std)):
            if len(values) != channels:
                raise ValueError(
                    f"{name} must be a number for each of {channels} channels, got {len(values)}"
                )
        return cls.per_frame(mean, std, channels, factor)

    @classmethod
    def per_frame(
        cls, mean: Sequence[float], std: Sequence[float], channels: int, factor: float = 1.0
    ) -> "LatentScale":
        """Of each channel and, from the first on, of each latent frame, channels one after another."""
        for name, values in (("latents_mean", mean), ("latents_std", std)):
            if not values or len(values) % channels:
                raise ValueError(f"{name} must be as many for each of {channels} channels, got {len(values)}")
        shape = (1, channels, -1, 1, 1)
        means = torch.tensor(mean, dtype=torch.float64).reshape(shape)
        return cls(means, torch.tensor(std, dtype=torch.float64).reshape(shape) / factor)

    def normalised(self, raw: Tensor, first: int) -> Tensor:
        """Latents of raw latents [B, C, T, h, w] that begin at latent frame `first` of the stream."""
        return (raw - self._at(self.mean, raw, first)) / self._at(self.std, raw, first)

    def raw(self, latents: Tensor, first: int) -> Tensor:
        """Raw latents of latents [B, C, T, h, w] that begin at latent frame `first` of the stream."""
        return latents * self._at(self.std, latents, first) + self._at(self.mean, latents, first)

    def _at(self, values: Tensor, like: Tensor, first: int) -> Tensor:
        frames = torch.arange(first, first + like.shape[2]).clamp(max=values.shape[2] - 1)
        return values[:, :, frames].to(like)
