"""Finished VAEs and text encoders: writing them as components, and the statistics of latents."""

import shutil
from pathlib import Path
from typing import TypeVar

from diffusers import ModelMixin
from torch import Tensor
from transformers import PreTrainedModel

from genstream.io.errors import writing
from genstream.vae.causal import CausalVideoVAE
from genstream.vae.tiny import TinyVideoVAE

V = TypeVar("V", bound=CausalVideoVAE | TinyVideoVAE)


def save_component(component: ModelMixin | PreTrainedModel, folder: Path) -> None:
    """Save under another name and rename, so that `folder` is whole as soon as it exists."""
    partial = folder.with_name(f"{folder.name}.partial")
    with writing(folder):
        component.save_pretrained(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def with_statistics(vae: V, latents: Tensor) -> V:
    """The same VAE with the mean and standard deviation of `latents` in its configuration.

    Args:
        vae: without statistics of its own.
        latents: its latents of training clips, [B, C, T, h, w].
    """
    values = latents.transpose(0, 1).flatten(1)  # [C, B*T*h*w]
    statistics = {"latents_mean": values.mean(dim=1).tolist(), "latents_std": values.std(dim=1).tolist()}
    # Private entries record which values were defaults, and would discard the statistics.
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    normalised: V = type(vae)(**{**config, **statistics})
    normalised.load_state_dict(vae.state_dict())
    return normalised
