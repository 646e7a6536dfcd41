"""The same clip through several video VAEs: how close, how steady, how fast."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from genstream.cli.contact_sheet import contact_sheet
from genstream.cli.pipeline import to_uint8
from genstream.cli.process import peak_memory_since, restart_peak_memory
from genstream.cli.units import mib
from genstream.evaluation.quality import flicker, psnr, ssim
from genstream.training.clips import to_tensor
from genstream.vae.protocol import Direction, StreamingVAE, VAESpec
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.turbo import TurboVAED
from genstream.vae.wrapping import module_of

_TIMES = 4
_ERROR_GAIN = 8
_GREY = 128

Frames = NDArray[np.uint8]
"""[F, H, W, 3]"""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What a VAE makes of a clip; `flicker` of 255, rates in frames per second.

    The peak of memory holds weights and clip too, on a CPU the whole process; None where it is not known.
    """

    vae: str
    frames: Frames
    psnr_db: float
    ssim: float
    flicker: float
    encode_frame_rate: float
    decode_frame_rate: float
    peak_memory_bytes: int | None

    def as_json(self) -> dict[str, object]:
        """All figures but the frames."""
        return {name: value for name, value in vars(self).items() if name != "frames"}


@torch.no_grad()
def reconstruct(clip: Frames, name: str, encoder: StreamingVAE, decoder: StreamingVAE) -> Reconstruction:
    """Encode with one VAE, decode with the same or another one, each chunk by chunk."""
    _check_clip(clip, name, encoder.spec, decoder.spec)
    if isinstance(module_of(encoder), TurboVAED):
        raise ValueError(f"{name} must start with a VAE that encodes, as ENCODER+DECODER: it only decodes")
    like = next(iter(encoder.init_state("encode", 1, *clip.shape[1:3]).slots.values()))
    counts_memory = restart_peak_memory(like.device)
    frames = to_tensor(clip[None]).to(like)
    lead = _leading_copies(encoder)
    if lead:
        frames = torch.cat([frames[:, :, :1].expand(-1, -1, lead, -1, -1), frames], dim=2)
    _stream(encoder, "encode", frames[:, :, : lead + 1])
    latents, encode_s = _stream(encoder, "encode", frames)
    _stream(decoder, "decode", latents[:, :, :1])
    decoded, decode_s = _stream(decoder, "decode", latents)
    peak = peak_memory_since(like.device) if counts_memory else None
    if not bool(decoded.isfinite().all()):
        raise ValueError(
            f"{name} gives frames that are not finite: its weights are broken or overflow in {like.dtype}"
        )
    again = to_uint8(decoded)
    return Reconstruction(
        vae=name,
        frames=again,
        psnr_db=psnr(clip, again),
        ssim=ssim(clip, again),
        flicker=flicker(clip, again),
        encode_frame_rate=len(clip) / encode_s,
        decode_frame_rate=len(clip) / decode_s,
        peak_memory_bytes=peak,
    )


def _check_clip(clip: Frames, name: str, encoder: VAESpec, decoder: VAESpec) -> None:
    ratio, first = encoder.temporal_ratio, encoder.first_frames
    if len(clip) < first or (len(clip) - first) % ratio:
        raise ValueError(f"frames (--frames) must be {first} + {ratio}n for {name}, got {len(clip)}")
    sides = [
        (spec.latent_channels, spec.temporal_ratio, spec.spatial_ratio, spec.first_frames)
        for spec in (encoder, decoder)
    ]
    if sides[0] != sides[1]:
        raise ValueError(
            f"{name} must name two VAEs with the same latents (channels, ratio in time and in space, first "
            f"frames): {sides[0]} and {sides[1]}"
        )


def _leading_copies(encoder: StreamingVAE) -> int:
    """Copies of the first frame that align what published TAEHV encoders give with what decoders take."""
    unaligned = isinstance(encoder, TinyVideoVAE) and not encoder.is_aligned
    return encoder.spec.temporal_ratio - 1 if unaligned else 0


def _stream(vae: StreamingVAE, direction: Direction, data: Tensor) -> tuple[Tensor, float]:
    """All that comes out, and the seconds it took."""
    scale = vae.spec.spatial_ratio if direction == "decode" else 1
    step: Callable[..., Tensor] = vae.decode_chunk if direction == "decode" else vae.encode_chunk
    size = vae.spec.chunk_latents * (1 if direction == "decode" else vae.spec.temporal_ratio)
    begun = time.perf_counter()
    state = vae.init_state(direction, data.shape[0], data.shape[3] * scale, data.shape[4] * scale)
    parts = [step(part, state) for part in data.split(size, dim=2)]
    # Moved to the host, so that a GPU has finished.
    result = torch.cat([*parts, vae.flush(state)], dim=2)
    result[..., :1].cpu()
    return result, time.perf_counter() - begun


def table(clip: str, rows: Sequence[Reconstruction]) -> str:
    """The figures as a markdown table."""
    return "\n".join(
        [
            f"{clip}. Flicker is the mean change of a pixel's error from one frame to the next, of 255. "
            f"Memory holds weights and clip too, on a CPU the whole process.",
            "",
            "| VAE | PSNR | SSIM | flicker | encode | decode | peak memory |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {row.vae} | {row.psnr_db:.2f} dB | {row.ssim:.4f} | {row.flicker:.2f} "
                f"| {row.encode_frame_rate:.4g} fps | {row.decode_frame_rate:.4g} fps "
                f"| {'' if row.peak_memory_bytes is None else mib(row.peak_memory_bytes)} |"
                for row in rows
            ),
        ]
    )


def picture(clip: Frames, rows: Sequence[Reconstruction]) -> Image.Image:
    """Frames from the clip's start to its end: the original, then each reconstruction and its error."""
    times = np.linspace(0, len(clip) - 1, min(_TIMES, len(clip))).round().astype(int)
    lines = [(f"original, frames {', '.join(map(str, times))}", clip[times])]
    for row in rows:
        error = row.frames[times].astype(np.int16) - clip[times]
        shown = np.clip(_GREY + _ERROR_GAIN * error, 0, 255).astype(np.uint8)
        caption = f"{row.vae}: {row.psnr_db:.2f} dB, SSIM {row.ssim:.4f}; right: error x{_ERROR_GAIN}"
        lines.append((caption, np.concatenate([row.frames[times], shown])))
    return contact_sheet(lines)
