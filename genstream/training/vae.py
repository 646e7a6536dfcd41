"""Trains the embedded video VAE on the toy world.

First encoder and decoder together; then the encoder is frozen with its latents normalised, so that a
diffusion model can be trained on them, while the decoder goes on alone.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from genstream.data.scene import Scene
from genstream.data.toyworld import ToyWorld
from genstream.data.vocabulary import BACKGROUND_RGB
from genstream.shapes import check_counts, check_not_negative
from genstream.training.clips import to_tensor
from genstream.training.components import save_component, with_statistics
from genstream.training.initialisation import PASSED_CHANNELS, initialise
from genstream.training.loop import LoopSettings, check_learning_rate, run, steps_taken
from genstream.training.precision import Precision
from genstream.training.processes import once, own_rng
from genstream.training.record import Origins, Training, claimed_run, is_finished, write_record
from genstream.training.vae_losses import psnr_db
from genstream.vae.tiny import TinyVideoVAE

logger = logging.getLogger(__name__)

FROZEN_ENCODER_FOLDER = "frozen_encoder"
_JOINT_FOLDER = "joint"
_DECODER_FOLDER = "decoder"
_RESULT_FOLDER = "vae"
_NAME = "vae"
"""In the record."""

# Side of the crop in parts of the frame, and frames. Small crops around objects show many scenes in a step.
# Whole frames teach borders, long clips the memory of a running stream.
# All cost about the same per step, since the number of clips makes up for the size.
_CLIP_SHAPES = ((4, 9), (2, 5), (4, 5), (2, 9), (2, 17), (1, 9))
LATEST_START_FRAME = 400
"""Scenes are endless; clips start at this frame or before."""
_EDGE_PX = 2
_CONTACTS = 0.35
"""Share of the second phase's clips that show objects where they touch, which is rare and hard."""
_EVALUATION_CLIPS = 16
_EVALUATION_FRAMES = 33
_STATISTICS_CLIPS = 64


@dataclass(frozen=True, kw_only=True)
class VAETrainingSettings:
    """What the embedded VAE looks like and how it is trained.

    Attributes:
        joint_steps: steps of encoder and decoder together.
        decoder_steps: steps of the decoder after the encoder was frozen.
        joint_learning_rate: peak of the first phase.
        decoder_learning_rate: peak of the second phase.
        clips: clips of 9 frames and half the frame's side per step; other shapes keep the pixel count.
        size_px: side of the toy world's frames.
        latent_channels: channels of a latent.
        patch_size: pixels folded into channels on both sides; 8 * patch_size is the spatial ratio.
        encoder_width: channels of every encoder stage.
        decoder_widths: channels of the three decoder stages and of the last layer.
        object_weight: extra weight of pixels on and around objects.
        latents_noise: largest noise added to latents before decoding, in standard deviations, so that
            imperfect latents still decode well.
        moments_weight: weight of the pull of latents to mean 0 and standard deviation 1 per channel.
        checkpoint_steps: steps between checkpoints.
        evaluate_steps: steps between evaluations.
        seed: of weights, scenes and noise.
        precision: "bf16" is twice as fast where the processor has it.
    """

    joint_steps: int = 4500
    decoder_steps: int = 3000
    joint_learning_rate: float = 1.5e-3
    decoder_learning_rate: float = 1e-3
    clips: int = 8
    size_px: int = 128
    latent_channels: int = 16
    patch_size: int = 2
    encoder_width: int = 40
    decoder_widths: tuple[int, int, int, int] = (80, 64, 48, 32)
    object_weight: float = 4.0
    latents_noise: float = 0.15
    moments_weight: float = 0.01
    checkpoint_steps: int = 500
    evaluate_steps: int = 500
    seed: int = 0
    precision: Precision = "bf16"

    def __post_init__(self) -> None:
        check_counts(joint_steps=self.joint_steps, decoder_steps=self.decoder_steps)
        for name in ("joint_learning_rate", "decoder_learning_rate"):
            check_learning_rate(name, getattr(self, name))
        _ = self.loop("decoder")  # checks the rest, of the larger seed too
        check_not_negative(object_weight=self.object_weight, moments_weight=self.moments_weight)
        if self.clips < 4:
            raise ValueError(f"clips must be at least 4, got {self.clips}")
        for name in ("encoder_width", "latent_channels"):
            if (value := getattr(self, name)) < PASSED_CHANNELS:
                raise ValueError(f"{name} must be at least {PASSED_CHANNELS}, got {value}")
        unit = 8 * self.patch_size * max(parts for parts, _ in _CLIP_SHAPES)
        if self.size_px < unit or self.size_px % unit:
            raise ValueError(
                f"size_px must be a multiple of {unit} for patch_size {self.patch_size}, got {self.size_px}"
            )
        if not 0 <= self.latents_noise < 1:
            raise ValueError(f"latents_noise must be in [0, 1), got {self.latents_noise}")

    def loop(self, phase: Literal["joint", "decoder"]) -> LoopSettings:
        """Loop settings of one phase."""
        joint = phase == "joint"
        return LoopSettings.of(
            self,
            total_steps=self.joint_steps if joint else self.decoder_steps,
            learning_rate=self.joint_learning_rate if joint else self.decoder_learning_rate,
            seed=2 * self.seed + (0 if joint else 1),
        )


