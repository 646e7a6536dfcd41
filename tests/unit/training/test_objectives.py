"""Objectives against closed forms."""

import pytest
import torch

from genstream.training.objectives import (
    add_noise,
    adversarial_loss,
    clean_from,
    discriminator_loss,
    flow_loss,
    guidance_loss,
    guided,
    identity_loss,
    logit_normal_sigmas,
    matching_gradient,
    matching_loss,
    roughness,
    segment_velocity,
)

SHAPE = (4, 2, 3, 2, 2)


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_true_velocity_has_no_loss_and_gives_the_clean_sample():
    clean, noise, sigma = normal(0), normal(1), torch.rand(4, 3, dtype=torch.float64)
    noisy = add_noise(clean, noise, sigma)
    torch.testing.assert_close(clean_from(noisy, noise - clean, sigma), clean)
    assert flow_loss(noise - clean, clean, noise) == 0
    assert flow_loss(noise - clean + 2, clean, noise) == 4


def test_each_frame_has_its_own_noise():
    clean, noise = normal(0), normal(1)
    sigma = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64).expand(4, 3)
    noisy = add_noise(clean, noise, sigma)
    assert torch.equal(noisy[:, :, 0], clean[:, :, 0])
    assert torch.equal(noisy[:, :, 2], noise[:, :, 2])
    torch.testing.assert_close(noisy[:, :, 1], (clean[:, :, 1] + noise[:, :, 1]) / 2)


def test_logit_normal_levels():
    torch.manual_seed(0)
    sigmas = logit_normal_sigmas(100_000, shift=1.0, mean=0.5, std=2.0)
    assert 0 < sigmas.min() and sigmas.max() <= 1
    odds = torch.logit(sigmas.double())
    assert abs(odds.mean() - 0.5) < 0.03
    assert abs(odds.std() - 2) < 0.03
    torch.manual_seed(0)
    moved = logit_normal_sigmas(100_000, shift=5.0, mean=0.5, std=2.0)
    torch.testing.assert_close(moved, 5 * sigmas / (1 + 4 * sigmas), rtol=0, atol=1e-6)


def test_guidance():
    toward, away = normal(0), normal(1)
    assert torch.equal(guided(toward, away, 1.0), away + (toward - away))
    torch.testing.assert_close(guided(toward, away, 3.0), 3 * toward - 2 * away)


def gaussian_denoiser(noisy, sigma, mean, std):
    """The clean sample that is expected behind a noisy one, of normal numbers of that mean and deviation."""
    a, b = (1 - sigma) * std**2, (1 - sigma) ** 2 * std**2 + sigma**2
    return mean + a / b * (noisy - (1 - sigma) * mean)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_matching_gaussians_moves_the_mean_straight_home(sigma):
    """Both denoisers differ by a multiple of the distance of the means alone, whatever the noise."""
    generated, noise = normal(0) + 3, normal(1)
    noisy = add_noise(generated, noise, torch.full((4, 3), sigma, dtype=torch.float64))
    real = gaussian_denoiser(noisy, sigma, mean=1.0, std=1.0)
    fake = gaussian_denoiser(noisy, sigma, mean=3.0, std=1.0)
    gradient = matching_gradient(generated, real, fake)
    shrink = 1 - (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
    distance = (generated - real).abs().flatten(1).mean(1)
    expected = (3.0 - 1.0) * shrink / distance
    torch.testing.assert_close(gradient, expected.view(-1, 1, 1, 1, 1).expand(SHAPE))


def test_the_loss_has_the_gradient_and_no_other():
    generated, real, fake = (normal(seed).requires_grad_() for seed in range(3))
    matching_loss(generated, real.detach(), fake.detach()).backward()
    expected = matching_gradient(generated, real, fake).detach() / generated.numel()
    torch.testing.assert_close(generated.grad, expected)
    assert real.grad is None


def test_where_both_agree_nothing_moves():
    generated, real = normal(0), normal(1)
    assert not matching_gradient(generated, real, real).any()
    assert identity_loss(generated, real, real) == 0
    assert matching_gradient(real, real, real + 1).isfinite().all()


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_identity_loss(alpha):
    generated, real, fake = (normal(seed) for seed in range(3))
    distance = (generated - real).abs().mean((1, 2, 3, 4), keepdim=True)
    difference = real - fake
    expected = (difference * (real - generated) - alpha * difference**2) / distance
    torch.testing.assert_close(identity_loss(generated, real, fake, alpha), expected.mean())


def test_identity_loss_of_gaussians_has_its_least_at_the_teacher():
    """With the critic of its own mean, the loss of samples of that mean falls until it is the teacher's."""
    sigma, losses = 0.5, []
    noise = normal(1)
    for mean in (3.0, 2.0, 1.0, 0.0, -1.0):
        generated = normal(0) + mean
        noisy = add_noise(generated, noise, torch.full((4, 3), sigma, dtype=torch.float64))
        real = gaussian_denoiser(noisy, sigma, mean=1.0, std=1.0)
        fake = gaussian_denoiser(noisy, sigma, mean=mean, std=1.0)
        losses.append(abs(identity_loss(generated, real, fake, alpha=0.5).item()))
    assert min(losses) == losses[2] == pytest.approx(0)


def test_adversarial_losses():
    real, fake = torch.tensor([5.0]), torch.tensor([-5.0])
    assert discriminator_loss(real, fake) < 1e-4 < adversarial_loss(real, fake)
    torch.testing.assert_close(discriminator_loss(real, fake), adversarial_loss(fake, real))
    torch.testing.assert_close(discriminator_loss(real, real), torch.tensor(2.0).log())


def test_roughness_is_the_squared_slope():
    torch.manual_seed(0)
    x, slope, sigma = torch.randn(50_000, 3), torch.tensor([1.0, 2.0, -2.0]), 0.01
    disturbed = x + sigma * torch.randn_like(x)
    torch.testing.assert_close(
        roughness(x @ slope, disturbed @ slope, sigma), slope.square().sum(), rtol=0.02, atol=0
    )


def test_a_segment_s_velocity_leads_from_one_state_to_the_other():
    clean, noise = normal(0), normal(1)
    sigma, later = (torch.rand(4, 3, dtype=torch.float64) for _ in range(2))
    sigma, later = torch.maximum(sigma, later), torch.minimum(sigma, later)
    state, following = add_noise(clean, noise, sigma), add_noise(clean, noise, later)
    velocity = segment_velocity(state, following, sigma, later)
    torch.testing.assert_close(velocity, noise - clean)  # on a straight path
    bent = following + normal(2)
    arrived = state - (sigma - later)[:, None, :, None, None] * segment_velocity(state, bent, sigma, later)
    torch.testing.assert_close(arrived, bent)
    assert not segment_velocity(clean, clean, sigma, sigma).any()


def test_guidance_is_learnt_when_one_evaluation_does_what_two_did():
    toward, away = normal(0), normal(1)
    assert guidance_loss(away + 3 * (toward - away), toward, away, 3.0) == 0
    assert guidance_loss(toward, toward, away, 1.0) < 1e-24
    teacher = normal(2).requires_grad_()
    guidance_loss(normal(3).requires_grad_(), teacher, away, 2.0).backward()
    assert teacher.grad is None
