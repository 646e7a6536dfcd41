"""Losses of video VAEs. Each stands alone; `VAEObjective` adds up those that are switched on."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genstream.shapes import check_not_negative
from genstream.training.vae_windows import Window
from genstream.vae.causal import CausalVideoVAE, Posterior
from genstream.vae.layers import to_images

_ADAPTIVE_EPS = 1e-4
_LARGEST_ADAPTIVE_WEIGHT = 1e8

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Distance of two batches of images [N, 3, H, W] in [-1, 1], such as LPIPS."""
VisionEncoder = Callable[[Tensor], Tensor]
"""Features [N, D, h, w] of images [N, 3, H, W] in [-1, 1], such as those of DINOv2."""


def kl_divergence(posterior: Posterior) -> Tensor:
    """KL divergence to a standard normal: sum over a clip's latents of (mean^2 + var - 1 - ln var) / 2.

    The mean over clips; weights near 1e-6 are usual.
    """
    if posterior.log_variance is None:
        raise ValueError("posterior must have a variance, got one of deterministic latents")
    mean, log_variance = posterior.mean, posterior.log_variance
    each = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return each.flatten(1).sum(dim=1).mean()


def haar_bands(frames: Tensor) -> Tensor:
    """One level of the 2-D Haar transform, scaled such that the low band is the average of 2x2 pixels.

    Returns:
        [4, ..., H/2, W/2] of `frames` [..., H, W]: low, horizontal, vertical and diagonal detail.
    """
    if frames.shape[-2] % 2 or frames.shape[-1] % 2:
        raise ValueError(f"frames must have even height and width, got {list(frames.shape[-2:])}")
    top, bottom = frames[..., 0::2, :], frames[..., 1::2, :]
    a, b, c, d = top[..., 0::2], top[..., 1::2], bottom[..., 0::2], bottom[..., 1::2]
    return torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d]) / 4


def wavelet_loss(reconstruction: Tensor, frames: Tensor, levels: int = 2) -> Tensor:
    """Frequency-aware loss: the mean absolute errors of the bands of a Haar pyramid, added up.

    After FA-VAE (2509.05441), which treats bands apart: each counts alike, however small its coefficients,
    so that fine detail is not outvoted.

    Args:
        reconstruction: [..., H, W].
        frames: likewise; height and width divide by 2 ** levels.
        levels: of the pyramid.
    """
    low = reconstruction - frames
    total = low.new_zeros(())
    for _ in range(levels):
        low, *details = haar_bands(low)
        total = total + sum(detail.abs().mean() for detail in details)
    return total + low.abs().mean()


def marginal_cosine_loss(projected: Tensor, features: Tensor, margin: float = 0.5) -> Tensor:
    """Mean over places of max(0, 1 - margin - cos(projected, features)) (VA-VAE, 2501.01423).

    Args:
        projected: [N, D, h, w] latents, brought to the width of the features.
        features: likewise.
        margin: cosine distance that costs nothing.
    """
    cosine = F.cosine_similarity(projected, features, dim=1)
    return F.relu(1 - margin - cosine).mean()


def distance_matrix_loss(latents: Tensor, features: Tensor, margin: float = 0.25) -> Tensor:
    """Mean over pairs of places of max(0, |cos of latents - cos of features| - margin) (VA-VAE, 2501.01423).

    Args:
        latents: [N, C, h, w].
        features: [N, D, h, w].
        margin: difference that costs nothing.
    """
    difference = _cosines(latents) - _cosines(features)
    return F.relu(difference.abs() - margin).mean()


