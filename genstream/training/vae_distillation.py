"""Distils the decoder of a video VAE into a smaller one (Turbo-VAED, 2508.09136).

The teacher stays as it is and encodes the clips. The student learns to decode its latents to the clips'
pixels, while small heads keep some of its features near the teacher's. The published recipe is L1, LPIPS and
features at weight 1 each, clips of 17 frames at 256x256, AdamW at 1e-4, an average over weights at 0.999.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genstream.shapes import check_not_negative
from genstream.training.vae_losses import Perceptual, psnr_db
from genstream.training.vae_windows import ClipSource
from genstream.vae.adapters.base import Adapter
from genstream.vae.causal import CausalVideoVAE
from genstream.vae.layers import FrameConv, to_images, to_video
from genstream.vae.protocol import VAESpec
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.turbo import TurboVAED
from genstream.vae.wan import WanVideoVAE

_NAMED = 24
"""Layers that an error lists."""
Student = TurboVAED | TinyVideoVAE | CausalVideoVAE
Teacher = CausalVideoVAE | TinyVideoVAE | WanVideoVAE | Adapter
"""Any of the video VAEs that encode, on the student's device."""


@dataclass(frozen=True, kw_only=True)
class FeaturePair:
    """Dotted names of two layers whose outputs are brought together, such as "decoder.mid_block"."""

    student: str
    teacher: str


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """How much each loss counts; 0 switches it off.

    Attributes:
        pixel_weight: of the mean absolute error of pixels.
        squared_weight: of their mean squared error, which PSNR measures.
        latent_weight: of the mean squared error of latents, where the student has an encoder that is not
            frozen.
        perceptual_weight: of the distance that the caller passes in; the published recipe has LPIPS at 1.
        feature_weight: of the sum over `pairs` of the mean squared error of features.
        pairs: layers that are brought together.
        head_channels: width of the heads between them.
        latents_noise: largest noise added to latents before decoding, in standard deviations, so that
            imperfect latents still decode well.
    """

    pixel_weight: float = 1.0
    squared_weight: float = 0.0
    latent_weight: float = 0.0
    perceptual_weight: float = 0.0
    feature_weight: float = 1.0
    pairs: tuple[FeaturePair, ...] = ()
    head_channels: int = 64
    latents_noise: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative(
            pixel_weight=self.pixel_weight,
            squared_weight=self.squared_weight,
            latent_weight=self.latent_weight,
            perceptual_weight=self.perceptual_weight,
            feature_weight=self.feature_weight,
        )
        by_features = self.feature_weight if self.pairs else 0.0
        if not self.pixel_weight + self.squared_weight + self.perceptual_weight + by_features > 0:
            raise ValueError(
                "pixel_weight, squared_weight, perceptual_weight or, with pairs, feature_weight must be "
                "above 0, got 0 for all: nothing else reaches the decoder"
            )
        if self.head_channels < 1:
            raise ValueError(f"head_channels must be at least 1, got {self.head_channels}")
        if not 0 <= self.latents_noise < 1:
            raise ValueError(f"latents_noise must be in [0, 1), got {self.latents_noise}")


