"""What a clip comes out as: pictures, arrays or tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from genstream.streaming.chunk import Chunk

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class CausalVideoOutput(BaseOutput):
    """Frames of a video.

    Attributes:
        frames: by `output_type`: "pil" a list of PIL images for each prompt; "np" `[B, F, H, W, 3]` in
            [0, 1]; "pt" `[B, F, 3, H, W]` in [0, 1]; "latent" `[B, C, T, h, w]`.
    """

    frames: list[list[Image.Image]] | np.ndarray | Tensor


def to_host(chunk: Chunk, output_type: str) -> Tensor:
    """What is kept of a chunk: tensors stay on the device, pictures leave it at once."""
    kept = chunk.latents if output_type == "latent" else chunk.frames
    if kept is None:
        raise RuntimeError(f"chunk {chunk.index} holds no {output_type}")
    return kept if output_type in ("pt", "latent") else kept.float().cpu()


def convert(frames: Tensor, output_type: str) -> list[list[Image.Image]] | np.ndarray | Tensor:
    """`[B, 3, F, H, W]` in [-1, 1] to what the caller wants."""
    if output_type == "latent":
        return frames
    scaled = (frames / 2 + 0.5).clamp(0, 1).transpose(1, 2)  # [B, F, 3, H, W]
    if output_type == "pt":
        return scaled
    array: np.ndarray = scaled.permute(0, 1, 3, 4, 2).numpy()
    if output_type == "np":
        return array
    return [[Image.fromarray(frame) for frame in (video * 255).round().astype("uint8")] for video in array]