def train_vae(settings: VAETrainingSettings, output: Path) -> None:
    """Train both phases, continuing what `output` already holds; the result is the component `output`/vae."""
    steps = settings.joint_steps + settings.decoder_steps
    if is_finished(output / _RESULT_FOLDER, _NAME, settings, steps, Origins()):
        return
    with claimed_run(output, settings, Origins()):
        torch.manual_seed(settings.seed)
        frozen_folder = output / FROZEN_ENCODER_FOLDER
        if not frozen_folder.is_dir():
            joint = VAETrainee(settings, _new_vae(settings))
            run(settings.loop("joint"), joint, output / _JOINT_FOLDER)
            once(lambda: save_component(normalise_latents(joint.module, settings), frozen_folder))
            once(lambda: logger.info("encoder frozen in %s", frozen_folder))
        vae: TinyVideoVAE = TinyVideoVAE.from_pretrained(frozen_folder)
        vae.encoder.requires_grad_(requires_grad=False)
        run(settings.loop("decoder"), VAETrainee(settings, vae), output / _DECODER_FOLDER)
        once(lambda: export(vae, settings, output))
    once(lambda: logger.info("trained VAE in %s", output / _RESULT_FOLDER))


def export(vae: TinyVideoVAE, settings: VAETrainingSettings, run_folder: Path) -> None:
    """Write a trained VAE as a diffusers component, in half precision."""
    folder = run_folder / _RESULT_FOLDER
    save_component(vae.half(), folder)
    logs = {f"vae_{phase}": run_folder / phase / "log.csv" for phase in (_JOINT_FOLDER, _DECODER_FOLDER)}
    steps = sum(steps_taken(run_folder / phase) for phase in (_JOINT_FOLDER, _DECODER_FOLDER))
    training = Training(name=_NAME, part="vae", run=run_folder, settings=settings, logs=logs, steps=steps)
    write_record(folder, training)


