"""Published Turbo-VAED weights, whichever teacher's: what they are is read off their tensors.

They come as a whole model or as its decoder alone, with or without the heads of their training
(https://github.com/hustvl/Turbo-VAED).
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from genstream.vae.checks import latent_statistics
from genstream.vae.turbo import TurboVAED
from genstream.vae.weights import Weights, fill, read_weights, shape_of

_HEADS = "aligned_feature_projection_heads."
_FIRST = "conv_in.conv.weight"
_DECODER = "decoder."


def is_turbo_vaed(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a Turbo-VAED decoder."""
    return _FIRST in tensors or _DECODER + _FIRST in tensors


def load_turbo_vaed(
    source: Weights,
    *,
    latents_mean: Sequence[float] | None = None,
    latents_std: Sequence[float] | None = None,
    scaling_factor: float = 1.0,
    decoder_causal: bool = False,
    is_video_dc_ae: bool = False,
) -> TurboVAED:
    """A decoder in float32 from a published checkpoint.

    The published ones decode the raw latents of their teachers: with the statistics of a teacher they decode
    the latents of diffusion models, as its own decoder does.

    Args:
        source: a .safetensors or .pth file, or its tensors by name.
        latents_mean: per channel; None for those of the checkpoint, or 0.
        latents_std: per channel; None for those of the checkpoint, or 1.
        scaling_factor: latents are (raw - mean) / std * scaling_factor.
        decoder_causal: whether dense convolutions look back only, which the weights do not tell.
        is_video_dc_ae: whether the first latent frame gives r frames like every other, as in the decoder for
            Video-DC-AE, which the weights do not tell.
    """
    tensors = _whole_names(read_weights(source))
    given = {"latents_mean": latents_mean, "latents_std": latents_std}
    channels = shape_of(tensors, _DECODER + _FIRST)[1]
    statistics = latent_statistics(latents_mean, latents_std, channels)
    for (name, values), statistic in zip(given.items(), statistics, strict=True):
        if values is not None or name not in tensors:
            tensors[name] = statistic
    if not bool((tensors["latents_std"] > 0).all()):
        raise ValueError(
            f"latents_std must be above 0 for every channel, got {tensors['latents_std'].tolist()}"
        )
    blocks = _up_blocks(tensors)
    separable = [_is_separable(tensors, block) for block in (*blocks, "decoder.mid_block")]
    vae: TurboVAED = TurboVAED(
        latent_channels=channels,
        patch_size=4 if "decoder.upsampler2d_2.conv.weight" in tensors else 1,
        decoder_block_out_channels=[_width(tensors, block) for block in blocks],
        decoder_layers_per_block=[_layers(tensors, block) for block in (*blocks, "decoder.mid_block")],
        decoder_is_dw_conv=separable,
        decoder_dw_kernel_size=_separable_kernel(tensors),
        spatio_temporal_scaling=[_growth(tensors, block) > 1 for block in blocks],
        decoder_spatio_only=[_growth(tensors, block) == 4 for block in blocks],
        decoder_causal=decoder_causal,
        is_video_dc_ae=is_video_dc_ae,
        scaling_factor=scaling_factor,
    )
    fill(vae, tensors)
    vae.eval()
    return vae


def _whole_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as in the whole model, without the heads that only training needs."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEADS)}
    return {_DECODER + name: tensor for name, tensor in kept.items()} if _FIRST in kept else kept


def _up_blocks(tensors: Mapping[str, Tensor]) -> list[str]:
    """Prefixes of the levels, from the frames to the latents."""
    prefix = "decoder.up_blocks."
    found = {int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix)}
    return [f"{prefix}{index}" for index in sorted(found, reverse=True)]


def _is_separable(tensors: Mapping[str, Tensor], block: str) -> bool:
    return f"{block}.resnets.0.conv1.depthwise_conv.weight" in tensors


def _width(tensors: Mapping[str, Tensor], block: str) -> int:
    layer = "pointwise_conv" if _is_separable(tensors, block) else "conv"
    return shape_of(tensors, f"{block}.resnets.0.conv1.{layer}.weight")[0]


def _layers(tensors: Mapping[str, Tensor], block: str) -> int:
    prefix = f"{block}.resnets."
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def _separable_kernel(tensors: Mapping[str, Tensor]) -> int:
    """Their size; shortcuts have 1, and without any it has no meaning."""
    sizes = [tensor.shape[2] for name, tensor in tensors.items() if name.endswith("depthwise_conv.weight")]
    return max(sizes, default=1)


def _growth(tensors: Mapping[str, Tensor], block: str) -> int:
    """Pixels that a level makes of one, over space and time; 1 without upsampling."""
    name = f"{block}.upsamplers.0.conv.conv.weight"
    if name not in tensors:
        return 1
    outputs, inputs = shape_of(tensors, name)[:2]
    return outputs // inputs
