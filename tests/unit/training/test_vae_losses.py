import math

import pytest
import torch
from torch import nn

from genstream.training.vae_losses import (
    VAELossWeights,
    VAEObjective,
    VisionAlignment,
    adaptive_weight,
    distance_matrix_loss,
    haar_bands,
    kl_divergence,
    marginal_cosine_loss,
    psnr_db,
    wavelet_loss,
)
from genstream.training.vae_windows import (
    Caption,
    ClipSource,
    WindowSettings,
    last_window,
    reconstruct,
    rollback_windows,
)
from genstream.vae.causal import CausalVideoVAE, Posterior

TINY = {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}


def small_vae(**overrides) -> CausalVideoVAE:
    torch.manual_seed(0)
    return CausalVideoVAE(**{**TINY, **overrides}).double()


def clip(frames: int, batch_size: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand((batch_size, 3, frames, 16, 16), generator=generator, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1.0), (2.0, 1.0), (0.0, math.e**2), (-1.0, 0.5)])
def test_kl_of_a_normal(mean, variance):
    shape = (2, 4, 3, 2, 2)
    posterior = Posterior(mean=torch.full(shape, mean), log_variance=torch.full(shape, math.log(variance)))
    each = (mean**2 + variance - 1 - math.log(variance)) / 2
    assert kl_divergence(posterior).item() == pytest.approx(each * 48, rel=1e-5, abs=1e-5)
    with pytest.raises(ValueError, match="deterministic"):
        kl_divergence(Posterior(mean=posterior.mean, log_variance=None))


