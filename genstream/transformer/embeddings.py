"""Embeddings of timestep, text and image that condition the transformer."""

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn


def timestep_dtype(device: torch.device) -> torch.dtype:
    """float64 like Wan 2.1, but float32 on Apple's GPUs, which lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """Sinusoidal timestep embedding `[..., width]`, cosines first, as exact as the device allows."""
    half, dtype = width // 2, timestep_dtype(timestep.device)
    frequencies = 10_000.0 ** -(torch.arange(half, dtype=dtype, device=timestep.device) / half)
    angles = timestep.to(dtype).unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ImageEmbedder(nn.Module):
    """CLIP image tokens `[B, tokens, image width]` to the transformer's width."""

    def __init__(self, in_features: int, out_features: int, pos_embed_seq_len: int | None = None) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(in_features)
        self.ff = FeedForward(in_features, out_features, mult=1, activation_fn="gelu")
        self.norm2 = FP32LayerNorm(out_features)
        self.pos_embed = (
            nn.Parameter(torch.zeros(1, pos_embed_seq_len, in_features)) if pos_embed_seq_len else None
        )

    def forward(self, image_embeds: Tensor) -> Tensor:
        """Project; first-and-last-frame models add a learned position to the two images' tokens."""
        if self.pos_embed is not None:
            image_embeds = (
                image_embeds.view(-1, self.pos_embed.shape[1], image_embeds.shape[-1]) + self.pos_embed
            )
        hidden: Tensor = self.norm2(self.ff(self.norm1(image_embeds)))
        return hidden


class ConditionEmbedder(nn.Module):
    """Timestep, text and image embedders under the names of diffusers' Wan checkpoints."""

    def __init__(
        self,
        dim: int,
        freq_dim: int,
        text_dim: int,
        image_dim: int | None = None,
        pos_embed_seq_len: int | None = None,
    ) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TimestepEmbedding(in_channels=freq_dim, time_embed_dim=dim)
        self.act_fn = nn.SiLU()
        self.time_proj = nn.Linear(dim, dim * 6)
        self.text_embedder = PixArtAlphaTextProjection(text_dim, dim, act_fn="gelu_tanh")
        self.image_embedder = ImageEmbedder(image_dim, dim, pos_embed_seq_len) if image_dim else None

    def time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps `[B, T]` in [0, 1000] to the embedding `[B, T, dim]` and modulation `[B, T, 6, dim]`."""
        weight = self.time_embedder.linear_1.weight
        embedded = self.time_embedder(sinusoid(timestep, self.freq_dim).to(weight.dtype))  # [B, T, dim]
        modulation = self.time_proj(self.act_fn(embedded).to(self.time_proj.weight.dtype))
        return embedded, modulation.unflatten(-1, (6, -1))
