"""What a model is before its training: new, for the toy world, or another one that is shown videos."""

from __future__ import annotations

from pathlib import Path

import torch

from genstream.data.toyworld import ToyWorld
from genstream.io.model_folder import model_place
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.shapes import check_divides
from genstream.training.denoiser import Denoiser, copy_weights
from genstream.training.model_settings import ModelRunSettings
from genstream.training.text_encoder import load_text_encoder
from genstream.vae.loading import LoadedVAE, load_vae


def starting_model(settings: ModelRunSettings) -> CausalVideoPipeline:
    """The model in front of the first step, in float32.

    Raises:
        ValueError: `vae`, `initial` or `text_encoder` is none, or does not fit.
    """
    if settings.videos is not None:
        pipe = new_model(settings)
        check_shown(pipe)
        Denoiser.of(pipe).text_encoder.requires_grad_(requires_grad=False)
        return pipe
    initial = None if settings.initial is None else load_model("initial", settings.initial)
    reader = None
    if settings.text_encoder is not None:
        reader = load_text_encoder(settings.text_encoder, settings.text_width, settings.text_layers)
    pipe = new_model(settings)
    _check_size(pipe, ("size_px", "size_px"), "vae")
    if initial is not None:
        copy_weights(Denoiser.of(initial), Denoiser.of(pipe))
    if reader is not None:
        pipe.text_encoder = reader.requires_grad_(requires_grad=False)
    return pipe


def new_model(settings: ModelRunSettings) -> CausalVideoPipeline:
    """A model of the size that is wanted: with random weights, or `initial` where that is shown videos."""
    if settings.videos is not None:
        assert settings.initial is not None
        return load_model("initial", settings.initial)
    vae = load_latents_vae(settings)
    torch.manual_seed(settings.seed)
    denoiser = Denoiser.new(settings, vae.spec.latent_channels)
    return CausalVideoPipeline(
        denoiser.tokenizer,
        denoiser.text_encoder,
        denoiser.transformer,
        vae,
        FewStepScheduler(),
        text_tokens=settings.text_tokens,
        default_height=settings.size_px,
        default_width=settings.size_px,
        default_fps=ToyWorld().fps,
    )


def load_latents_vae(settings: ModelRunSettings) -> LoadedVAE:
    """The VAE that `settings.vae` gives, in float32."""
    try:
        return load_vae(settings.vae)
    except (ValueError, OSError) as error:
        raise ValueError(f"vae must be the folder of a trained VAE, got {settings.vae!r}: {error}") from error


def model_folder(name: str, given: str) -> Path:
    """Folder of a model that the setting `name` gives, itself or by the run that made it."""
    if (place := model_place(given)) is not None:
        return place
    raise ValueError(
        f"{name} must be an installed model or the folder of a model or of a finished run, got {given!r}"
    )


def load_model(name: str, given: str, reader: CausalVideoPipeline | None = None) -> CausalVideoPipeline:
    """The model that the setting `name` gives, in float32; with the text encoder of `reader` where given.

    Raises:
        ValueError: it is none, or cannot read prompts.
    """
    shared = {} if reader is None else {"text_encoder": reader.text_encoder, "tokenizer": reader.tokenizer}
    pipe: CausalVideoPipeline = CausalVideoPipeline.from_pretrained(
        model_folder(name, given), dtype=torch.float32, **shared
    )
    if pipe.tokenizer is None or pipe.text_encoder is None:
        raise ValueError(f"{name} must have a tokenizer and a text encoder, got {given!r} without")
    return pipe


def check_shown(pipe: CausalVideoPipeline) -> None:
    """Raise ValueError unless `initial` can be shown videos as it is: it takes text alone, and encodes."""
    config = pipe.transformer.config
    if config.image_dim is not None or config.in_channels != pipe.transformer.out_channels:
        raise ValueError("initial must be a model of text alone, got one that also takes images")
    _check_size(pipe, ("default_height of initial", "default_width of initial"), "initial")


def _check_size(pipe: CausalVideoPipeline, names: tuple[str, str], owner: str) -> None:
    """Frames of its size must be whole tokens, and its VAE must encode them.

    Args:
        pipe: the model.
        names: of what says its height and its width.
        owner: what its VAE is from.
    """
    vae, patch = pipe.streaming_vae, pipe.transformer.config.patch_size
    sides = (pipe.config.default_height, pipe.config.default_width)
    for name, side, patch_side in zip(names, sides, patch[1:], strict=True):
        check_divides(name, side, vae.spec.spatial_ratio * patch_side)
    try:
        vae.init_state("encode", 1, *sides)
    except ValueError as error:
        raise ValueError(f"{owner} must have a VAE that encodes frames: {error}") from error
