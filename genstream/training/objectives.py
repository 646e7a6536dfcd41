"""Objectives of flow matching and of distribution matching, as functions of tensors alone.

Latents are `[B, C, T, h, w]`, noise levels `[B, T]`, one for each latent frame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genstream.schedulers.schedule import shifted

_LEAST_DISTANCE = 1e-6


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) clean + sigma noise."""
    level = _by_frame(sigma)
    return (1 - level) * clean + level * noise


def clean_from(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample that a velocity points to: noisy - sigma velocity."""
    return noisy - _by_frame(sigma) * velocity


def flow_loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of a predicted velocity (flow matching, arXiv 2210.02747)."""
    return F.mse_loss(velocity, noise - clean)


def segment_velocity(state: Tensor, later: Tensor, sigma: Tensor, later_sigma: Tensor) -> Tensor:
    """Mean velocity between two states of a sampling path: one step with it goes from one to the other.

    The target of multistep distillation (StreamDiT, arXiv 2507.03745); where both levels are the same, 0.
    """
    length = sigma - later_sigma
    return (state - later) / _by_frame(torch.where(length > 0, length, torch.ones_like(length)))


def guidance_loss(velocity: Tensor, toward: Tensor, away: Tensor, scale: float) -> Tensor:
    """Mean squared error to a guided velocity, so that one evaluation does for two (arXiv 2210.03142)."""
    return F.mse_loss(velocity, guided(toward, away, scale).detach())


def logit_normal_sigmas(count: int, shift: float, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """`[count]` noise levels: the sigmoid of normal numbers, then the timestep shift (arXiv 2403.03206)."""
    return shifted(torch.sigmoid(mean + std * torch.randn(count)), shift)  # type: ignore[arg-type,return-value]


def guided(toward: Tensor, away: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, in the convention where 1 is off (arXiv 2207.12598)."""
    return away + scale * (toward - away)


def matching_gradient(generated: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Direction that takes generated samples from their own distribution to the real one.

    The difference of what two denoisers see in the same noisy version of `generated`, over the mean absolute
    error of the real one, by sample (DMD, arXiv 2311.18828, equations 7 and 8).

    Args:
        generated: clean samples of the student.
        real: what the teacher makes of them under noise.
        fake: what the critic, which knows the student's samples, makes of them.
    """
    distance = (generated - real).abs().flatten(1).mean(1).clamp(min=_LEAST_DISTANCE)
    return (fake - real) / distance.view(-1, 1, 1, 1, 1)


def matching_loss(generated: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """A scalar whose gradient by `generated` is `matching_gradient`, over the number of elements."""
    gradient = matching_gradient(generated.detach(), real, fake)
    return 0.5 * F.mse_loss(generated.double(), (generated - gradient).detach().double())


def identity_loss(generated: Tensor, real: Tensor, fake: Tensor, alpha: float = 1.0) -> Tensor:
    """Score identity distillation (SiD, arXiv 2404.04057), normalised like `matching_gradient`.

    Args:
        generated: clean samples of the student, with gradient.
        real: what the teacher makes of them under noise, with gradient through the noisy input.
        fake: what the critic makes of them, likewise.
        alpha: weight of the squared difference of both; 1 is usual for video.
    """
    distance = (generated - real).detach().abs().flatten(1).mean(1).clamp(min=_LEAST_DISTANCE)
    difference = real - fake
    product = difference * ((real - generated) - alpha * difference)
    return (product / distance.view(-1, 1, 1, 1, 1)).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Relativistic logistic loss of a discriminator on logits of pairs (R3GAN, arXiv 2501.05441)."""
    return F.softplus(fake - real).mean()


def adversarial_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The same for what it judges."""
    return F.softplus(real - fake).mean()


def roughness(logits: Tensor, disturbed: Tensor, sigma: float) -> Tensor:
    """Squared slope of logits along noise of deviation `sigma`: R1 and R2 without second derivatives."""
    return ((disturbed - logits) / sigma).square().mean()


def _by_frame(sigma: Tensor) -> Tensor:
    return sigma[:, None, :, None, None]
