import numpy as np
import pytest
import torch

from genstream.training.initialisation import initialise
from genstream.training.vae import VAETrainee, VAETrainingSettings, train_vae
from genstream.vae.tiny import TinyVideoVAE

SETTINGS = VAETrainingSettings(
    joint_steps=3,
    decoder_steps=2,
    clips=4,
    size_px=64,
    latent_channels=12,
    encoder_width=12,
    decoder_widths=(6, 5, 4, 4),
    checkpoint_steps=2,
    evaluate_steps=2,
    precision="fp32",
)


def test_train_freeze_and_export(tmp_path):
    torch.set_num_threads(1)
    train_vae(SETTINGS, tmp_path / "run")
    frozen = TinyVideoVAE.from_pretrained(tmp_path / "run" / "frozen_encoder")
    exported = TinyVideoVAE.from_pretrained(tmp_path / "run" / "vae")
    assert exported.config.latents_mean == frozen.config.latents_mean is not None
    for name, value in frozen.encoder.state_dict().items():
        assert torch.equal(exported.encoder.state_dict()[name].float(), value.half().float())
    frames = torch.zeros((1, 3, 5, 64, 64))
    assert exported.float()(frames).shape == frames.shape
    assert not (tmp_path / "run" / "vae.partial").exists()
    assert sorted(path.name for path in (tmp_path / "run" / "vae" / "training").iterdir()) == [
        "vae.json",
        "vae_decoder.csv",
        "vae_joint.csv",
    ]


def test_batches_follow_from_the_step():
    vae = TinyVideoVAE(patch_size=2, encoder_width=4, decoder_widths=[4, 4, 4, 4], first_frame_copies=3)
    trainee = VAETrainee(SETTINGS, vae)
    for step in range(8):
        frames, weights = trainee._batch(step)
        again, _ = trainee._batch(step)
        assert torch.equal(frames, again)
        assert frames.shape[2] % 4 == 1
        assert weights.shape == (frames.shape[0], 1, *frames.shape[2:])
        assert weights.min() >= 1
        assert weights.max() == 1 + SETTINGS.object_weight


def test_first_weights_keep_the_signal_and_pass_colours():
    torch.manual_seed(0)
    vae = TinyVideoVAE(patch_size=2, encoder_width=24, decoder_widths=[32, 24, 24, 24], first_frame_copies=3)
    initialise(vae)
    # Plain patches of 16 x 16 pixels, with colours inside the range that latents carry nearly linearly.
    patches = torch.rand((1, 3, 1, 4, 4)).mul(0.4).add(-0.8)
    frames = patches.repeat_interleave(16, dim=-1).repeat_interleave(16, dim=-2).expand(-1, -1, 5, -1, -1)
    with torch.no_grad():
        latents = vae.encode(frames)
        decoded = vae.decode_unclamped(latents)
    assert 0.05 < latents.std() < 3
    patch_means = decoded.unflatten(-1, (4, 16)).unflatten(-3, (4, 16)).mean(dim=(-1, -3))
    assert (patch_means - patches).abs().mean() < 0.05


def test_first_weights_tell_the_quarters_of_a_patch():
    torch.manual_seed(0)
    vae = TinyVideoVAE(patch_size=2, encoder_width=24, decoder_widths=[32, 24, 24, 24], first_frame_copies=3)
    initialise(vae)
    frames = torch.full((1, 3, 1, 16, 16), -0.8)
    frames[:, 0, :, :, :8] += 0.4
    with torch.no_grad():
        latents = vae.encode(frames).flatten()
    # In [0, 1] red is 0.3 on the left and 0.1 on the right, green and blue are 0.1 everywhere.
    torch.testing.assert_close(latents[:4], torch.tensor([0.0, -0.4, -0.4, 0.4]), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents[4:12], torch.zeros(8), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"clips": 3}, "clips must be at least 4, got 3"),
        ({"encoder_width": 8}, "encoder_width must be at least 12, got 8"),
        ({"latent_channels": 4}, "latent_channels must be at least 12, got 4"),
        ({"size_px": 100}, "size_px must be a multiple of 64 for patch_size 2, got 100"),
        ({"size_px": 32}, "size_px must be a multiple of 64 for patch_size 2, got 32"),
        ({"latents_noise": 1.0}, r"latents_noise must be in \[0, 1\), got 1\.0"),
    ],
)
def test_bad_settings(wrong, error):
    with pytest.raises(ValueError, match=error):
        VAETrainingSettings(**wrong)


def test_the_decoder_sees_objects_where_they_touch():
    vae = TinyVideoVAE(latent_channels=12, encoder_width=12, decoder_widths=(6, 5, 4, 4))
    trainee, rng = VAETrainee(SETTINGS, vae), np.random.default_rng(0)
    for _ in range(20):
        scene, frame, row, column = trainee._contact(rng)
        one, other = (item.centres(np.array([frame / 16]), 64, 64)[0] for item in scene.objects)
        assert np.hypot(*(one - other)) < 64 * sum(item.extent for item in scene.objects)
        assert np.allclose((one + other) / 2, (column, row), atol=1)
        clip, _ = trainee._crop(5, 16, rng)
        assert clip.shape == (5, 16, 16, 3)
