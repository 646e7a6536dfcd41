"""Trains a causal video VAE, from an image VAE or from nothing, on clips of any length.

From Stable Diffusion's VAE: `genstream train causal-vae --videos FOLDER --initial-image-vae FOLDER
--block-out-channels "[128, 256, 512, 512]"`. Alignment to a vision encoder needs the caller's: make a
`VAEObjective` with it, and `run` its trainee. So does a decoder that follows captions: give the trainee those
of its clips.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from genstream.shapes import check_not_negative
from genstream.training.components import save_component, with_statistics
from genstream.training.loop import run, steps_taken
from genstream.training.processes import once, process
from genstream.training.record import Origins, Training, claimed_run, is_finished, write_record
from genstream.training.vae_clips import clip_source
from genstream.training.vae_losses import VAELossWeights, VAEObjective, VisionAlignment, psnr_db
from genstream.training.vae_run import VAERunSettings, last_figures
from genstream.training.vae_windows import Caption, ClipSource, WindowSettings, last_window, reconstruct
from genstream.vae.adapters.base import Adapter
from genstream.vae.causal import CausalVideoVAE, Latents
from genstream.vae.causal_network import Norm
from genstream.vae.loading import component_folder, load_vae

logger = logging.getLogger(__name__)

_RESULT_FOLDER = "vae"
_NAME = "causal_vae"
"""In the record."""
_STATISTICS_STEPS = 16
_FIXED_BY_IMAGE_VAE = (
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "norm",
    "norm_num_groups",
    "mid_block_add_attention",
    "latents",
)


@dataclass(frozen=True, kw_only=True)
class CausalVAETrainingSettings(VAERunSettings):
    """What the causal VAE looks like, and what it is judged by in training.

    Attributes:
        initial_image_vae: folder of diffusers' AutoencoderKL to start from, which the settings of the
            architecture must fit; None to start from nothing.
        latent_channels: channels of a latent; 4 and 16 are usual.
        block_out_channels: channels of each level; each level but the last halves height and width.
        layers_per_block: residual blocks of an encoder level; the decoder has one more.
        temporal_levels: for each level but the last, whether the frame rate halves behind it too.
        encoder_temporal_kernels: for each level, 3 for causal 3-D convolutions or 1 for 2-D ones.
        decoder_temporal_kernels: likewise.
        norm: "group" over each frame, as image VAEs have, or "channel", which tiles in space do not change.
        norm_num_groups: groups of "group".
        mid_block_add_attention: whether the frames of the last level have self-attention.
        latents: "kl" has a mean and a variance per latent, "deterministic" one value and no KL loss.
        reconstruction_weight: of the mean absolute error of pixels; like all weights, 0 switches it off.
        kl_weight: of the KL divergence to a standard normal.
        wavelet_weight: of the frequency-aware loss.
        window_frames: frames of a window; what is before a clip's last windows only fills the memory.
        gradient_windows: windows in a row through which gradient flows; their memory is held together.
    """

    batch_pixels: int = 100_000
    initial_image_vae: str | None = None
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (32, 64, 128, 128)
    layers_per_block: int = 2
    temporal_levels: tuple[bool, ...] = (False, True, True)
    encoder_temporal_kernels: tuple[int, ...] = (1, 1, 3, 3)
    decoder_temporal_kernels: tuple[int, ...] = (3, 3, 3, 3)
    norm: Norm = "group"
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    latents: Latents = "kl"
    reconstruction_weight: float = 1.0
    kl_weight: float = 1e-6
    wavelet_weight: float = 0.0
    window_frames: int = 16
    gradient_windows: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(
            reconstruction_weight=self.reconstruction_weight,
            kl_weight=self.kl_weight,
            wavelet_weight=self.wavelet_weight,
        )
        _ = self.weights, self.windows  # check their parts
        ratio = 2 ** sum(self.temporal_levels)
        if self.window_frames % ratio:
            raise ValueError(
                f"window_frames must be a multiple of {ratio} for temporal_levels = "
                f"{list(self.temporal_levels)}, got {self.window_frames}"
            )
        if self.latents == "deterministic" and self.kl_weight > 0:
            raise ValueError(f"kl_weight must be 0 for latents 'deterministic', got {self.kl_weight}")

    @property
    def weights(self) -> VAELossWeights:
        """Of the losses."""
        return VAELossWeights(
            reconstruction=self.reconstruction_weight,
            perceptual=self.perceptual_weight,
            kl=self.kl_weight,
            wavelet=self.wavelet_weight,
        )

    @property
    def origins(self) -> Origins:
        """The image VAE too, where there is one."""
        others = super().origins
        if self.initial_image_vae is None:
            return others
        find = partial(component_folder, self.initial_image_vae)
        return replace(others, models={**others.models, "initial_image_vae": find})

    @property
    def windows(self) -> WindowSettings:
        """How clips are cut."""
        return WindowSettings(window_frames=self.window_frames, gradient_windows=self.gradient_windows)


def train_causal_vae(settings: CausalVAETrainingSettings, output: Path) -> None:
    """Train, continuing what `output` already holds; the result is the component `output`/vae."""
    if is_finished(output / _RESULT_FOLDER, _NAME, settings, settings.total_steps, settings.origins):
        return
    torch.manual_seed(settings.seed)
    vae = _new_vae(settings)
    clips = clip_source(settings, vae.spec)
    objective = VAEObjective(vae, settings.weights, settings.perceptual(process().device))
    with claimed_run(output, settings, settings.origins):
        run(settings.loop, CausalVAETrainee(objective, clips, settings.windows), output)
        once(lambda: export(vae, settings, clips, output))


def export(vae: CausalVideoVAE, settings: CausalVAETrainingSettings, clips: ClipSource, output: Path) -> None:
    """Write a trained VAE as a diffusers component, in half precision."""
    trained = vae
    if settings.initial_image_vae is None:
        trained = _normalised(trained, clips, settings.windows)
    folder = output / _RESULT_FOLDER
    save_component(trained.half(), folder)
    write_record(folder, _training(settings, output))
    logger.info("trained VAE in %s", folder)


def _training(settings: CausalVAETrainingSettings, output: Path) -> Training:
    logs = {_NAME: output / "log.csv", f"{_NAME}_evaluation": output / "evaluation.csv"}
    return Training(
        name=_NAME,
        part="causal-vae",
        run=output,
        settings=settings,
        logs=logs,
        steps=steps_taken(output),
        results=last_figures(output),
    )


def _new_vae(settings: CausalVAETrainingSettings) -> CausalVideoVAE:
    temporal = {
        "temporal_levels": list(settings.temporal_levels),
        "encoder_temporal_kernels": list(settings.encoder_temporal_kernels),
        "decoder_temporal_kernels": list(settings.decoder_temporal_kernels),
    }
    if settings.initial_image_vae is None:
        spatial = {name: getattr(settings, name) for name in _FIXED_BY_IMAGE_VAE}
        vae: CausalVideoVAE = CausalVideoVAE(**{**spatial, **temporal})
        return vae
    try:
        loaded = load_vae(settings.initial_image_vae)
    except ValueError as error:
        raise ValueError(f"initial_image_vae must be an AutoencoderKL: {error}") from error
    image_vae = loaded.vae if isinstance(loaded, Adapter) else loaded
    if not isinstance(image_vae, AutoencoderKL):
        raise ValueError(f"initial_image_vae must be an AutoencoderKL, got {type(image_vae).__name__}")
    vae = CausalVideoVAE.from_image_vae(image_vae, **temporal)
    for name in _FIXED_BY_IMAGE_VAE:
        ours, its = getattr(settings, name), vae.config[name]
        its = tuple(its) if isinstance(its, list) else its
        if ours != its:
            raise ValueError(f"{name} must be {its} like initial_image_vae's, got {ours}")
    return vae


def _normalised(vae: CausalVideoVAE, clips: ClipSource, windows: WindowSettings) -> CausalVideoVAE:
    """With the statistics of its latents, which diffusion models need; those of an image VAE would stay."""
    latents = []
    for step in range(_STATISTICS_STEPS):
        values, _ = reconstruct(vae, clips.training(step).to(vae.device), windows)
        latents.append(values.transpose(0, 1).flatten(1))  # clips of different steps differ in size
    return with_statistics(vae, torch.cat(latents, dim=1)[None])


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
        captions: what the decoder is told about the clips of a step, on the VAE's device; no tokens at all
            now and then teach it to do without, as in `evaluate`. None for a VAE without `text_dim`.
    """

    def __init__(
        self,
        objective: VAEObjective,
        clips: ClipSource,
        windows: WindowSettings,
        captions: Callable[[int], Caption] | None = None,
    ) -> None:
        self.objective = objective
        self.clips = clips
        self.windows = windows
        self.captions = captions
        self.module = TrainedVAE(objective.vae, objective.alignment)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of a step's clips, and its parts without their weights."""
        vae = self.objective.vae
        caption = None if self.captions is None else self.captions(step)
        frames = self.clips.training(step).to(vae.device)
        return self.objective(last_window(vae, frames, self.windows, caption))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """PSNR in dB on clips that were never trained on."""
        module = self.module
        figures = []
        for clip in self.clips.evaluation:
            frames = clip.to(module.vae.device)
            _, reconstruction = reconstruct(module.vae, frames, self.windows)
            figures.append(psnr_db(reconstruction - frames))
        return {"psnr_db": sum(figures) / len(figures)}
