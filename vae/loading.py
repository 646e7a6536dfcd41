"""Loads any video VAE from its component folder: this library's own and diffusers'."""

import json
from pathlib import Path

import diffusers
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from genstream.io.model_folder import installed_folder
from genstream.vae.adapters import stream_vae
from genstream.vae.adapters.base import Adapter
from genstream.vae.causal import CausalVideoVAE
from genstream.vae.devices import check_device, check_dtype
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.turbo import TurboVAED
from genstream.vae.wan import WanVideoVAE

LoadedVAE = CausalVideoVAE | TinyVideoVAE | TurboVAED | WanVideoVAE | Adapter
"""A `StreamingVAE`; `TurboVAED` only decodes."""

_OWN = {kind.__name__: kind for kind in (CausalVideoVAE, TinyVideoVAE, TurboVAED, WanVideoVAE)}
_CONFIG_NAME = "config.json"


def load_vae(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> LoadedVAE:
    """The VAE in a folder, ready for use.

    Args:
        folder: in diffusers' layout: config.json, whose `_class_name` says which VAE it is, and safetensors
            weights. Of a model folder, an installed model or a training run, the VAE in it.
        dtype: of the weights in memory, whichever they are stored in.
        device: to load to.

    Raises:
        ValueError: it is no such folder, its VAE cannot stream, or its weights do not fit; or there is no
            such device.
        OSError: its weights cannot be read.
    """
    check_dtype(dtype)
    device = check_device(device)
    folder = component_folder(folder)
    name = _class_name(folder)
    kind = _OWN.get(name) or (getattr(diffusers, name, None) if "Autoencoder" in name else None)
    if kind is None:
        raise ValueError(
            f"_class_name in {str(folder / _CONFIG_NAME)!r} must be one of {', '.join(_OWN)} "
            f"or a VAE of diffusers, got {name!r}"
        )
    _check_weights(folder)
    vae, loading = kind.from_pretrained(
        str(folder), torch_dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    missing, unexpected = (sorted(loading[key]) for key in ("missing_keys", "unexpected_keys"))
    # Published weights of diffusers' VAEs may hold more than their classes use.
    if missing or (unexpected and name in _OWN):
        raise ValueError(
            f"weights in {str(folder)!r} must be those of its configuration: {len(missing)} missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )
    vae.to(device).eval()
    return vae if name in _OWN else stream_vae(vae)


def _check_weights(folder: Path) -> None:
    """Only safetensors are read: other formats can run code when they are loaded."""
    if any((folder / f"{SAFETENSORS_WEIGHTS_NAME}{index}").is_file() for index in ("", ".index.json")):
        return
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth"))
    raise ValueError(
        f"folder must hold {SAFETENSORS_WEIGHTS_NAME}, got {found or 'no weights'} in {str(folder)!r}; a "
        f"variant is loaded when it is renamed, other formats when diffusers' class saves them again"
    )


def component_folder(folder: str | Path) -> Path:
    """Where the VAE of a folder lies: in itself, or in `vae` of a model or of a training run."""
    folder = installed_folder(str(folder)) or Path(folder)
    inner = folder / "vae"
    return inner if (inner / _CONFIG_NAME).is_file() and not (folder / _CONFIG_NAME).is_file() else folder


def _class_name(folder: Path) -> str:
    """What the folder's configuration says it holds."""
    path = folder / _CONFIG_NAME
    if folder.is_file():
        raise ValueError(
            f"folder must be one, got the file {str(folder)!r}: published weight files are for load_wan_vae, "
            f"load_taehv and load_turbo_vaed"
        )
    if not path.is_file():
        raise ValueError(
            f"folder must hold a VAE, in {_CONFIG_NAME} or vae/{_CONFIG_NAME}, got {str(folder)!r}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid json: {error}") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{str(path)!r} must name its class in _class_name, got {name!r}")
    return name
