"""First weights of the embedded VAE.

Weights drawn at random keep the signal's size, and residual blocks start as identities. Besides, a few
channels carry the colour of each patch of the newest frame through the whole network, so that training
starts from a coarse but right picture: from random weights alone, it learns brightness in minutes, but colour
many times more slowly.
"""

import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from genstream.vae.protocol import RGB
from genstream.vae.tiny import MemBlock, TemporalGrow, TemporalPool, TinyVideoVAE

_QUARTERS = 4
PASSED_CHANNELS = RGB * _QUARTERS
"""Latent channels that start as mean and differences of the four quarters of a patch."""
# Differences of two, and of four quarters, one row each; the first row is the sum.
_HAAR = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
# The toy world is dark: pixels in [0, 1] have a mean of a fifth and a root mean square of about a quarter.
_PIXEL_MEAN = 0.2
_PIXEL_GAIN = 4.0
_LAST_GAIN = 0.1
_AFTER_RELU = math.sqrt(2)
"""Makes up for the half that a rectifier cuts off."""


@torch.no_grad()
def initialise(vae: TinyVideoVAE) -> None:
    """Replace all weights; encoder_width and latent_channels must be at least PASSED_CHANNELS."""
    _draw(vae)
    _pass_colours_into_latents(_spine(vae.encoder))
    _pass_colours_into_frames(_spine(vae.decoder))


@torch.no_grad()
def initialise_decoder(vae: TinyVideoVAE) -> None:
    """Replace the decoder's weights, of base blocks, with those that fit latents of such an encoder."""
    _draw(vae.decoder)
    _pass_colours_into_frames(_spine(vae.decoder))


@torch.no_grad()
def take_over_decoder(vae: TinyVideoVAE, other: TinyVideoVAE) -> None:
    """Let layers of the decoder start as those at the same place of the same stage of another.

    A decoder with fewer blocks but the same widths in its first stages starts with half of what it needs:
    blocks are residual, so that leaving some out changes little.
    """
    givers = dict(_places(other.decoder))
    for place, layer in _places(vae.decoder):
        weights = layer.state_dict()
        given = givers[place].state_dict() if place in givers else {}
        if {name: value.shape for name, value in weights.items()} == {
            name: value.shape for name, value in given.items()
        }:
            layer.load_state_dict(given)


def _places(decoder: nn.Sequential) -> Iterator[tuple[tuple[int, str, int], nn.Module]]:
    """Layers by stage, kind and number."""
    stage, counts = 0, Counter[tuple[int, str]]()
    for layer in decoder:
        kind = stage, type(layer).__name__
        yield (*kind, counts[kind]), layer
        counts[kind] += 1
        stage += isinstance(layer, TemporalGrow)


def _draw(network: nn.Module) -> None:
    """Weights drawn at random that keep the signal's size."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            _scaled_normal(layer, 1.0)
    for layer in network.modules():
        if isinstance(layer, TemporalPool | TemporalGrow):
            _scaled_normal(layer.conv, _AFTER_RELU)
        elif isinstance(layer, MemBlock):
            first, _, second, _, last = layer.conv
            _scaled_normal(first, _AFTER_RELU)
            _scaled_normal(second, _AFTER_RELU)
            _scaled_normal(last, 0.0)


def _pass_colours_into_latents(layers: list[nn.Conv2d]) -> None:
    """Layers are the first, a temporal pool and a halving for each stage, and the last."""
    first, *stages, last = layers
    _scaled_normal(first, _PIXEL_GAIN)
    _scaled_normal(last, _AFTER_RELU)
    patch_area = first.in_channels // RGB
    _set_rows(first, torch.eye(RGB).repeat_interleave(patch_area, dim=1) / patch_area)
    for pool, halve in zip(stages[::2], stages[1::2], strict=True):
        newest = torch.zeros(RGB, pool.in_channels)
        newest[:, pool.in_channels - pool.out_channels :][:, :RGB] = torch.eye(RGB)
        _set_rows(pool, newest)
        _set_rows(halve, torch.zeros(RGB, 1))
        for colour in range(RGB):
            halve.weight[colour, colour, 1:, 1:] = 1 / _QUARTERS
    _pass_quarters(stages[-1])
    _set_rows(last, torch.kron(_HAAR / _QUARTERS, torch.eye(RGB)) * _PIXEL_GAIN)
    _bias(last)[:RGB] = -_PIXEL_MEAN * _PIXEL_GAIN


def _pass_quarters(halve: nn.Conv2d) -> None:
    """Quarter by quarter instead of their mean: differences are taken behind the last rectifier."""
    _set_rows(halve, torch.zeros(PASSED_CHANNELS, 1))
    for quarter, (row, column) in enumerate(((1, 1), (1, 2), (2, 1), (2, 2))):
        for colour in range(RGB):
            halve.weight[quarter * RGB + colour, colour, row, column] = 1


def _pass_colours_into_frames(layers: list[nn.Conv2d]) -> None:
    """Layers are the first, a temporal growth and a convolution for each stage, and the last."""
    first, *stages, last = layers
    _scaled_normal(first, _AFTER_RELU)
    _scaled_normal(last, _LAST_GAIN)
    _set_rows(first, torch.eye(RGB) / _PIXEL_GAIN)
    _bias(first)[:RGB] = _PIXEL_MEAN
    for grow, narrow in zip(stages[::2], stages[1::2], strict=True):
        channels = grow.in_channels
        for start in range(0, grow.out_channels, channels):
            grow.weight[start : start + RGB] = torch.eye(RGB, channels)[:, :, None, None]
        _set_rows(narrow, torch.eye(RGB))
    patch_area = last.out_channels // RGB
    last.weight[:, :RGB, 1, 1] = torch.eye(RGB).repeat_interleave(patch_area, dim=0)


def _spine(layers: nn.Sequential) -> list[nn.Conv2d]:
    """Convolutions outside the residual blocks, in order."""
    spine = []
    for layer in layers:
        if isinstance(layer, TemporalPool | TemporalGrow):
            spine.append(layer.conv)
        elif isinstance(layer, nn.Conv2d):
            spine.append(layer)
    return spine


def _set_rows(layer: nn.Conv2d, rows: Tensor) -> None:
    """Let the first outputs be these mixtures [outputs, first inputs] of the pixel in the middle."""
    outputs, inputs = rows.shape
    layer.weight[:outputs] = 0
    centre = layer.kernel_size[0] // 2
    layer.weight[:outputs, :inputs, centre, centre] = rows
    if layer.bias is not None:
        layer.bias[:outputs] = 0


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _scaled_normal(layer: nn.Module, gain: float) -> None:
    assert isinstance(layer, nn.Conv2d)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