class VAETrainee:
    """A VAE with its reconstruction objective; a frozen encoder stays frozen."""

    def __init__(self, settings: VAETrainingSettings, vae: TinyVideoVAE) -> None:
        self.settings = settings
        self.module = vae
        self.world = ToyWorld(height=settings.size_px, width=settings.size_px)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Weighted Charbonnier distance of the reconstruction, and the pull on the latents' moments."""
        vae, settings = self.module, self.settings
        frames, weights = self._batch(step)
        with torch.set_grad_enabled(self._trains_encoder):
            latents = vae.encode(frames).float()
        std = latents.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        sigma = torch.rand((len(latents), 1, 1, 1, 1), device=latents.device) * settings.latents_noise
        decoded = vae.decode_unclamped(latents + sigma * std * torch.randn_like(latents)).float()
        error = decoded - frames
        distance = (weights * (error.square() + 1e-4).sqrt()).sum() / (3 * weights.sum())
        moments = _moments_penalty(latents)
        parts = {"distance": distance.item(), "moments": moments.item(), "psnr_db": psnr_db(error)}
        return distance + settings.moments_weight * moments, parts

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """PSNR in dB on whole clips that were never trained on: all pixels, and those of objects."""
        module = self.module
        total, objects = [], []
        for index in range(_EVALUATION_CLIPS):
            scene = self.world.scene(index, "eval")
            clip = self.world.frames(scene, _EVALUATION_FRAMES)
            frames = to_tensor(clip[None]).to(module.device)
            error = module(frames) - frames
            mask = _object_mask(clip, scene.background).to(module.device)
            total.append(psnr_db(error))
            objects.append(psnr_db(error[0].transpose(0, 1).masked_select(mask)))
        return {"psnr_db": float(np.mean(total)), "object_psnr_db": float(np.mean(objects))}

    @property
    def _trains_encoder(self) -> bool:
        return next(self.module.encoder.parameters()).requires_grad

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Frames [B, 3, F, H, W] and pixel weights [B, 1, F, H, W] of a step."""
        settings = self.settings
        parts, num_frames = _CLIP_SHAPES[step % len(_CLIP_SHAPES)]
        side = settings.size_px // parts
        batch_size = max(1, settings.clips * 9 * parts**2 // (num_frames * 4))
        rng = own_rng(2 * settings.seed + self._trains_encoder, step)
        clips, weights = [], []
        for _ in range(batch_size):
            clip, background = self._crop(num_frames, side, rng)
            mask = _object_mask(clip, background).float()
            near = F.max_pool2d(mask, 2 * _EDGE_PX + 1, stride=1, padding=_EDGE_PX)
            clips.append(to_tensor(clip[None]))
            weights.append(1 + settings.object_weight * near.transpose(0, 1)[None])
        device = self.module.device
        return torch.cat(clips).to(device), torch.cat(weights).to(device)

    def _crop(self, frames: int, side: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], str]:
        """A clip [F, side, side, 3] with an object in it, and its background."""
        if not self._trains_encoder and rng.random() < _CONTACTS:
            scene, frame, row, column = self._contact(rng)
            start = max(0, frame - int(rng.integers(frames)))
            return _crop_around(
                self.world.frames(scene, frames, start), row, column, side, rng
            ), scene.background
        scene = self._scene(rng)
        clip = self.world.frames(scene, frames, int(rng.integers(LATEST_START_FRAME)))
        return crop_around_object(clip, scene.background, side, rng), scene.background

    def _scene(self, rng: np.random.Generator) -> Scene:
        return self.world.scene(int(rng.integers(2**31)), "train")

    def _contact(self, rng: np.random.Generator) -> tuple[Scene, int, int, int]:
        """A scene, and frame, row and column where two objects touch or overlap."""
        height, width, fps = self.world.height, self.world.width, self.world.fps
        times_s = np.arange(LATEST_START_FRAME) / fps
        while True:
            scene = self._scene(rng)
            if len(scene.objects) == 1:
                continue
            one, other = (item.centres(times_s, height, width) for item in scene.objects)
            reach = sum(item.extent for item in scene.objects) * self.world.short_side
            frames = np.flatnonzero(np.linalg.norm(one - other, axis=1) < reach)
            if len(frames):
                frame = int(rng.choice(frames))
                column, row = (one[frame] + other[frame]) / 2
                return scene, frame, int(row), int(column)


def normalise_latents(vae: TinyVideoVAE, settings: VAETrainingSettings) -> TinyVideoVAE:
    """The same VAE with the statistics of its latents on training clips in its configuration."""
    world = ToyWorld(height=settings.size_px, width=settings.size_px)
    latents = []
    with torch.no_grad():
        for index in range(_STATISTICS_CLIPS):
            clip = world.frames(world.scene(index, "train"), _EVALUATION_FRAMES)
            latents.append(vae.encode(to_tensor(clip[None]).to(vae.device)))
    return with_statistics(vae, torch.cat(latents))


def _new_vae(settings: VAETrainingSettings) -> TinyVideoVAE:
    vae: TinyVideoVAE = TinyVideoVAE(
        latent_channels=settings.latent_channels,
        patch_size=settings.patch_size,
        encoder_width=settings.encoder_width,
        decoder_widths=list(settings.decoder_widths),
        first_frame_copies=3,
        encoder_start="still",
    )
    initialise(vae)
    return vae


def _object_mask(clip: NDArray[np.uint8], background: str) -> Tensor:
    """Where frames [F, H, W, 3] differ from the background, [F, 1, H, W]."""
    colour = np.array(BACKGROUND_RGB[background], dtype=np.uint8)
    return torch.from_numpy((clip != colour).any(axis=-1))[:, None]


def crop_around_object(
    clip: NDArray[np.uint8], background: str, side: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """A square crop of [F, H, W, 3] that holds a random object pixel of a random frame, if there is one."""
    frame = clip[rng.integers(len(clip))]
    pixels = np.argwhere((frame != np.array(BACKGROUND_RGB[background], dtype=np.uint8)).any(axis=-1))
    row, column = pixels[rng.integers(len(pixels))] if len(pixels) else (0, 0)
    return _crop_around(clip, int(row), int(column), side, rng)


def _crop_around(
    clip: NDArray[np.uint8], row: int, column: int, side: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """A square crop of [F, H, W, 3] that holds a pixel, at a random place in it."""
    height, width = clip.shape[1:3]
    top = int(np.clip(row - rng.integers(side), 0, height - side))
    left = int(np.clip(column - rng.integers(side), 0, width - side))
    return clip[:, top : top + side, left : left + side]


def _moments_penalty(latents: Tensor) -> Tensor:
    """Squared mean and squared log standard deviation per channel, averaged over channels."""
    values = latents.transpose(0, 1).flatten(1)  # [C, B*T*h*w]
    log_std = 0.5 * torch.log(values.var(dim=1) + 1e-6)
    return (values.mean(dim=1).square() + log_std.square()).mean()
