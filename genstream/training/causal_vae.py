"""Trains a causal video VAE, from an image VAE or from nothing, on clips of any length."""

import torch
from torch import Tensor, nn

from genstream.training.vae_losses import VAEObjective, VisionAlignment, psnr_db
from genstream.training.vae_windows import ClipSource, WindowSettings, last_window
from genstream.vae.causal import CausalVideoVAE


class TrainedVAE(nn.Module):
    """A VAE and what is trained with it and thrown away afterwards."""

    def __init__(self, vae: CausalVideoVAE, alignment: VisionAlignment | None) -> None:
        super().__init__()
        self.vae = vae
        self.alignment = alignment


class CausalVAETrainee:
    """A causal video VAE with its objective; a `Trainee`.

    A step learns from the last windows of its clips. What comes before them only fills the VAE's memory, so
    clips of many lengths teach it all moments of a stream, and memory does not grow with them.

    Args:
        objective: with the VAE.
        clips: to train on and to be judged by; single frames teach images.
        windows: how clips are cut.
    """

    def __init__(self, objective: VAEObjective, clips: ClipSource, windows: WindowSettings) -> None:
        self.objective = objective
        self.clips = clips
        self.windows = windows
        self.module = TrainedVAE(objective.vae, objective.alignment)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of a step's clips, and its parts without their weights."""
        vae = self.objective.vae
        return self.objective(last_window(vae, self.clips.training(step).to(vae.device), self.windows))

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """PSNR in dB on clips that were never trained on."""
        assert isinstance(module, TrainedVAE)
        vae = module.vae
        figures = [psnr_db(vae(clip.to(vae.device)) - clip.to(vae.device)) for clip in self.clips.evaluation]
        return {"psnr_db": sum(figures) / len(figures)}
