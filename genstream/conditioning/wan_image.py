"""How Wan 2.1's own code brings a picture to the size that its CLIP takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from genstream.shapes import check_count

_COLOURS = 3


class WanImageProcessor(BaseImageProcessor):
    """The whole picture, squeezed to a square by bicubic interpolation of its pixels, and normalised.

    Unlike the processors of transformers it takes no mean over the pixels that become one, and rounds
    nothing in between (https://github.com/Wan-Video/Wan2.1, `wan/modules/clip.py`): what the model was
    trained with.

    Args:
        size: height and width in pixels.
        image_mean: of each colour in [0, 1].
        image_std: likewise.
        **kwargs: those of transformers' image processors.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        size: int = 224,
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        check_count("size", size)
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            if len(values) != _COLOURS:
                raise ValueError(f"{name} must be {_COLOURS} numbers, got {list(values)}")
        self.size = size
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def __call__(self, images: Sequence[NDArray[np.uint8]], return_tensors: str = "pt") -> BatchFeature:
        """`pixel_values` `[B, 3, size, size]` of pictures `[H, W, 3]` of one size, 0 to 255."""
        pictures = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
        squeezed = F.interpolate(pictures, (self.size, self.size), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return BatchFeature({"pixel_values": (squeezed / 2 + 0.5 - mean) / std}, tensor_type=return_tensors)
