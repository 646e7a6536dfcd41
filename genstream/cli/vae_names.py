"""What the commands on video VAEs can be given: built-in architectures, folders, weight files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import genstream
from genstream.io.model_folder import installed_folder, installed_models

if TYPE_CHECKING:
    import torch
    from diffusers import ModelMixin

    from genstream.vae.protocol import StreamingVAE


@dataclass(frozen=True)
class Architecture:
    """A VAE at its published size: what it is, its class in `genstream`, and its settings."""

    text: str
    kind: str
    config: Mapping[str, Any]


_LTX_STRIDES = {"encoder_temporal_strides": (2, 2, 2), "decoder_temporal_strides": (2, 2, 2)}
_TURBO = {"decoder_spatio_only": (True, False, False, False)}
_TAEHV = "tiny VAE of Wan 2.1, Qwen-Image and HunyuanVideo latents, 4x8x8"
ARCHITECTURES = {
    "wan2.1": Architecture("Wan 2.1, 4x8x8, 16 channels", "WanVideoVAE", {}),
    "wan2.2": Architecture(
        "Wan 2.2, 4x16x16, 48 channels",
        "WanVideoVAE",
        {
            "version": "2.2",
            "latent_channels": 48,
            "patch_size": 2,
            "encoder_widths": (160, 160, 320, 640, 640),
            "decoder_widths": (1024, 1024, 1024, 512, 256),
        },
    ),
    "taehv": Architecture(_TAEHV, "TinyVideoVAE", {}),
    "taew2_1": Architecture("the same", "TinyVideoVAE", {}),
    "taew2_2": Architecture(
        "tiny VAE of Wan 2.2 latents", "TinyVideoVAE", {"latent_channels": 48, "patch_size": 2}
    ),
    "taew2_2_super": Architecture(
        "the same, larger decoder",
        "TinyVideoVAE",
        {
            "latent_channels": 48,
            "patch_size": 2,
            "decoder_block": "super",
            "decoder_widths": (512, 256, 128, 64),
        },
    ),
    "taehv1_5": Architecture(
        "tiny VAE of HunyuanVideo 1.5 latents, 4x16x16, 32 channels",
        "TinyVideoVAE",
        {"latent_channels": 32, "patch_size": 2},
    ),
    "taeltx_2": Architecture(
        "tiny VAE of LTX-2 latents, 8x32x32, 128 channels",
        "TinyVideoVAE",
        {"latent_channels": 128, "patch_size": 4, **_LTX_STRIDES},
    ),
    "taeltx2_3_wide": Architecture(
        "tiny VAE of LTX-2.3 latents with a larger decoder",
        "TinyVideoVAE",
        {
            "latent_channels": 128,
            "patch_size": 4,
            **_LTX_STRIDES,
            "decoder_block": "wide",
            "decoder_widths": (1024, 512, 256, 64),
        },
    ),
    "turbo": Architecture(
        "Turbo-VAED decoder of HunyuanVideo latents, 4x8x8, 16 channels, in overlapping windows",
        "TurboVAED",
        _TURBO,
    ),
    "turbo-causal": Architecture(
        "the same, looking back only",
        "TurboVAED",
        {**_TURBO, "decoder_causal": True, "depthwise_causal": True},
    ),
    "causal": Architecture("CausalVideoVAE, 4x8x8, 4 channels", "CausalVideoVAE", {}),
}
"""Built with random weights: good for speed and memory, not for pictures."""

_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_PAIR = "+"


def names_help() -> str:
    """The part of a command's help that says what a VAE may be."""
    width = max(map(len, ARCHITECTURES))
    lines = [f"  {name:<{width}}  {known.text}" for name, known in ARCHITECTURES.items()]
    return "\n".join(
        [
            "A VAE is one of:",
            "  a component folder with config.json and safetensors weights, of genstream or diffusers",
            "  a model folder or the run that trained it, whose VAE is taken",
            f"  a weight file as published for Wan, TAEHV or Turbo-VAED ({', '.join(_WEIGHT_SUFFIXES)})",
            f"  an installed model: {', '.join(installed_models())}",
            "  a class of diffusers, such as AutoencoderKLWan, with random weights",
            "  an architecture with random weights:",
            *(f"  {line}" for line in lines),
        ]
    )


def split_pair(name: str) -> tuple[str, str]:
    """Encoder and decoder: `A+B` decodes the latents of A with B, any other VAE does both."""
    encoder, plus, decoder = name.partition(_PAIR)
    if not plus or Path(name).exists():
        return name, name
    if not (encoder and decoder):
        raise ValueError(f"VAE must name an encoder and a decoder around {_PAIR}, got {name!r}")
    return encoder, decoder


