"""The Wan 2.1 video transformer, made causal by what its KV cache lets a chunk see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from genstream.cache.kv_cache import AttentionContext, CacheShape, KVCache, TextCache
from genstream.cache.layout import CacheLayout
from genstream.kernels.rope import Phases, phases
from genstream.shapes import check_count, check_positive
from genstream.transformer.attention import CrossAttention, FrameMask, KeysValues, SelfAttention
from genstream.transformer.embeddings import ConditionEmbedder

_SIZES = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
)
_OPTIONAL_SIZES = ("out_channels", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len")


@dataclass
class CausalDiTOutput(BaseOutput):
    """Velocity `[B, C, T, h, w]`: noise minus clean latent."""

    sample: Tensor


class CausalBlock(nn.Module):
    """Transformer block with one modulation per latent frame."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        heads: int,
        eps: float,
        layer: int,
        cross_attn_norm: bool,
        added_kv_proj_dim: int | None,
    ) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = SelfAttention(dim, heads, eps, layer)
        self.attn2 = CrossAttention(dim, heads, eps, added_kv_proj_dim)
        self.norm2 = FP32LayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.norm3 = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        hidden: Tensor,
        modulation: Tensor,
        at: Phases,
        text: KeysValues,
        image: KeysValues | None = None,
        cache: AttentionContext | None = None,
        mask: FrameMask | None = None,
    ) -> Tensor:
        """Tokens by frame `[B, T, tokens, C]`, modulation `[B, T or 1, 6, C]`, to tokens by frame."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            (self.scale_shift_table + modulation.float()).unsqueeze(-2).to(hidden.dtype).unbind(2)
        )  # each [B, T or 1, 1, C]
        frames = hidden.shape[1]
        normed = self.norm1(hidden) * (1 + scale1) + shift1
        attended = self.attn1(normed.flatten(1, 2), at, cache, mask)
        hidden = hidden + attended.unflatten(1, (frames, -1)) * gate1
        attended = self.attn2(self.norm2(hidden).flatten(1, 2), text, image)
        hidden = hidden + attended.unflatten(1, (frames, -1))
        normed = self.norm3(hidden) * (1 + scale2) + shift2
        out: Tensor = hidden + self.ffn(normed) * gate2
        return out


class CausalDiT(
    ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, FromOriginalModelMixin, CacheMixin
):
    """Wan 2.1 transformer with one timestep per latent frame and an explicit KV cache.

    Parameter names and configuration are those of diffusers' `WanTransformer3DModel`, so its checkpoints
    load as they are. Without a cache and mask it is the bidirectional Wan model.

    Source: Wan 2.1 (arXiv 2503.20314); causal use: Self Forcing (arXiv 2506.08009).

    Args:
        patch_size: latent frames, rows and columns of one token; the first must be 1.
        num_attention_heads: heads.
        attention_head_dim: channels of a head, even and at least 6.
        in_channels: channels of the input, conditioning channels included.
        out_channels: latent channels of the velocity; `in_channels` when None.
        text_dim: width of the text encoder.
        freq_dim: width of the sinusoidal timestep embedding.
        ffn_dim: hidden width of the feed-forward layers.
        num_layers: transformer blocks.
        cross_attn_norm: affine layer norm in front of cross-attention.
        qk_norm: only "rms_norm_across_heads".
        eps: epsilon of all norms.
        image_dim: width of CLIP image tokens; None for text-to-video.
        added_kv_proj_dim: width of the embedded image tokens; None for text-to-video.
        rope_max_seq_len: accepted for compatibility; positions are unlimited here.
        pos_embed_seq_len: learned positions of the image tokens of first-and-last-frame models.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("CausalBlock",)
    _repeated_blocks = ("CausalBlock",)
    # A list: diffusers takes a tuple for one name, and keeps nothing.
    _keep_in_fp32_modules: ClassVar[list[str]] = [
        "time_embedder",
        "scale_shift_table",
        "norm1",
        "norm2",
        "norm3",
    ]
    _skip_layerwise_casting_patterns = ("patch_embedding", "condition_embedder", "norm")
    _skip_keys = ("kv_cache", "text_cache")
    _supports_group_offloading = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int | None = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
    ) -> None:
        super().__init__()
        if len(patch_size) != 3 or min(patch_size) < 1:
            raise ValueError(f"patch_size must be three numbers of at least 1, got {tuple(patch_size)}")
        if patch_size[0] != 1:
            raise ValueError(f"patch_size must cover one latent frame in time, got {tuple(patch_size)}")
        if qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm must be 'rms_norm_across_heads', got {qk_norm!r}")
        check_positive("eps", eps)
        for name in _SIZES:
            check_count(name, self.config[name])
        for name in _OPTIONAL_SIZES:
            if (size := self.config[name]) is not None:
                check_count(name, size)
        dim = num_attention_heads * attention_head_dim
        self.patch_size = tuple(patch_size)
        self.out_channels = out_channels or in_channels
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim, image_dim, pos_embed_seq_len)
        self.blocks = nn.ModuleList(
            CausalBlock(dim, ffn_dim, num_attention_heads, eps, layer, cross_attn_norm, added_kv_proj_dim)
            for layer in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, self.out_channels * patch_size[1] * patch_size[2])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False

    def enable_cache(self, config: object) -> None:
        """Refused: diffusers' step caches skip layers, and the KV cache would lack their keys and values."""
        raise ValueError(f"a step cache would leave gaps in the KV cache, got {type(config).__name__}")

    def kv_cache(self, layout: CacheLayout, batch_size: int, height: int, width: int) -> KVCache:
        """An empty cache for latent frames of `height` x `width` latent pixels."""
        rows, columns = self.token_grid(height, width)
        shape = CacheShape(
            layers=len(self.blocks),
            batch=batch_size,
            heads=self.config.num_attention_heads,
            head_width=self.config.attention_head_dim,
            rows=rows,
            columns=columns,
        )
        # Not like a weight: offloaded ones lie elsewhere, and float8 ones are cast when they are used.
        return KVCache.allocate(layout, shape, torch.empty(0, device=self.device, dtype=self.dtype))

    def text_cache(self, prompt_embeds: Tensor, image_embeds: Tensor | None = None) -> TextCache:
        """Cross-attention keys and values of every layer, computed once per prompt.

        Args:
            prompt_embeds: `[B, tokens, text_dim]`, zero rows behind the prompt; padding is attended to.
            image_embeds: `[B, tokens, image_dim]` of image-to-video checkpoints.
        """
        embedder, device = self.condition_embedder, prompt_embeds.device
        text = embedder.text_embedder(_beside(prompt_embeds, embedder.text_embedder.linear_1.weight))
        image = None
        if image_embeds is not None:
            if embedder.image_embedder is None:
                raise ValueError(
                    "encoder_hidden_states_image was given, but this model takes no image tokens"
                )
            embedded = embedder.image_embedder(_beside(image_embeds, embedder.image_embedder.norm1.weight))
            image = [
                _to(device, layer.image(_beside(embedded, layer.to_k.weight)))
                for layer in self._cross_attentions()
            ]
        return TextCache(
            [_to(device, layer.text(_beside(text, layer.to_k.weight))) for layer in self._cross_attentions()],
            image,
        )

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame of `height` x `width` latent pixels."""
        _, patch_height, patch_width = self.patch_size
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"latent size must divide by the patch {patch_height}x{patch_width}, got {height}x{width}"
            )
        return height // patch_height, width // patch_width

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        frame_positions: Sequence[int] | None = None,
        kv_cache: AttentionContext | None = None,
        text_cache: TextCache | None = None,
        attention_mask: Tensor | None = None,
        finished_frames: int = 0,
        past_weight: float = 1.0,
        return_dict: bool = True,
    ) -> CausalDiTOutput | tuple[Tensor]:
        """Velocity of noisy latents.

        Args:
            hidden_states: `[B, in_channels, T, h, w]`; without the channels that `text_cache` holds.
            timestep: `[B]`, or `[B, T]` for one noise level per latent frame; in [0, 1000].
            encoder_hidden_states: prompt embeddings `[B, tokens, text_dim]`, unless `text_cache` is given.
            encoder_hidden_states_image: image tokens `[B, tokens, image_dim]`.
            frame_positions: temporal position of each latent frame; 0 .. T - 1 when None. With a cache they
                are consecutive absolute frame indices, and say which slots are written.
            kv_cache: past of the stream; this pass's keys and values are written into it.
            text_cache: prompt of the stream, from `text_cache()`.
            attention_mask: boolean `[T, T]` over latent frames, True where a query frame may see a key
                frame; for training without a cache.
            finished_frames: leading latent frames that are a finished chunk, which does not see those behind
                it; with a cache.
            past_weight: factor on the attention that the others pay to cached frames but the first; with a
                cache.
            return_dict: return `CausalDiTOutput` instead of a tuple.
        """
        frames, height, width = hidden_states.shape[2:]
        rows, columns = self.token_grid(height, width)
        positions = range(frames) if frame_positions is None else frame_positions
        if kv_cache is not None:
            kv_cache.begin(positions[0], frames, finished_frames=finished_frames, past_weight=past_weight)
        if text_cache is None:
            if encoder_hidden_states is None:
                raise ValueError("encoder_hidden_states or text_cache must be given")
            text_cache = self.text_cache(encoder_hidden_states, encoder_hidden_states_image)
        if text_cache.channels is not None:
            last = text_cache.channels.shape[2] - 1
            channels = text_cache.channels[:, :, [min(position, last) for position in positions]]
            hidden_states = torch.cat([hidden_states, channels], dim=1)
        head_width = self.config.attention_head_dim
        at = phases(positions, rows, columns, head_width, hidden_states.device)
        mask = None
        if attention_mask is not None:
            mask = FrameMask(attention_mask, rows * columns)

        time = timestep if timestep.ndim == 2 else timestep.unsqueeze(1)
        embedded, modulation = self.condition_embedder.time(time)
        hidden = (
            self.patch_embedding(hidden_states).flatten(3).permute(0, 2, 3, 1)
        )  # [B, C, T, L] -> [B, T, L, C]
        for layer, block in enumerate(self.blocks):
            image = text_cache.image[layer] if text_cache.image else None
            arguments = (hidden, modulation, at, text_cache.text[layer], image, kv_cache, mask)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(block, *arguments)
            else:
                hidden = block(*arguments)

        shift, scale = (self.scale_shift_table + embedded.unsqueeze(2).float()).unsqueeze(-2).unbind(2)
        hidden = (self.norm_out(hidden.float()) * (1 + scale) + shift).to(hidden.dtype)
        velocity = self._unpatchify(self.proj_out(hidden), rows, columns)
        return CausalDiTOutput(sample=velocity) if return_dict else (velocity,)

    def _cross_attentions(self) -> Iterator[CrossAttention]:
        for block in self.blocks:
            assert isinstance(block, CausalBlock)
            yield block.attn2

    def _unpatchify(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """`[B, T, rows * columns, patch * C]` to `[B, C, T, h, w]`."""
        _, patch_height, patch_width = self.patch_size
        patched: Tensor = tokens.unflatten(2, (rows, columns)).unflatten(
            -1, (patch_height, patch_width, self.out_channels)
        )
        return patched.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def _beside(x: Tensor, weight: Tensor) -> Tensor:
    """`x` where a weight is: group offloading brings blocks to the GPU for their own `forward` only.

    A weight that accelerate has put away is nowhere; it comes to `x` by itself.
    """
    return x if weight.is_meta else x.to(weight.device)


def _to(device: torch.device, tensors: KeysValues) -> KeysValues:
    keys, values = tensors
    return keys.to(device), values.to(device)
