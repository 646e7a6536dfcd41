"""How a whole clip is cut for a VAE that streams."""

from torch import Tensor


def cut_clip(clip: Tensor, chunk_latents: int | None, frames_per_latent: int) -> tuple[Tensor, ...]:
    """Cut [B, C, F, h, w] along time into parts of `chunk_latents` latent frames; None leaves it whole."""
    if chunk_latents is None:
        return (clip,)
    if chunk_latents < 1:
        raise ValueError(f"chunk_latents must be None or 1 or more, got {chunk_latents}")
    parts: tuple[Tensor, ...] = clip.split(chunk_latents * frames_per_latent, dim=2)
    return parts
