"""Distils the decoder of a VAE on disk into a smaller one, also on disk.

`genstream distill vae --teacher toyworld --output runs/distilled` gives the embedded model's VAE a decoder of
four blocks in place of nine, which folds 4x4 pixels in place of 2x2; its first stages are as wide as the
teacher's and start with its weights. Encoder and statistics of the latents stay, so that the result stands in
for its teacher in any pipeline.
"""

import logging
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from genstream.io.model_folder import installed_folder
from genstream.training.components import save_component
from genstream.training.initialisation import initialise_decoder, take_over_decoder
from genstream.training.loop import run, steps_taken
from genstream.training.processes import once, process
from genstream.training.record import (
    RECORD_FOLDER,
    Origins,
    Training,
    claimed_run,
    is_finished,
    write_record,
)
from genstream.training.vae_clips import clip_source
from genstream.training.vae_distillation import (
    DecoderDistillation,
    DistillationSettings,
    FeaturePair,
    Student,
    Teacher,
)
from genstream.training.vae_run import VAERunSettings, last_figures
from genstream.vae.loading import component_folder, load_vae
from genstream.vae.protocol import RGB, VAESpec
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.tiny_blocks import HALVING, STAGES
from genstream.vae.turbo import TurboVAED

logger = logging.getLogger(__name__)

_RESULT_FOLDER = "vae"
_NAME = "distilled_vae"
"""In the record."""
_TINY_WIDTHS = (80, 64, 32, 32)
_TURBO_WIDTH, _TURBO_MOST_WIDTH = 16, 256
_TIMED_LATENTS = 3
_TIMED_RUNS = 5


