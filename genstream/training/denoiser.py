"""What is trained: a transformer, on the toy world with a text encoder small enough to learn too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from genstream.conditioning.text import encode_prompts
from genstream.data import vocabulary
from genstream.data.captions import LONGEST_WORDS
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.shapes import check_count
from genstream.training.attention import FlexAttention, MatmulAttention
from genstream.training.forcing import ForcedSequence
from genstream.training.text import TEXT_HEADS, tiny_text_encoder, word_tokenizer
from genstream.transformer.attention import AttentionProcessor, CrossAttention, SelfAttention
from genstream.transformer.causal_dit import CausalDiT

HEAD_WIDTH = 48
_ENDS = ("transformer.patch_embedding.", "transformer.proj_out.")
_BLOCKS = "transformer.blocks."
_ADDED = ("attn1.to_out.", "attn2.to_out.", "ffn.net.2.")
"""What ends the three parts of a block, each of which adds to the stream."""


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
        text_tokens: longest prompt; 29 or more, for the captions of the toy world and a token that ends them.
    """

    patch_size: int = 2
    width: int = 192
    layers: int = 6
    ffn_width: int = 768
    text_width: int = 128
    text_layers: int = 2
    text_tokens: int = 32

    def __post_init__(self) -> None:
        for field in fields(DenoiserSettings):
            check_count(field.name, getattr(self, field.name))
        for name, divisor in (("width", HEAD_WIDTH), ("text_width", TEXT_HEADS)):
            if (value := getattr(self, name)) % divisor:
                raise ValueError(f"{name} must be a multiple of {divisor}, got {value}")
        if self.text_tokens <= LONGEST_WORDS:
            raise ValueError(
                f"text_tokens must be more than {LONGEST_WORDS}, the words of the longest caption, "
                f"got {self.text_tokens}"
            )


class Denoiser(nn.Module):
    """Transformer and text encoder.

    Args:
        transformer: predicts velocities.
        text_encoder: embeds prompts.
        tokenizer: of the text encoder.
        text_tokens: longest prompt.
    """

    def __init__(
        self,
        transformer: CausalDiT,
        text_encoder: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        text_tokens: int,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.text_tokens = text_tokens

    @classmethod
    def new(cls, settings: DenoiserSettings, channels: int) -> Self:
        """With random weights, for latents of so many channels and the words of the toy world."""
        tokenizer = word_tokenizer(vocabulary.words())
        return cls(
            CausalDiT(
                patch_size=(1, settings.patch_size, settings.patch_size),
                num_attention_heads=settings.width // HEAD_WIDTH,
                attention_head_dim=HEAD_WIDTH,
                in_channels=channels,
                out_channels=channels,
                text_dim=settings.text_width,
                ffn_dim=settings.ffn_width,
                num_layers=settings.layers,
            ),
            tiny_text_encoder(len(tokenizer), settings.text_width, settings.text_layers),
            tokenizer,
            settings.text_tokens,
        )

    @classmethod
    def of(cls, pipe: CausalVideoPipeline) -> Self:
        """That of a pipeline: it shares its weights."""
        return cls(pipe.transformer, pipe.text_encoder, pipe.tokenizer, pipe.config.text_tokens)

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Prompt embeddings `[B, text_tokens, text_width]`, with gradient; an empty caption says nothing."""
        return encode_prompts(captions, self.tokenizer, self.text_encoder, self.text_tokens)

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


def velocity_in(
    denoiser: Denoiser, context: Tensor, x: Tensor, sigma: Tensor, embeds: Tensor, sequence: ForcedSequence
) -> Tensor:
    """Velocity of the noisy frames of a sequence, behind its clean ones.

    Args:
        denoiser: the model.
        context: latents of the clean frames.
        x: of the noisy frames.
        sigma: noise level of each noisy frame, `[B, T noisy]`.
        embeds: of the prompts.
        sequence: who sees whom.
    """
    clean = context.shape[2]
    seen = torch.cat([context, x], dim=2)
    told = torch.cat([sigma.new_zeros(len(sigma), clean), sigma], dim=1)
    mask = torch.tensor(sequence.mask(), device=x.device)
    return denoiser.velocity(seen, told, embeds, sequence.positions, mask)[:, :, clean:]


def for_training(denoiser: Denoiser, *, checkpointing: bool = False) -> Denoiser:
    """The same model, with the attention that is fastest with gradient on this machine.

    With `checkpointing`, what lies between blocks is computed twice in place of being kept.
    """
    set_attention(denoiser, FlexAttention() if torch.cuda.is_available() else MatmulAttention())
    if checkpointing:
        denoiser.transformer.enable_gradient_checkpointing()
    return denoiser


def copy_weights(source: Denoiser, target: Denoiser) -> None:
    """Where the patches of both are of another size, both ends of `target` stay as they are.

    A `target` with more blocks computes the same as `source` at first: a new block is a copy of the one in
    front of it whose layers that add to the stream add nothing.

    Raises:
        ValueError: anything else differs in shape.
    """
    own, weights = target.state_dict(), _deepened(source, target.transformer.config.num_layers)
    differing = [name for name in {**own, **weights} if _shape(own, name) != _shape(weights, name)]
    if wrong := [name for name in differing if not name.startswith(_ENDS)]:
        raise ValueError(
            f"initial must be a model of the same widths, and no deeper: {len(wrong)} weights differ "
            f"in shape, the first of them {wrong[0]}"
        )
    target.load_state_dict({name: own[name] if name in differing else weights[name] for name in weights})


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(weights[name].shape) if name in weights else None


def _deepened(denoiser: Denoiser, layers: int) -> dict[str, Tensor]:
    """Its weights, with new blocks spread evenly among its own if it has fewer than `layers`."""
    weights: dict[str, Tensor] = denoiser.state_dict()
    present = denoiser.transformer.config.num_layers
    if layers <= present:
        return weights
    deeper = {name: weight for name, weight in weights.items() if not name.startswith(_BLOCKS)}
    for layer in range(layers):
        origin = layer * present // layers
        is_new = layer > 0 and origin == (layer - 1) * present // layers
        prefix = f"{_BLOCKS}{origin}."
        for name in [name for name in weights if name.startswith(prefix)]:
            adds_nothing = is_new and name.removeprefix(prefix).startswith(_ADDED)
            weight = torch.zeros_like(weights[name]) if adds_nothing else weights[name]
            deeper[f"{_BLOCKS}{layer}.{name.removeprefix(prefix)}"] = weight
    return deeper


def set_attention(module: nn.Module, processor: AttentionProcessor) -> None:
    """Let all attention inside be computed by `processor`."""
    for part in module.modules():
        if isinstance(part, SelfAttention | CrossAttention):
            part.processor = processor
