"""Published TAEHV weights, whichever variant: what they are is read off their tensors.

`taehv`, `taew2_1`, `taecvx`, `taeos1_3` (4x8x8, 16 channels), `taehv1_5` (4x16x16, 32), `taew2_2` (4x16x16,
48), `taeltx_2`, `taeltx2_3` (8x32x32, 128), their "super" and "wide" decoders, and retrainings of the same
layout (https://github.com/madebyollin/taehv). Not `taeh3`, which starts anew after every 17 frames.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from genstream.vae.protocol import RGB
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.tiny_blocks import BlockKind
from genstream.vae.weights import Weights, fill, read_weights, shape_of

_POOLS = (2, 7, 12)
_BASE_GROWS = (7, 13, 19)
_BASE_NARROWS = (8, 14, 20)
_SUPER_GROWS = (7, 14, 21)
_TAEH3 = (24, 2)
"""Latent channels and patch size of the one published variant that cannot stream."""


def load_taehv(
    source: Weights,
    latents_mean: Sequence[float] | None = None,
    latents_std: Sequence[float] | None = None,
    decoder_temporal_strides: Sequence[int] | None = None,
    decoder_spatial_strides: Sequence[int] = (2, 2, 2),
    first_frame_copies: int = 0,
) -> TinyVideoVAE:
    """A VAE in float32 from a published checkpoint.

    Decoding drops the first r - 1 frames, which leaves 1 + r (T - 1); encoding gives ceil(F / r) latents. So
    does the reference, except for `taecvx` with an even T, where it keeps all frames, misaligned. That
    encoding does not undo such a decoding: with r - 1 `first_frame_copies` it does, and gives as many latents
    for 1 + r (T - 1) frames as the VAE that it stands in for.

    Args:
        source: a .safetensors or .pth file, or its tensors by name.
        latents_mean: per channel, for weights trained on a VAE's raw latents (`lighttaew2_1`). None for the
            others, which work on normalised latents.
        latents_std: per channel, as `latents_mean`.
        decoder_temporal_strides: 1 instead of 2 at a stage decodes fewer frames, from the same weights; None
            for all.
        decoder_spatial_strides: 1 instead of 2 at a stage decodes smaller frames; not in super decoders.
        first_frame_copies: put in front of what is encoded; 0 as published, or r - 1.

    Raises:
        ValueError: it is none of them, or `taeh3`.
    """
    tensors = read_weights(source)
    decoder_block = _decoder_block(tensors)
    grows = _SUPER_GROWS if decoder_block == "super" else _BASE_GROWS
    published = [_stride(tensors, f"decoder.{index}.conv.weight") for index in grows]
    strides = list(published if decoder_temporal_strides is None else decoder_temporal_strides)
    encoder_width, patch_channels = shape_of(tensors, "encoder.0.weight")[:2]
    channels, patch_size = shape_of(tensors, "encoder.17.weight")[0], math.isqrt(patch_channels // RGB)
    if (channels, patch_size) == _TAEH3:
        raise ValueError(
            f"source must be weights that stream, got taeh3 ({channels} latent channels, patches of "
            f"{patch_size}), which starts anew every 17 frames"
        )
    merged = [shape_of(tensors, f"encoder.{index}.conv.weight")[1] // encoder_width for index in _POOLS]
    if math.prod(merged) != math.prod(published):
        raise ValueError(
            f"source must merge as many frames as it grows, got encoder strides {merged} and decoder strides "
            f"{published}"
        )
    vae: TinyVideoVAE = TinyVideoVAE(
        latent_channels=channels,
        patch_size=patch_size,
        encoder_width=encoder_width,
        decoder_widths=_decoder_widths(tensors, decoder_block),
        encoder_temporal_strides=merged,
        decoder_temporal_strides=strides,
        first_frame_copies=first_frame_copies,
        latents_mean=latents_mean,
        latents_std=latents_std,
        encoder_block="wide" if "encoder.4.conv.6.weight" in tensors else "base",
        decoder_block=decoder_block,
        decoder_spatial_strides=list(decoder_spatial_strides),
    )
    _keep_last_frames(tensors, grows, published, strides)
    fill(vae, tensors)
    vae.eval()
    return vae


def _decoder_block(tensors: Mapping[str, Tensor]) -> BlockKind:
    if "decoder.0.weight" in tensors:
        return "super"
    return "wide" if "decoder.3.conv.6.weight" in tensors else "base"


def _stride(tensors: Mapping[str, Tensor], name: str) -> int:
    outputs, inputs = shape_of(tensors, name)[:2]
    return outputs // inputs


def _decoder_widths(tensors: Mapping[str, Tensor], block: BlockKind) -> list[int]:
    first = "decoder.0.weight" if block == "super" else "decoder.1.weight"
    if block == "super":
        names = [f"decoder.{index}.conv.weight" for index in _SUPER_GROWS]
        return [shape_of(tensors, first)[0], *(shape_of(tensors, name)[1] for name in names)]
    names = [f"decoder.{index}.weight" for index in _BASE_NARROWS]
    return [shape_of(tensors, name)[0] for name in (first, *names)]


def _keep_last_frames(
    tensors: dict[str, Tensor], grows: Sequence[int], published: Sequence[int], strides: Sequence[int]
) -> None:
    """Let each stage grow only the last frames of its group, whose channels come last."""
    for index, stride, wanted in zip(grows, published, strides, strict=True):
        name = f"decoder.{index}.conv.weight"
        if wanted > stride:
            raise ValueError(
                f"decoder_temporal_strides must be {list(published)} or less, got {list(strides)}"
            )
        tensors[name] = tensors[name][-wanted * tensors[name].shape[1] :]