class FeatureHead(nn.Module):
    """Two 1x1 convolutions and a pixel shuffle from a student's features to the size of a teacher's."""

    def __init__(self, inputs: int, hidden: int, outputs: int, upscale: int) -> None:
        super().__init__()
        self.upscale = upscale
        self.layers = nn.Sequential(
            FrameConv(inputs, hidden, 1), nn.SiLU(), FrameConv(hidden, outputs * upscale**2, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, F, h, w] to [B, C', F, h * upscale, w * upscale]."""
        images = F.pixel_shuffle(to_images(self.layers(features)), self.upscale)
        return to_video(images, features.shape[0])


class Distilled(nn.Module):
    """A student and the heads that are trained with it and thrown away afterwards."""

    def __init__(self, student: Student, heads: Sequence[FeatureHead]) -> None:
        super().__init__()
        self.student = student
        self.heads = nn.ModuleList(heads)


class DecoderDistillation:
    """A student's decoder with the objective to replace its teacher's; a `Trainee`.

    The student decodes the latents that its teacher gives out, which are normalised: one made for this
    purpose needs no statistics of its own.

    Args:
        settings: of the losses.
        student: whose decoder is trained, on the teacher's latents, and its encoder too where it has one
            that is not frozen and `latent_weight` is above 0.
        teacher: frozen.
        clips: to train on and to be judged by.
        perceptual: distance of images, needed for its weight above 0.
    """

    def __init__(
        self,
        settings: DistillationSettings,
        student: Student,
        teacher: Teacher,
        clips: ClipSource,
        perceptual: Perceptual | None = None,
    ) -> None:
        if settings.perceptual_weight > 0 and perceptual is None:
            raise ValueError(
                f"perceptual must be given for perceptual_weight = {settings.perceptual_weight}, got None"
            )
        _check_specs(student.spec, teacher.spec)
        self.settings = settings
        self.teacher = teacher
        self.clips = clips
        self.perceptual = perceptual
        self.pairs = settings.pairs if settings.feature_weight > 0 else ()
        self.module = Distilled(student, [self._head(student, pair) for pair in self.pairs])
        self.trains_encoder = settings.latent_weight > 0 and _has_free_encoder(student)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Weighted sum of the losses that are switched on, and its parts without their weights."""
        settings, student = self.settings, self.module.student
        frames = self.clips.training(step).to(student.device)
        latents, noisy, targets = self._taught(frames)
        with _captured(student, [pair.student for pair in self.pairs]) as features:
            decoded = _decoded_like(student, noisy, frames)
        parts = {"pixel": (decoded - frames).abs().mean()}
        if settings.squared_weight > 0:
            parts["squared"] = F.mse_loss(decoded, frames)
        if settings.perceptual_weight > 0 and self.perceptual is not None:
            parts["perceptual"] = self.perceptual(to_images(decoded), to_images(frames)).mean()
        if self.trains_encoder:
            parts["latent"] = F.mse_loss(student.encode(frames).to(latents.dtype), latents)
        if self.pairs:
            parts["feature"] = self._feature_distance(features, targets, len(frames))
        total = sum(
            (getattr(settings, f"{name}_weight") * part for name, part in parts.items()),
            decoded.new_zeros(()),
        )
        return total, {name: part.item() for name, part in parts.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """PSNR in dB on clips that were never trained on.

        Of the student and of its teacher on the teacher's latents, and of the student on its own where its
        encoder is trained.
        """
        student, figures = self.module.student, []
        for clip in self.clips.evaluation:
            frames = clip.to(student.device)
            latents = self.teacher.encode(frames)
            decoded = {
                "psnr_db": student.decode(latents),
                "teacher_psnr_db": self.teacher.decode(latents),
            }
            if self.trains_encoder:
                decoded["own_psnr_db"] = student(frames)
            figures.append({name: psnr_db(result - frames) for name, result in decoded.items()})
        return {name: sum(row[name] for row in figures) / len(figures) for name in figures[0]}

    @torch.no_grad()
    def _taught(self, frames: Tensor) -> tuple[Tensor, Tensor, dict[str, list[Tensor]]]:
        """The teacher's latents, the same with noise, and its features while it decodes those."""
        with _captured(self.teacher, [pair.teacher for pair in self.pairs]) as targets:
            # Also where autocast made them coarser: not every teacher decodes what it gave out then.
            latents = self.teacher.encode(frames).to(frames.dtype)
            shape = (len(latents), 1, 1, 1, 1)
            sigma = torch.rand(shape, device=latents.device) * self.settings.latents_noise
            noisy = latents + sigma * torch.randn_like(latents)
            if self.pairs:
                self.teacher.decode(noisy)
        return latents, noisy, targets

    def _feature_distance(
        self, features: dict[str, list[Tensor]], targets: dict[str, list[Tensor]], batch_size: int
    ) -> Tensor:
        total = torch.zeros((), device=self.module.student.device)
        for pair, head in zip(self.pairs, self.module.heads, strict=True):
            ours = head(_as_video(features[pair.student], batch_size))
            theirs = _as_video(targets[pair.teacher], batch_size)
            # Some decoders drop the surplus of the first group late and some early: the ends are the same.
            count = min(ours.shape[2], theirs.shape[2])
            total = total + F.mse_loss(ours[:, :, -count:].to(theirs.dtype), theirs[:, :, -count:])
        return total

    @torch.no_grad()
    def _head(self, student: Student, pair: FeaturePair) -> FeatureHead:
        """A head of the sizes that two layers turn out to have."""
        spec = student.spec
        # So many latent frames that layers of different frame rates differ by more than the surplus.
        latents = torch.zeros(
            (1, spec.latent_channels, spec.temporal_ratio + 1, 2, 2),
            device=student.device,
            dtype=student.dtype,
        )
        with (
            _captured(student, [pair.student]) as features,
            _captured(self.teacher, [pair.teacher]) as targets,
        ):
            student.decode(latents)
            self.teacher.decode(latents)
        ours, theirs = _as_video(features[pair.student], 1), _as_video(targets[pair.teacher], 1)
        upscale = theirs.shape[3] // ours.shape[3]
        surplus = abs(theirs.shape[2] - ours.shape[2])
        if theirs.shape[3] != upscale * ours.shape[3] or surplus >= spec.temporal_ratio:
            raise ValueError(
                f"{pair} must join layers of one frame rate, the teacher's a multiple in size, "
                f"got {list(ours.shape)} and {list(theirs.shape)}"
            )
        return FeatureHead(ours.shape[1], self.settings.head_channels, theirs.shape[1], upscale)


def _has_free_encoder(student: Student) -> bool:
    if isinstance(student, TurboVAED):
        return False
    return any(weight.requires_grad for weight in student.encoder.parameters())


def _decoded_like(student: Student, latents: Tensor, frames: Tensor) -> Tensor:
    """The student's frames, which must be as many and as large as the clip's."""
    decoded: Tensor = student.decode_unclamped(latents)
    if decoded.shape != frames.shape:
        raise ValueError(f"clips must be {list(decoded.shape)} like the student's, got {list(frames.shape)}")
    return decoded.to(frames.dtype)


@contextmanager
def _captured(vae: Student | Teacher, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What the named layers put out meanwhile, in the order of their runs."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            # Layers with a memory put it out behind their result.
            value = output[0] if isinstance(output, tuple) else output
            assert isinstance(value, Tensor)
            outputs[name].append(value)

        return hook

    handles = [_layer(vae, name).register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _layer(vae: Student | Teacher, name: str) -> nn.Module:
    """A layer by its dotted name."""
    network = vae.vae if isinstance(vae, Adapter) else vae
    layers = dict(network.named_modules())
    layer: nn.Module | None = layers.get(name)
    if layer is None:
        known = [other for other in layers if other.startswith("decoder") and other.count(".") == 1]
        raise ValueError(
            f"pairs must name layers of {type(network).__name__}, such as {', '.join(known[:_NAMED])}; "
            f"got {name!r}"
        )
    return layer


def _as_video(outputs: list[Tensor], batch_size: int) -> Tensor:
    """Outputs of a layer that works on videos or on batches of images, as one [B, C, F, h, w]."""
    if not outputs:
        raise ValueError("pairs must name layers that run by themselves when a clip is decoded")
    return torch.cat([to_video(part, batch_size) if part.dim() == 4 else part for part in outputs], dim=2)


def _check_specs(student: VAESpec, teacher: VAESpec) -> None:
    for name in ("temporal_ratio", "spatial_ratio", "latent_channels"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            raise ValueError(f"student must have the teacher's {name} = {theirs}, got {ours}")
