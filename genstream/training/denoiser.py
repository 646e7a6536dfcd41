"""What is trained on the toy world: a transformer, with a text encoder small enough to learn too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from genstream.conditioning.text import embed_tokens
from genstream.data import vocabulary
from genstream.training.attention import MatmulAttention
from genstream.training.loop import load_average
from genstream.training.text import tiny_text_encoder, word_tokenizer
from genstream.transformer.attention import AttentionProcessor, CrossAttention, SelfAttention
from genstream.transformer.causal_dit import CausalDiT

HEAD_WIDTH = 48
_ENDS = ("transformer.patch_embedding.", "transformer.proj_out.")


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings:
    """What the model looks like.

    Attributes:
        patch_size: latent pixels on each side of a token.
        width: of the transformer; heads have 48 channels.
        layers: transformer blocks.
        ffn_width: hidden width of the feed-forward layers.
        text_width: of the text encoder.
        text_layers: of the text encoder.
        text_tokens: longest prompt.
    """

    patch_size: int = 2
    width: int = 192
    layers: int = 6
    ffn_width: int = 768
    text_width: int = 128
    text_layers: int = 2
    text_tokens: int = 32

    def __post_init__(self) -> None:
        if self.width % HEAD_WIDTH:
            raise ValueError(f"width must be a multiple of {HEAD_WIDTH}, got {self.width}")


class Denoiser(nn.Module):
    """Transformer and text encoder.

    Args:
        settings: of both.
        channels: of the latents.
        tokenizer: of the text encoder; that of the toy world's words when None.
    """

    def __init__(
        self, settings: DenoiserSettings, channels: int, tokenizer: PreTrainedTokenizerFast | None = None
    ) -> None:
        super().__init__()
        self.text_tokens = settings.text_tokens
        self.tokenizer = tokenizer or word_tokenizer(vocabulary.words())
        self.transformer = CausalDiT(
            patch_size=(1, settings.patch_size, settings.patch_size),
            num_attention_heads=settings.width // HEAD_WIDTH,
            attention_head_dim=HEAD_WIDTH,
            in_channels=channels,
            out_channels=channels,
            text_dim=settings.text_width,
            ffn_dim=settings.ffn_width,
            num_layers=settings.layers,
        )
        self.text_encoder = tiny_text_encoder(len(self.tokenizer), settings.text_width, settings.text_layers)

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Prompt embeddings `[B, text_tokens, text_width]`, with gradient; an empty caption says nothing."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=self.text_tokens, return_tensors="pt"
        )
        device = self.text_encoder.device
        return embed_tokens(tokens.input_ids.to(device), tokens.attention_mask.to(device), self.text_encoder)

    def velocity(
        self,
        x: Tensor,
        sigma: Tensor,
        embeds: Tensor,
        positions: Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity of latents `[B, C, T, h, w]` at noise levels `[B, T]`, in float32.

        Args:
            x: noisy latents.
            sigma: noise level of each latent frame.
            embeds: of the prompts.
            positions: temporal position of each latent frame; 0 to T - 1 when None.
            mask: boolean `[T, T]`, True where the row's frame sees the column's; all see all when None.
        """
        velocity: Tensor = self.transformer(
            x, 1000 * sigma, embeds, frame_positions=positions, attention_mask=mask, return_dict=False
        )[0]
        return velocity.float()


def for_training(denoiser: Denoiser) -> Denoiser:
    """The same model, with the attention that is fastest with gradient on this machine."""
    if not torch.cuda.is_available():
        _set_attention(denoiser, MatmulAttention())
    return denoiser


def load_initial(denoiser: Denoiser, initial: Denoiser, run_folder: Path) -> None:
    """Load the averaged weights of a run of `initial`, whose own are replaced.

    Where its patches are of another size, both ends of `denoiser` stay as they are.
    """
    load_average(initial, run_folder)
    own, weights = denoiser.state_dict(), initial.state_dict()
    ends = {name for name in weights if name.startswith(_ENDS) and weights[name].shape != own[name].shape}
    denoiser.load_state_dict({name: own[name] if name in ends else weights[name] for name in weights})


def _set_attention(module: nn.Module, processor: AttentionProcessor) -> None:
    for part in module.modules():
        if isinstance(part, SelfAttention | CrossAttention):
            part.processor = processor
