import torch

from genstream.training.vae import VAETrainee, VAETrainingSettings, export, initialise, train_vae
from genstream.vae.tiny import TinyVideoVAE

SETTINGS = VAETrainingSettings(
    joint_steps=3,
    decoder_steps=2,
    clips=4,
    size_px=64,
    encoder_width=4,
    decoder_widths=(6, 5, 4, 4),
    checkpoint_steps=2,
    evaluate_steps=2,
    precision="fp32",
)


def test_train_freeze_and_export(tmp_path):
    torch.set_num_threads(1)
    train_vae(SETTINGS, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "vae")
    frozen = TinyVideoVAE.from_pretrained(tmp_path / "run" / "frozen_encoder")
    exported = TinyVideoVAE.from_pretrained(tmp_path / "vae")
    assert exported.config.latents_mean == frozen.config.latents_mean is not None
    for name, value in frozen.encoder.state_dict().items():
        assert torch.equal(exported.encoder.state_dict()[name].float(), value.half().float())
    frames = torch.zeros((1, 3, 5, 64, 64))
    assert exported.float()(frames).shape == frames.shape
    assert not (tmp_path / "vae.partial").exists()


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


def test_initialised_signal_keeps_its_size():
    torch.manual_seed(0)
    vae = TinyVideoVAE(patch_size=2, encoder_width=24, decoder_widths=[32, 24, 24, 24], first_frame_copies=3)
    initialise(vae)
    frames = torch.rand((1, 3, 5, 64, 64)) - 1
    with torch.no_grad():
        latents = vae.encode(frames)
        assert 0.2 < latents.std() < 3
        assert 0.05 < vae.decode_unclamped(latents).std() < 1
