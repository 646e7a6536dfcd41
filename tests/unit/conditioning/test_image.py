"""Pictures in every form become the same pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from genstream.conditioning.image import as_pixels

LEVELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)


def test_every_form_gives_the_same_pixels():
    pixels = as_pixels("it", LEVELS, 16, 24)
    assert pixels.shape == (3, 16, 24)
    assert pixels.dtype == torch.float32
    assert torch.equal(((pixels + 1) * 127.5).round().byte(), torch.from_numpy(LEVELS).permute(2, 0, 1))
    assert torch.equal(as_pixels("it", Image.fromarray(LEVELS), 16, 24), pixels)
    assert torch.equal(as_pixels("it", pixels, 16, 24), pixels)


@pytest.mark.parametrize("buffer", [LEVELS.copy(), torch.zeros(3, 16, 24)], ids=["array", "tensor"])
def test_the_pixels_are_a_copy(buffer):
    pixels = as_pixels("it", buffer, 16, 24)
    before = pixels.clone()
    buffer[:] = 1
    assert torch.equal(pixels, before)


def test_opaque_is_enough():
    picture = Image.fromarray(LEVELS)
    picture.putalpha(255)
    assert torch.equal(as_pixels("it", picture, 16, 24), as_pixels("it", LEVELS, 16, 24))


@pytest.mark.parametrize(
    ("picture", "error"),
    [
        (LEVELS.astype(np.float32), r"it must be uint8 \[H, W, 3\], got float32 \[16, 24, 3\]"),
        (LEVELS[..., :1], r"it must be uint8 \[H, W, 3\], got uint8 \[16, 24, 1\]"),
        (LEVELS[:8], "it is 24x8, the video is 24x16; resize it first"),
        (torch.zeros(4, 16, 24), r"it must be \[3, 16, 24\], got \[4, 16, 24\]"),
        (torch.full((3, 16, 24), -1.5), r"it must lie in \[-1, 1\], got -1\.5 to -1\.5"),
        (torch.full((3, 16, 24), float("inf")), "it must be finite"),
        (Image.new("RGBA", (24, 16), (9, 9, 9, 254)), "it has transparent pixels; flatten it to RGB first"),
        ("a.png", "it must be a PIL image, an array or a tensor, got str"),
    ],
    ids=["float", "grey", "size", "alpha", "range", "infinity", "transparent", "path"],
)
def test_what_is_no_picture_of_the_video(picture, error):
    with pytest.raises(ValueError, match=error):
        as_pixels("it", picture, 16, 24)
