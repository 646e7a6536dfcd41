"""Pictures as tensors, and as CLIP tokens."""

from __future__ import annotations

import numpy as np
import torch
from diffusers.models.modeling_utils import get_parameter_device
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, CLIPVisionModel

from genstream.shapes import check_same_size

_OPAQUE = 255

Picture = Image.Image | NDArray[np.uint8] | Tensor


def as_pixels(name: str, picture: Picture, height: int, width: int) -> Tensor:
    """A picture as float32 `[3, height, width]` in [-1, 1].

    Args:
        name: what the picture is called in an error.
        picture: PIL image, uint8 `[H, W, 3]`, or tensor `[3, H, W]` in [-1, 1].
        height: pixels.
        width: pixels.

    Raises:
        ValueError: the picture has another size, is no picture, or leaves the range.
    """
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or picture.shape[0] != 3:
            raise ValueError(f"{name} must be [3, {height}, {width}], got {list(picture.shape)}")
        check_pixels(name, picture)
        pixels = picture.detach().to(torch.float32, copy=True)  # a camera may use its buffer again
    else:
        pixels = _levels(name, picture).permute(2, 0, 1).float() / 127.5 - 1  # [H, W, 3] -> [3, H, W]
    check_same_size(name, (pixels.shape[1], pixels.shape[2]), (height, width))
    return pixels


def check_pixels(name: str, pixels: Tensor) -> None:
    """Raise ValueError unless all values are in [-1, 1]."""
    if not bool(pixels.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    lowest, highest = float(pixels.min()), float(pixels.max())
    if not -1 <= lowest <= highest <= 1:
        raise ValueError(f"{name} must lie in [-1, 1], got {lowest:g} to {highest:g}")


@torch.no_grad()
def image_tokens(pixels: Tensor, processor: BaseImageProcessor, encoder: CLIPVisionModel) -> Tensor:
    """CLIP tokens `[B, tokens, image_dim]` of pictures `[B, 3, H, W]` in [-1, 1], as Wan 2.1 takes them.

    They are the hidden states in front of the encoder's last layer (Wan 2.1, arXiv 2503.20314).
    """
    levels = ((pixels.float() + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    inputs = processor(images=list(levels), return_tensors="pt").pixel_values
    hidden = encoder(
        inputs.to(get_parameter_device(encoder), encoder.dtype), output_hidden_states=True
    ).hidden_states
    tokens: Tensor = hidden[-2]
    return tokens


def _levels(name: str, picture: Image.Image | NDArray[np.uint8]) -> Tensor:
    """`[H, W, 3]`, 0 to 255."""
    if isinstance(picture, Image.Image):
        if picture.has_transparency_data:
            lowest_alpha, _ = picture.convert("RGBA").getchannel("A").getextrema()
            if lowest_alpha != _OPAQUE:
                raise ValueError(f"{name} has transparent pixels; flatten it to RGB first")
        return torch.from_numpy(np.array(picture.convert("RGB")))
    if not isinstance(picture, np.ndarray):
        raise ValueError(f"{name} must be a PIL image, an array or a tensor, got {type(picture).__name__}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"{name} must be uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}")
    return torch.from_numpy(np.array(picture))