@dataclass(frozen=True, kw_only=True)
class VAEDistillationSettings(VAERunSettings):
    """The teacher, what the student looks like, and what brings it closer.

    Attributes:
        teacher: folder of a video VAE, of this library or of diffusers, or of a model with one, or the name
            of an installed model.
        student: "tiny" is TinyVideoVAE; it keeps the encoder of a teacher of that kind, and learns one for
            any other teacher. "turbo" is Turbo-VAED, only a decoder.
        widths: channels of the student's decoder from the latents to the frames: of "tiny" four, 80, 64, 32
            and 32 when None; of "turbo" one for each size of frames on the way, doubling from 16 to at most
            256 when None.
        blocks: residual blocks of each stage of the decoder of "tiny".
        growths: stages of it that double height and width, the first ones; the last layer unfolds the rest.
        encoder_width: channels of the encoder that "tiny" learns.
        layers: residual blocks of each level of "turbo".
        causal: whether "turbo" looks back only and so streams exactly; published ones do not.
        pixel_weight: of the mean absolute error of pixels; like all weights, 0 switches it off.
        squared_weight: of their mean squared error, which PSNR measures.
        latent_weight: of the mean squared error of the latents of the encoder that "tiny" learns.
        feature_weight: of the mean squared error of features, for each of `feature_pairs`.
        feature_pairs: layers that are brought together, each "layer of the student=layer of the teacher".
        head_channels: width of the heads between them.
        latents_noise: largest noise added to latents before decoding, in standard deviations, so that
            imperfect latents still decode well.
    """

    total_steps: int = 13000
    learning_rate: float = 3e-3
    crop_px: tuple[int, ...] = (32, 64, 32, 128)
    clip_latents: tuple[int, ...] = (2, 3, 5)
    teacher: str = "toyworld"
    student: Literal["tiny", "turbo"] = "tiny"
    widths: tuple[int, ...] | None = None
    blocks: tuple[int, ...] = (2, 1, 1)
    growths: int = 2
    encoder_width: int = 64
    layers: int = 2
    causal: bool = True
    pixel_weight: float = 1.0
    squared_weight: float = 10.0
    latent_weight: float = 1.0
    feature_weight: float = 1.0
    feature_pairs: tuple[str, ...] = ()
    head_channels: int = 64
    latents_noise: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student not in ("tiny", "turbo"):
            raise ValueError(f"student must be 'tiny' or 'turbo', got {self.student!r}")
        least = RGB if self.student == "tiny" else 1  # its first channels carry the colours
        if self.widths is not None and min(self.widths, default=0) < least:
            raise ValueError(f"widths must be numbers of at least {least}, got {list(self.widths)}")
        if not 0 <= self.growths <= STAGES:
            raise ValueError(f"growths must be from 0 to {STAGES}, got {self.growths}")
        for name in ("layers", "encoder_width"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        _ = self.objective  # checks its part

    @property
    def origins(self) -> Origins:
        """The teacher too."""
        others = super().origins
        return replace(others, models={**others.models, "teacher": partial(_teacher_folder, self.teacher)})

    @property
    def objective(self) -> DistillationSettings:
        """How much each loss counts."""
        return DistillationSettings(
            pixel_weight=self.pixel_weight,
            squared_weight=self.squared_weight,
            latent_weight=self.latent_weight,
            perceptual_weight=self.perceptual_weight,
            feature_weight=self.feature_weight,
            pairs=tuple(_pair(text) for text in self.feature_pairs),
            head_channels=self.head_channels,
            latents_noise=self.latents_noise,
        )


def distill_vae(settings: VAEDistillationSettings, output: Path) -> None:
    """Train the student, continuing what `output` already holds; the result is the component `output`/vae."""
    if is_finished(output / _RESULT_FOLDER, _NAME, settings, settings.total_steps, settings.origins):
        return
    device = process().device
    teacher_folder = _teacher_folder(settings.teacher)
    teacher = _load_teacher(teacher_folder, device)
    torch.manual_seed(settings.seed)
    student = _new_student(settings, teacher).to(device)
    trainee = DecoderDistillation(
        settings.objective,
        student,
        teacher,
        clip_source(settings, teacher.spec),
        settings.perceptual(device),
    )
    with claimed_run(output, settings, settings.origins):
        run(settings.loop, trainee, output)
        once(lambda: export(student, teacher, settings, output))


def export(student: Student, teacher: Teacher, settings: VAEDistillationSettings, output: Path) -> None:
    """Write a distilled VAE as a diffusers component, in half precision."""
    teacher_folder = _teacher_folder(settings.teacher)
    speedup = _speedup(student, teacher, settings.size_px)
    folder = output / _RESULT_FOLDER
    save_component(student.half(), folder)
    if (teacher_folder / RECORD_FOLDER).is_dir():
        shutil.copytree(teacher_folder / RECORD_FOLDER, folder / RECORD_FOLDER)
    results = {**last_figures(output), "speedup": speedup}
    write_record(folder, _training(settings, output, results))
    logger.info("%.2f times as fast as its teacher; distilled VAE in %s", speedup, folder)


def _training(settings: VAEDistillationSettings, output: Path, results: dict[str, float]) -> Training:
    logs = {_NAME: output / "log.csv", f"{_NAME}_evaluation": output / "evaluation.csv"}
    return Training(
        name=_NAME,
        part="vae",
        verb="distill",
        run=output,
        settings=settings,
        logs=logs,
        steps=steps_taken(output),
        results=results,
    )


def _teacher_folder(teacher: str) -> Path:
    return component_folder(installed_folder(teacher) or teacher)


def _load_teacher(folder: Path, device: torch.device) -> Teacher:
    try:
        teacher = load_vae(folder, torch.float32, device)
    except ValueError as error:
        raise ValueError(f"teacher must be a VAE: {error}") from error
    if isinstance(teacher, TurboVAED):
        raise ValueError(f"teacher must encode its clips, got TurboVAED in {str(folder)!r}, only a decoder")
    if isinstance(teacher, TinyVideoVAE) and not teacher.is_aligned:
        raise ValueError(
            f"teacher must decode frames at the places that it encoded, got first_frame_copies = 0 in "
            f"{str(folder)!r}: save what load_taehv gives with r - 1 of them"
        )
    return teacher


def _new_student(settings: VAEDistillationSettings, teacher: Teacher) -> Student:
    if settings.student == "turbo":
        return _turbo_student(settings, teacher.spec)
    if isinstance(teacher, TinyVideoVAE):
        return _tiny_student(settings, teacher)
    return _tiny_student_of_another(settings, teacher.spec)


def _tiny_student(settings: VAEDistillationSettings, teacher: TinyVideoVAE) -> TinyVideoVAE:
    """The teacher with another decoder; its encoder is not trained."""
    # Private entries record which values were defaults, and would discard the others.
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    student: TinyVideoVAE = TinyVideoVAE(**{**config, **_tiny_decoder(settings, teacher.spec)})
    initialise_decoder(student)
    take_over_decoder(student, teacher)
    student.encoder.load_state_dict(teacher.encoder.state_dict())
    student.encoder.requires_grad_(requires_grad=False)
    return student


def _tiny_decoder(settings: VAEDistillationSettings, spec: VAESpec) -> dict[str, Any]:
    """Configuration of a decoder of the teacher's ratio."""
    grown = HALVING**settings.growths
    return {
        "decoder_widths": list(settings.widths or _TINY_WIDTHS),
        "decoder_blocks": list(settings.blocks),
        "decoder_block": "base",
        "decoder_spatial_strides": [HALVING] * settings.growths + [1] * (STAGES - settings.growths),
        "decoder_patch_size": spec.spatial_ratio // grown,
    }


def _tiny_student_of_another(settings: VAEDistillationSettings, spec: VAESpec) -> TinyVideoVAE:
    """Ratios of the teacher, whose normalised latents the encoder learns to give out."""
    doublings = _doublings(spec.temporal_ratio)
    if doublings > STAGES or spec.first_frames != 1 or spec.spatial_ratio % HALVING**STAGES:
        raise ValueError(
            f"student must be 'turbo' for this teacher: 'tiny' has a temporal ratio up to {2**STAGES}, one "
            f"first frame and a spatial ratio that divides by {HALVING**STAGES}, got {spec}"
        )
    strides = [1] * (STAGES - doublings) + [2] * doublings
    student: TinyVideoVAE = TinyVideoVAE(
        latent_channels=spec.latent_channels,
        patch_size=spec.spatial_ratio // HALVING**STAGES,
        encoder_width=settings.encoder_width,
        **_tiny_decoder(settings, spec),
        encoder_temporal_strides=strides[::-1],
        decoder_temporal_strides=strides,
        first_frame_copies=spec.temporal_ratio - 1,
    )
    initialise_decoder(student)
    return student


def _turbo_student(settings: VAEDistillationSettings, spec: VAESpec) -> TurboVAED:
    """Ratios of the teacher; the frame rate doubles first, at the small sizes, where that is cheap."""
    patch_size = 4 if spec.spatial_ratio > 16 else 1
    growths, temporal = _doublings(spec.spatial_ratio // patch_size), _doublings(spec.temporal_ratio)
    default = [min(_TURBO_WIDTH << level, _TURBO_MOST_WIDTH) for level in range(growths, -1, -1)]
    widths = default if settings.widths is None else list(settings.widths)
    if len(widths) != growths + 1:
        raise ValueError(
            f"widths must be {growths + 1} numbers for a teacher of spatial ratio {spec.spatial_ratio}, "
            f"got {widths}"
        )
    if temporal > growths:
        raise ValueError(f"student 'turbo' has {growths} levels that grow, too few for {temporal} in time")
    levels = growths + 1
    student: TurboVAED = TurboVAED(
        latent_channels=spec.latent_channels,
        patch_size=patch_size,
        decoder_block_out_channels=widths[::-1],
        decoder_layers_per_block=[settings.layers] * (levels + 1),
        # Depthwise where channels are many, as published.
        decoder_is_dw_conv=[False] * (levels - 1) + [True, True],
        spatio_temporal_scaling=[True] * growths + [False],
        decoder_spatio_only=[True] * (growths - temporal) + [False] * (temporal + 1),
        decoder_causal=settings.causal,
        depthwise_causal=settings.causal,
        is_video_dc_ae=spec.first_frames == spec.temporal_ratio,
        takes_normalised=True,
    )
    return student


def _doublings(ratio: int) -> int:
    """How often a size doubles on the way from latents to frames."""
    count = ratio.bit_length() - 1
    if ratio != 2**count:
        raise ValueError(f"teacher must have ratios that are powers of 2, got {ratio}")
    return count


def _pair(text: str) -> FeaturePair:
    student, sign, teacher = text.partition("=")
    if not (student and sign and teacher):
        raise ValueError(f"feature_pairs must be like 'student.layer=teacher.layer', got {text!r}")
    return FeaturePair(student=student, teacher=teacher)


@torch.no_grad()
def _speedup(student: Student, teacher: Teacher, size_px: int) -> float:
    """How many times faster a chunk of frames decodes; runs take turns, so that load falls on both alike."""
    decoders = [_chunk_decoder(vae, size_px) for vae in (student, teacher)]
    times: list[list[float]] = [[], []]
    for _ in range(_TIMED_RUNS):
        for decode, seconds in zip(decoders, times, strict=True):
            started = time.perf_counter()
            decode()
            seconds.append(time.perf_counter() - started)
    ours, theirs = (statistics.median(seconds) for seconds in times)
    return theirs / ours


def _chunk_decoder(vae: Student | Teacher, size_px: int) -> Callable[[], Tensor]:
    """Decodes the next chunk of a stream that runs already, down to the last pixel."""
    spec = vae.spec
    side = size_px // spec.spatial_ratio
    latents = torch.zeros(
        (1, spec.latent_channels, _TIMED_LATENTS, side, side), dtype=vae.dtype, device=vae.device
    )
    state = vae.init_state("decode", 1, size_px, size_px)
    vae.decode_chunk(latents, state)

    # Copying a pixel to the CPU waits for an accelerator to be done.
    return lambda: vae.decode_chunk(latents, state).flatten()[-1:].cpu()
