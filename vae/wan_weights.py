"""Published weights of the Wan video VAEs, whichever version and width: read off their tensors.

`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`, channel-pruned ones of the same layout (LightVAE), and diffusers'
`AutoencoderKLWan` and `AutoencoderKLQwenImage`.
"""

import math
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from genstream.vae.protocol import RGB
from genstream.vae.wan import DECODER_BLOCKS, ENCODER_BLOCKS, STAGES, Version, WanVideoVAE
from genstream.vae.weights import Weights, fill, read_weights, shape_of

# diffusers' names and the published ones, applied in this order.
_RENAMES = (
    (r"\.conv1\.", ".residual.2."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.norm1\.", ".residual.0."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".downsamples.\1.downsamples.\2."),
    (r"\.down_blocks\.(\d+)\.downsampler\.", rf".downsamples.\1.downsamples.{ENCODER_BLOCKS}."),
    (r"\.down_blocks\.", ".downsamples."),
    (r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r".upsamples.\1.upsamples.\2."),
    (r"\.up_blocks\.(\d+)\.upsampler(?:s\.0)?\.", rf".upsamples.\1.upsamples.{DECODER_BLOCKS}."),
)
_NESTED_UP = re.compile(r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.")


def load_wan_vae(
    source: Weights, latents_mean: Sequence[float] | None = None, latents_std: Sequence[float] | None = None
) -> WanVideoVAE:
    """A VAE in float32 from a published checkpoint.

    Args:
        source: a .safetensors or .pth file, or its tensors by name.
        latents_mean: per channel; None for those of the published VAE with as many latent channels.
        latents_std: per channel, as `latents_mean`.
    """
    tensors = _published_names(read_weights(source))
    version: Version = "2.2" if "encoder.downsamples.0.downsamples.0.residual.2.weight" in tensors else "2.1"
    vae: WanVideoVAE = WanVideoVAE(
        version=version,
        latent_channels=shape_of(tensors, "conv2.weight")[0],
        patch_size=math.isqrt(shape_of(tensors, "encoder.conv1.weight")[1] // RGB),
        encoder_widths=_widths(tensors, "encoder.conv1", _encoder_stages(version)),
        decoder_widths=_widths(tensors, "decoder.conv1", _decoder_stages(version)),
        temporal_strides=_temporal_strides(tensors, version),
        latents_mean=latents_mean,
        latents_std=latents_std,
    )
    fill(vae, tensors)
    vae.eval()
    return vae


def _published_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "encoder.conv_in.weight" not in tensors:
        return dict(tensors)
    renamed = {_published_name(name): tensor for name, tensor in tensors.items()}
    if any(".downsampler." in name for name in tensors):
        return renamed
    return {_NESTED_UP.sub(_flat_index, name): tensor for name, tensor in renamed.items()}


def _published_name(name: str) -> str:
    for theirs, published in _RENAMES:
        name = re.sub(theirs, published, name)
    return name


def _flat_index(match: re.Match[str]) -> str:
    """Version 2.1 counts the blocks and upsamplings of all stages through."""
    stage, block = int(match[1]), int(match[2])
    return f".upsamples.{stage * (DECODER_BLOCKS + 1) + block}."


def _encoder_stages(version: Version) -> list[str]:
    """Prefixes of the first block of each stage."""
    if version == "2.2":
        return [f"encoder.downsamples.{stage}.downsamples.0" for stage in range(STAGES)]
    return [f"encoder.downsamples.{stage * (ENCODER_BLOCKS + 1)}" for stage in range(STAGES)]


def _decoder_stages(version: Version) -> list[str]:
    if version == "2.2":
        return [f"decoder.upsamples.{stage}.upsamples.0" for stage in range(STAGES)]
    return [f"decoder.upsamples.{stage * (DECODER_BLOCKS + 1)}" for stage in range(STAGES)]


def _widths(tensors: Mapping[str, Tensor], first: str, stages: Sequence[str]) -> list[int]:
    names = [f"{first}.weight", *(f"{stage}.residual.2.weight" for stage in stages)]
    return [shape_of(tensors, name)[0] for name in names]


def _temporal_strides(tensors: Mapping[str, Tensor], version: Version) -> list[int]:
    strides = []
    for stage in range(STAGES - 1):
        place = f"{stage}.downsamples.{ENCODER_BLOCKS}" if version == "2.2" else str(3 * stage + 2)
        strides.append(2 if f"encoder.downsamples.{place}.time_conv.weight" in tensors else 1)
    return strides
