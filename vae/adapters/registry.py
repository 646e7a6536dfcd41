"""Which adapter streams which VAE, and why others cannot stream."""

import diffusers
from diffusers import ModelMixin

from genstream.vae.adapters.base import Adapter
from genstream.vae.adapters.cosmos import CosmosAdapter
from genstream.vae.adapters.hunyuan import HunyuanVideo15Adapter, HunyuanVideoAdapter
from genstream.vae.adapters.image import ImageAdapter, TinyImageAdapter
from genstream.vae.adapters.ltx import LTXAdapter
from genstream.vae.adapters.magvit import MagvitAdapter
from genstream.vae.adapters.mochi import MochiAdapter
from genstream.vae.adapters.partition import CogVideoXAdapter, KVAEAdapter
from genstream.vae.adapters.probe import probe
from genstream.vae.adapters.wan import QwenImageAdapter, WanAdapter
from genstream.vae.wrapping import streams

_ADAPTERS: dict[type, type[Adapter]] = {
    diffusers.AutoencoderKLWan: WanAdapter,
    diffusers.AutoencoderKLQwenImage: QwenImageAdapter,
    diffusers.AutoencoderKLCogVideoX: CogVideoXAdapter,
    diffusers.AutoencoderKLKVAEVideo: KVAEAdapter,
    diffusers.AutoencoderKLMagvit: MagvitAdapter,
    diffusers.AutoencoderKLMochi: MochiAdapter,
    diffusers.AutoencoderKLLTXVideo: LTXAdapter,
    diffusers.AutoencoderKLLTX2Video: LTXAdapter,
    diffusers.AutoencoderKLCosmos: CosmosAdapter,
    diffusers.AutoencoderKLHunyuanVideo: HunyuanVideoAdapter,
    diffusers.AutoencoderKLHunyuanVideo15: HunyuanVideo15Adapter,
    diffusers.AutoencoderKL: ImageAdapter,
    diffusers.AutoencoderTiny: TinyImageAdapter,
}

_REFUSED = {
    "AutoencoderKLAllegro": "it sees the whole clip and works in overlapping tiles only",
    "AutoencoderKLTemporalDecoder": "its decoder looks at all frames of a clip at once",
    "AutoencoderVidTok": "it looks three frames ahead and keeps whole chunks on the module",
    "AutoencoderKLMiniMaxH3": "it is a transformer over clips of 17 frames, which share no past",
}


def stream_vae(vae: ModelMixin) -> Adapter:
    """The streaming protocol for a diffusers VAE, with an exactness that is measured, not claimed.

    Measuring decodes and encodes a clip of a few latent frames of 2x2 pixels.

    Args:
        vae: a loaded diffusers VAE; its weights are shared, and streaming changes nothing on it.

    Returns:
        A `StreamingVAE`; its `measured` holds the errors.
    """
    adapter = adapter_of(vae)
    return type(adapter)(vae, probe(adapter))


def adapter_of(vae: ModelMixin) -> Adapter:
    """The adapter of a VAE, which need not have weights; nothing is measured.

    Raises:
        ValueError: it cannot stream.
    """
    for kind in type(vae).__mro__:
        if kind in _ADAPTERS:
            return _ADAPTERS[kind](vae)
        if kind.__name__ in _REFUSED:
            raise ValueError(f"{type(vae).__name__} cannot stream: {_REFUSED[kind.__name__]}")
    if streams(vae):
        raise ValueError(f"vae must be one of diffusers, got a {type(vae).__name__}, which streams as it is")
    known = ", ".join(sorted(kind.__name__ for kind in _ADAPTERS))
    raise ValueError(f"{type(vae).__name__} cannot stream: no adapter is known for it, only for {known}")
