"""How a whole clip goes through a VAE that streams."""

from torch import Tensor

from genstream.shapes import check_count
from genstream.vae.checks import check_clip
from genstream.vae.protocol import StreamingVAE, VAEState


def decoding_state(vae: StreamingVAE, latents: Tensor) -> VAEState:
    """A decoding state for clips of the batch and size of `latents` [B, C, T, h, w]."""
    check_clip("latents", latents)
    ratio = vae.spec.spatial_ratio
    batch_size, _, _, height, width = latents.shape
    return vae.init_state("decode", batch_size, height * ratio, width * ratio)


def cut_clip(clip: Tensor, chunk_latents: int | None, frames_per_latent: int) -> tuple[Tensor, ...]:
    """Cut [B, C, F, h, w] along time into parts of `chunk_latents` latent frames; None leaves it whole."""
    if chunk_latents is None:
        return (clip,)
    check_count("chunk_latents", chunk_latents)
    parts: tuple[Tensor, ...] = clip.split(chunk_latents * frames_per_latent, dim=2)
    return parts
