import csv

import torch
from torch import nn

from genstream.training.causal_vae import CausalVAETrainee
from genstream.training.loop import LoopSettings, run
from genstream.training.vae_losses import VAELossWeights, VAEObjective, VisionAlignment
from genstream.training.vae_windows import ClipSource, WindowSettings
from genstream.vae.causal import CausalVideoVAE


def training_clips(step: int) -> torch.Tensor:
    """Images, short clips and long ones in turn."""
    generator = torch.Generator().manual_seed(step % 3)
    colours = torch.rand((2, 3, 1, 2, 2), generator=generator) * 2 - 1
    return (
        colours.repeat_interleave(8, 3).repeat_interleave(8, 4).expand(-1, -1, (1, 5, 13)[step % 3], -1, -1)
    )


def test_a_run_with_every_loss_makes_the_vae_better(tmp_path):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = CausalVideoVAE(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)
    alignment = VisionAlignment(4, 3, 4, lambda images: nn.functional.avg_pool2d(images, 8))
    weights = VAELossWeights(perceptual=1.0, kl=1e-6, wavelet=0.1, alignment=0.1)
    objective = VAEObjective(vae, weights, lambda a, b: (a - b).square().flatten(1).mean(dim=1), alignment)
    clips = ClipSource(training=training_clips, evaluation=[training_clips(1)])
    trainee = CausalVAETrainee(objective, clips, WindowSettings(window_frames=4))
    loop = LoopSettings(
        total_steps=18, learning_rate=5e-3, warmup_steps=1, log_steps=3, evaluate_steps=9, ema_decay=0.5
    )
    run(loop, trainee, tmp_path)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert float(rows[-1]["reconstruction"]) < float(rows[0]["reconstruction"])
    assert {"perceptual", "kl", "wavelet", "alignment"} < set(rows[0])
    judged = [float(row["psnr_db"]) for row in csv.DictReader((tmp_path / "evaluation.csv").open())]
    assert judged[-1] > judged[0]
