import pytest
import torch
import torch.nn.functional as F

from genstream.vae.layers import (
    BlendedDownsample,
    BlendedUpsample,
    CausalConv3d,
    CausalInterpolation,
    CentredConv3d,
    ChannelNorm,
    FrameGroupNorm,
    Memory,
    convolve,
)

NOTHING = torch.zeros((1, 0), dtype=torch.float64)


def video(frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, 4, frames, 3, 3), generator=generator, dtype=torch.float64)


def ramp(frames: int) -> torch.Tensor:
    """Frames whose pixels are all 1, 2, 3, ..."""
    return torch.arange(1.0, frames + 1, dtype=torch.float64).view(1, 1, -1, 1, 1)


@pytest.mark.parametrize(("layer", "before"), [(CausalConv3d, 2), (CentredConv3d, 1)])
def test_convolutions_see_copies_of_the_outer_frames(layer, before):
    conv, x = layer(4, 5).double(), video(4)
    after = 2 - before
    copies = [x[:, :, :1]] * before + [x] + [x[:, :, -1:]] * after
    expected = F.conv3d(torch.cat(copies, dim=2), conv.weight, conv.bias, padding=(0, 1, 1))
    result = conv(x, NOTHING)[0] if layer is CausalConv3d else conv(x)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("frames", [1, 4, 60])
@pytest.mark.parametrize(
    ("kernel", "stride"), [((3, 3, 3), 1), ((3, 3, 3), 2), ((3, 1, 1), 2), ((5, 5, 5), 1)]
)
def test_small_convolutions_give_what_large_ones_give(frames, kernel, stride):
    """Of 8 channels with 46 rows, 60 frames are more than PyTorch calls small."""
    torch.manual_seed(0)
    padding = (0, kernel[1] // 2, kernel[2] // 2)
    conv = torch.nn.Conv3d(8, 6, kernel, stride=(stride, 1, 1), padding=padding)
    x = torch.randn(1, 8, frames + kernel[0] - 1, 46, 5)
    expected = torch.nn.functional.conv3d(x, conv.weight, conv.bias, (stride, 1, 1), padding)
    torch.testing.assert_close(convolve(conv, x), expected, rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(y.square().sum(), conv.weight)[0]
        for y in (convolve(conv, x), torch.nn.Conv3d.forward(conv, x))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-2)


def test_interpolation_of_a_ramp():
    layer, x = CausalInterpolation(), ramp(4)
    y, past = layer(x, NOTHING)
    assert y.flatten().tolist() == [1, 1.5, 2, 2.5, 3, 3.5, 4]
    assert past.flatten().tolist() == [4]
    y, past = layer(x + 4, past)
    assert y.flatten().tolist() == [4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8]


@pytest.mark.parametrize(
    ("blend", "expected"),
    # The mean of three frames, the last of them, and a quarter of the one with the rest of the other.
    [(100.0, [1, 2, 4]), (-100.0, [1, 3, 5]), (-1.0986122886681098, [1, 2.75, 4.75])],
)
def test_downsampling_blends_the_mean_with_the_convolution(blend, expected):
    layer = BlendedDownsample(1).double()
    layer.blend.data.fill_(blend)
    y, past = layer(ramp(5), NOTHING)
    assert y.flatten().tolist() == pytest.approx(expected)
    assert past.flatten().tolist() == [5]


def test_upsampling_of_new_weights_interpolates():
    layer = BlendedUpsample(1).double()
    memory = Memory(layer, {"interpolation": NOTHING, "conv": NOTHING})
    assert memory.at_start
    assert layer(ramp(3), memory).flatten().tolist() == pytest.approx([1, 1.5, 2, 2.5, 3])
    later = Memory(layer, memory.slots)
    assert not later.at_start
    assert layer(ramp(2) + 3, later).flatten().tolist() == pytest.approx([3.5, 4, 4.5, 5])


@pytest.mark.parametrize("norm", [FrameGroupNorm(2, 4).double(), ChannelNorm(4).double()])
def test_norms_keep_frames_apart(norm):
    x = video(3)
    apart = torch.cat([norm(frame) for frame in x.split(1, dim=2)], dim=2)
    torch.testing.assert_close(norm(x), apart, rtol=0, atol=1e-14)