def check_name(name: str) -> None:
    """Raise ValueError where there is no such VAE; nothing is read."""
    import diffusers

    if installed_folder(name) is not None or name in ARCHITECTURES or Path(name).is_dir():
        return
    if Path(name).suffix.lower() in _WEIGHT_SUFFIXES and Path(name).is_file():
        return
    if not (name.startswith("Autoencoder") and hasattr(diffusers, name)):
        raise ValueError(
            f"VAE must be a folder, a weight file ({', '.join(_WEIGHT_SUFFIXES)}), an installed model "
            f"({', '.join(installed_models())}), a class of diffusers or one of "
            f"{', '.join(ARCHITECTURES)}, got {name!r}"
        )


def is_random(name: str) -> bool:
    """Whether the VAE of that name has random weights."""
    return installed_folder(name) is None and not Path(name).exists()


def open_vae(name: str, dtype: "torch.dtype", device: "torch.device") -> "StreamingVAE":
    """The VAE of that name, folder or file, ready for use.

    Raises:
        ValueError: there is none, or it cannot stream.
    """
    folder = installed_folder(name) or Path(name)
    if folder.is_dir():
        from genstream.vae.loading import load_vae

        return load_vae(folder, dtype, device)
    if folder.suffix.lower() in _WEIGHT_SUFFIXES:
        return _open_file(folder, dtype, device)
    return _open_random(name, dtype, device)


def open_decoder(
    name: str, encoder: "StreamingVAE", dtype: "torch.dtype", device: "torch.device"
) -> "StreamingVAE":
    """The VAE of that name, to decode the latents of `encoder`.

    A published Turbo-VAED decoder gives raw latents back to frames and leaves their statistics to its
    teacher: one that has none takes those of `encoder`.
    """
    import torch

    from genstream.vae.adapters.base import Adapter
    from genstream.vae.turbo import TurboVAED
    from genstream.vae.wrapping import module_of

    opened = open_vae(name, dtype, device)
    decoder = module_of(opened)
    same = encoder.spec.latent_channels == opened.spec.latent_channels  # else it is refused with both sides
    if not isinstance(decoder, TurboVAED) or decoder.has_statistics or not same:
        return opened
    if isinstance(module_of(encoder), TurboVAED):
        raise ValueError(
            f"VAE must start with one that encodes, as ENCODER+{name}, got one that only decodes"
        )
    if isinstance(encoder, Adapter):
        mean, std = (values[0, :, -1].flatten() for values in (encoder.scale.mean, encoder.scale.std))
    else:
        module = module_of(encoder)
        mean, std = module.get_buffer("_latents_mean"), module.get_buffer("_latents_std")
    with torch.no_grad():
        decoder.latents_mean.copy_(mean)
        decoder.latents_std.copy_(std)
    return opened


def _open_file(path: Path, dtype: "torch.dtype", device: "torch.device") -> "StreamingVAE":
    from genstream.vae.taehv import load_taehv
    from genstream.vae.turbo_weights import is_turbo_vaed, load_turbo_vaed
    from genstream.vae.wan_weights import load_wan_vae
    from genstream.vae.weights import read_weights

    if (path.parent / "config.json").is_file():
        raise ValueError(f"VAE must be the folder of {str(path)!r}, where its config.json is")
    tensors = read_weights(path)
    if "encoder.0.weight" in tensors:
        vae: ModelMixin = load_taehv(tensors)
    else:
        vae = load_turbo_vaed(tensors) if is_turbo_vaed(tensors) else load_wan_vae(tensors)
    moved: StreamingVAE = _cast(vae, dtype, device)
    return moved


def _open_random(name: str, dtype: "torch.dtype", device: "torch.device") -> "StreamingVAE":
    import diffusers
    import torch

    from genstream.vae.wrapping import as_streaming

    check_name(name)
    torch.manual_seed(0)
    with device:
        if name in ARCHITECTURES:
            architecture = ARCHITECTURES[name]
            module = getattr(genstream, architecture.kind)(**architecture.config)
        else:
            module = getattr(diffusers, name)()
    return as_streaming(_cast(module, dtype, device).eval().requires_grad_(requires_grad=False))


def _cast(vae: "ModelMixin", dtype: "torch.dtype", device: "torch.device") -> "ModelMixin":
    from torch import nn

    # Their own `to` warns whenever it casts.
    return nn.Module.to(vae, device=device, dtype=dtype)