def test_haar_bands_hold_everything():
    frames = torch.randn((2, 3, 4, 8, 6), dtype=torch.float64)
    bands = haar_bands(frames)
    assert bands.shape == (4, 2, 3, 4, 4, 3)
    assert (4 * bands.square().sum()).item() == pytest.approx(frames.square().sum().item())
    low, horizontal, vertical, diagonal = bands
    torch.testing.assert_close(low + horizontal + vertical + diagonal, frames[..., ::2, ::2])
    torch.testing.assert_close(low - horizontal - vertical + diagonal, frames[..., 1::2, 1::2])
    with pytest.raises(ValueError, match=r"even height and width, got \[8, 5\]"):
        haar_bands(frames[..., :5])


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_wavelet_loss_of_patterns(levels):
    flat = torch.zeros((1, 3, 2, 8, 8), dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    checkerboard, stripes = (-1.0) ** (rows + columns), (-1.0) ** columns
    for error in (torch.ones(8, 8), checkerboard, stripes):
        assert wavelet_loss(flat + 0.3 * error, flat, levels).item() == pytest.approx(0.3)
    # An error in both bands counts in both, where the plain mean error would count it once.
    both = 0.3 * (1 + checkerboard)
    assert wavelet_loss(flat + both, flat, levels).item() == pytest.approx(0.6)
    assert both.abs().mean().item() == pytest.approx(0.3)


def at_angle(degrees: float) -> torch.Tensor:
    angle = math.radians(degrees)
    return torch.tensor([math.cos(angle), math.sin(angle)]).view(1, 2, 1, 1)


@pytest.mark.parametrize(("degrees", "expected"), [(0, 0), (60, 0), (90, 0.5), (180, 1.5)])
def test_marginal_cosine_loss(degrees, expected):
    loss = marginal_cosine_loss(3 * at_angle(degrees), at_angle(0))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_distance_matrix_loss():
    latents = torch.cat([at_angle(0), 5 * at_angle(90)], dim=3)
    features = torch.cat([at_angle(30), at_angle(30)], dim=3)
    assert distance_matrix_loss(latents, latents * 2).item() == 0
    # Two of four pairs are of different places: their cosines are 0 and 1.
    assert distance_matrix_loss(latents, features).item() == pytest.approx(0.75 / 2)
    assert distance_matrix_loss(latents, features, margin=0).item() == pytest.approx(0.5)


def test_adaptive_weight_is_the_ratio_of_gradients():
    weight = nn.Parameter(torch.tensor([3.0, -4.0]))
    factor = adaptive_weight(6 * weight.sum(), weight.square().sum(), weight)
    assert factor.item() == pytest.approx(6 * math.sqrt(2) / 10, rel=1e-3)
    assert not factor.requires_grad


def test_alignment_compares_each_latent_with_the_end_of_its_group():
    seen = []

    def vision_encoder(images):
        seen.append(images)
        return torch.nn.functional.avg_pool2d(images, 4).repeat(1, 2, 1, 1)

    alignment = VisionAlignment(4, 6, 4, vision_encoder).double()
    frames = clip(9)
    alignment(torch.randn((1, 4, 3, 2, 2), dtype=torch.float64), frames)
    assert torch.equal(seen[0], frames[0, :, [0, 4, 8]].transpose(0, 1))
    alignment(torch.randn((1, 4, 2, 2, 2), dtype=torch.float64), frames[:, :, 1:])
    assert torch.equal(seen[1], frames[0, :, [4, 8]].transpose(0, 1))
    assert [name for name, _ in alignment.named_parameters()] == ["projection.weight"]


def test_windows_give_what_the_whole_clip_gives():
    vae, frames = small_vae(latents="deterministic", text_dim=6).eval(), clip(21)
    caption = Caption(text=torch.randn((1, 3, 6), dtype=torch.float64), mask=torch.ones(1, 3))
    nn.init.normal_(vae.decoder.text_attentions[0].to_out.weight)
    (whole,) = rollback_windows(vae, frames, WindowSettings(window_frames=20), caption)
    for length, together in ((4, 1), (8, 1), (4, 2), (12, 3)):
        settings = WindowSettings(window_frames=length, gradient_windows=together)
        windows = list(rollback_windows(vae, frames, settings, caption))
        joined = torch.cat([window.reconstruction for window in windows], dim=2)
        torch.testing.assert_close(joined, whole.reconstruction, rtol=0, atol=1e-10)
        assert torch.equal(torch.cat([window.frames for window in windows], dim=2), frames)
        last = last_window(vae, frames, settings, caption)
        torch.testing.assert_close(last.reconstruction, windows[-1].reconstruction, rtol=0, atol=1e-10)
    assert not torch.equal(whole.reconstruction, next(rollback_windows(vae, frames, settings)).reconstruction)


def test_a_reconstruction_in_windows_is_that_of_the_whole_clip():
    vae, frames = small_vae(), clip(13)
    latents = vae.encode(frames)
    for window_frames in (1, 4, 6, 16):
        found, decoded = reconstruct(vae, frames, WindowSettings(window_frames=window_frames))
        torch.testing.assert_close(found, latents)
        torch.testing.assert_close(decoded, vae.decode(latents))
        assert not decoded.requires_grad


def test_gradient_flows_through_as_many_windows_as_asked():
    vae, frames = small_vae(latents="deterministic"), clip(9)

    def gradient(settings: WindowSettings) -> torch.Tensor:
        vae.zero_grad()
        for window in rollback_windows(vae, frames, settings):
            (window.reconstruction - window.frames).square().sum().backward()
        return torch.cat([weight.grad.flatten() for weight in vae.parameters()])

    whole = gradient(WindowSettings(window_frames=8))
    joined = gradient(WindowSettings(window_frames=4, gradient_windows=2))
    apart = gradient(WindowSettings(window_frames=4))
    torch.testing.assert_close(joined, whole, rtol=1e-9, atol=1e-9)
    assert (apart - whole).norm() > 1e-3 * whole.norm()


def test_no_gradient_leaves_the_windows_of_a_group():
    vae, frames = small_vae(latents="deterministic"), clip(17).requires_grad_()
    settings = WindowSettings(window_frames=4, gradient_windows=2)
    bounds = [(0, 9), (9, 17)]
    for window, (start, stop) in zip(rollback_windows(vae, frames, settings), bounds, strict=True):
        (gradient,) = torch.autograd.grad(window.reconstruction.square().sum(), frames)
        reached = gradient.abs().sum(dim=(0, 1, 3, 4)).nonzero().flatten().tolist()
        assert reached == list(range(start, stop))
    (gradient,) = torch.autograd.grad(last_window(vae, frames, settings).reconstruction.sum(), frames)
    assert gradient[:, :, :9].abs().sum() == 0
    assert gradient[:, :, 9:].abs().sum() > 0


def test_windows_that_do_not_fit_are_refused():
    vae = small_vae()
    with pytest.raises(ValueError, match=r"window_frames must be a multiple of 4 .* got 6"):
        next(rollback_windows(vae, clip(9), WindowSettings(window_frames=6)))
    with pytest.raises(ValueError, match=r"frames must be 1 \+ 4n .* got 8"):
        last_window(vae, clip(8), WindowSettings())
    with pytest.raises(ValueError, match="evaluation must hold at least one clip, got none"):
        ClipSource(training=clip, evaluation=[])
    with pytest.raises(ValueError, match="gradient_windows must be at least 1, got 0"):
        WindowSettings(gradient_windows=0)


OFF = {"reconstruction": 0.0}


@pytest.mark.parametrize(
    ("weights", "part"),
    [
        ({}, "reconstruction"),
        ({**OFF, "perceptual": 1.0}, "perceptual"),
        ({**OFF, "kl": 1e-3}, "kl"),
        ({**OFF, "wavelet": 1.0}, "wavelet"),
        ({"alignment": 0.1}, "alignment"),
    ],
)
def test_a_few_steps_lower_each_loss_alone(weights, part):
    vae, frames = small_vae(), clip(5)
    alignment = VisionAlignment(4, 3, 4, lambda images: nn.functional.avg_pool2d(images, 8)).double()
    objective = VAEObjective(
        vae, VAELossWeights(**weights), lambda a, b: (a - b).square().flatten(1).mean(dim=1), alignment
    )
    optimizer = torch.optim.AdamW([*vae.parameters(), *alignment.parameters()], lr=3e-3)
    history = []
    for step in range(8):
        torch.manual_seed(step)
        (window,) = rollback_windows(vae, frames, WindowSettings(window_frames=4))
        loss, parts = objective(window)
        assert set(parts) == {"reconstruction", part}
        history.append((loss.item(), parts[part]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert history[-1][0] < history[0][0]


@pytest.mark.parametrize(("error", "expected"), [(2.0, 0.0), (0.2, 20.0), (0.0, 126.0)])
def test_psnr(error, expected):
    assert psnr_db(torch.full((2, 3), error)) == pytest.approx(expected, abs=0.1)


def test_a_loss_that_lacks_its_part_is_refused():
    with pytest.raises(ValueError, match=r"perceptual must be given for a weight of 1.0, got None"):
        VAEObjective(small_vae(), VAELossWeights(perceptual=1.0))
    with pytest.raises(ValueError, match=r"alignment must be given for a weight of 0.1, got None"):
        VAEObjective(small_vae(), VAELossWeights(alignment=0.1))
    with pytest.raises(ValueError, match=r"kl must be 0 for a VAE with latents='deterministic', got 1.0"):
        VAEObjective(small_vae(latents="deterministic"), VAELossWeights(kl=1.0))
    with pytest.raises(ValueError, match="wavelet must be at least 0 and finite, got -1"):
        VAELossWeights(wavelet=-1)