def adaptive_weight(reference: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
    """Factor that lets `loss` pull on `weight` as hard as `reference`: the ratio of their gradients' norms.

    VA-VAE (2501.01423) takes the encoder's last layer. At most 1e8, and no gradient flows through the factor.
    """
    norms = [torch.autograd.grad(value, weight, retain_graph=True)[0].norm() for value in (reference, loss)]
    factor: Tensor = (norms[0] / (norms[1] + _ADAPTIVE_EPS)).clamp(max=_LARGEST_ADAPTIVE_WEIGHT)
    return factor.detach()


def psnr_db(error: Tensor) -> float:
    """Peak signal-to-noise ratio of errors between frames in [-1, 1], whose peak is 2."""
    return 10 * math.log10(4 / max(error.detach().square().mean().item(), 1e-12))


def _cosines(vectors: Tensor) -> Tensor:
    """Cosine of every pair of places of [N, C, h, w]: [N, h*w, h*w]."""
    unit = F.normalize(vectors.flatten(2), dim=1)
    return unit.transpose(1, 2) @ unit


class VisionAlignment(nn.Module):
    """Pulls latents towards the features of a vision encoder, so that diffusion learns them faster (VA-VAE).

    Args:
        latent_channels: of the VAE.
        feature_channels: of the vision encoder.
        temporal_ratio: of the VAE.
        vision_encoder: frozen; its features are resampled to the latents' size.
        cosine_margin: of `marginal_cosine_loss`.
        distance_margin: of `distance_matrix_loss`.
    """

    def __init__(
        self,
        latent_channels: int,
        feature_channels: int,
        temporal_ratio: int,
        vision_encoder: VisionEncoder,
        cosine_margin: float = 0.5,
        distance_margin: float = 0.25,
    ) -> None:
        super().__init__()
        self.projection = nn.Conv2d(latent_channels, feature_channels, 1, bias=False)
        self.temporal_ratio = temporal_ratio
        # In a tuple: an encoder that is a module must not become a part of this one, which is trained.
        self._vision_encoder = (vision_encoder,)
        self.cosine_margin = cosine_margin
        self.distance_margin = distance_margin

    def forward(self, latents: Tensor, frames: Tensor) -> Tensor:
        """Loss of the latents of a window.

        Args:
            latents: [B, C, T, h, w].
            frames: [B, 3, F, H, W]; each latent frame is compared with the last frame of its group.
        """
        last = frames.shape[2] - 1
        ends = [last - self.temporal_ratio * index for index in reversed(range(latents.shape[2]))]
        places = to_images(latents)
        with torch.no_grad():
            features = self._vision_encoder[0](to_images(frames[:, :, ends]))
        features = F.interpolate(features, places.shape[2:], mode="bilinear", antialias=True)
        cosine = marginal_cosine_loss(self.projection(places), features, self.cosine_margin)
        return cosine + distance_matrix_loss(places, features, self.distance_margin)


@dataclass(frozen=True, kw_only=True)
class VAELossWeights:
    """How much each loss counts; 0 switches it off.

    Attributes:
        reconstruction: mean absolute error of pixels.
        perceptual: of the distance that the caller passes in.
        kl: `kl_divergence`.
        wavelet: `wavelet_loss`.
        alignment: `VisionAlignment`, times its adaptive weight.
    """

    reconstruction: float = 1.0
    perceptual: float = 0.0
    kl: float = 0.0
    wavelet: float = 0.0
    alignment: float = 0.0

    def __post_init__(self) -> None:
        weights = asdict(self)
        check_not_negative(**weights)
        if not any(weights.values()):
            raise ValueError("a weight must be above 0, got 0 for all")


class VAEObjective:
    """The weighted sum of the losses that are switched on.

    Args:
        vae: that is trained.
        weights: of the losses.
        perceptual: needed for its weight above 0.
        alignment: likewise; its projection is trained with the VAE.
    """

    def __init__(
        self,
        vae: CausalVideoVAE,
        weights: VAELossWeights,
        perceptual: Perceptual | None = None,
        alignment: VisionAlignment | None = None,
    ) -> None:
        for name, part in (("perceptual", perceptual), ("alignment", alignment)):
            if getattr(weights, name) > 0 and part is None:
                raise ValueError(f"{name} must be given for a weight of {getattr(weights, name)}, got None")
        if weights.kl > 0 and vae.config.latents != "kl":
            raise ValueError(f"kl must be 0 for a VAE with latents={vae.config.latents!r}, got {weights.kl}")
        self.vae = vae
        self.weights = weights
        self.perceptual = perceptual
        self.alignment = alignment

    def __call__(self, window: Window) -> tuple[Tensor, dict[str, float]]:
        """Loss of a window, and its parts without their weights."""
        frames, reconstruction, weights = window.frames, window.reconstruction, self.weights
        # Losses are taken in the precision of the frames, also where autocast made the rest coarser.
        reconstruction = reconstruction.to(frames.dtype)
        parts = {"reconstruction": (reconstruction - frames).abs().mean()}
        if weights.perceptual > 0 and self.perceptual is not None:
            parts["perceptual"] = self.perceptual(to_images(reconstruction), to_images(frames)).mean()
        if weights.wavelet > 0:
            parts["wavelet"] = wavelet_loss(reconstruction, frames)
        if weights.kl > 0:
            parts["kl"] = kl_divergence(window.posterior)
        if weights.alignment > 0 and self.alignment is not None:
            parts["alignment"] = self._alignment(window, parts["reconstruction"])
        total = sum((getattr(weights, name) * part for name, part in parts.items()), frames.new_zeros(()))
        return total, {name: part.item() for name, part in parts.items()}

    def _alignment(self, window: Window, reference: Tensor) -> Tensor:
        assert self.alignment is not None
        loss: Tensor = self.alignment(window.posterior.mean.to(window.frames.dtype), window.frames)
        return adaptive_weight(reference, loss, self.vae.encoder.last_weight) * loss
