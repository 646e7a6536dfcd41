"""A trainable causal video VAE that starts from an image VAE and streams exactly.

OD-VAE (2409.01199) with everything that mixes time made causal and local: every layer remembers the few
frames it needs, so a chunk, a clip and a stream without end go through the same code at constant memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from genstream.shapes import check_counts
from genstream.vae.causal_network import Decoder, Encoder, NetworkSettings, Norm, inflate
from genstream.vae.checks import check_state, check_tensor
from genstream.vae.identity import describe
from genstream.vae.layers import CausalConv3d, CausalInterpolation, FrameConv, Memory, remembering_layers
from genstream.vae.native import PENDING, NativeVAE
from genstream.vae.protocol import RGB, Direction, VAESpec, VAEState

_TEXT = "text"
_TEXT_MASK = "text_mask"
_LOG_VARIANCE_RANGE = (-30.0, 20.0)

Latents = Literal["kl", "deterministic"]


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """What the encoder says about the latents of a clip, in the normalised space.

    Attributes:
        mean: [B, C, T, h, w].
        log_variance: like `mean`; None for deterministic latents.
    """

    mean: Tensor
    log_variance: Tensor | None

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw of the latents; the mean where they are deterministic."""
        if self.log_variance is None:
            return self.mean
        noise = torch.randn(
            self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )
        return self.mean + torch.exp(0.5 * self.log_variance) * noise


class CausalVideoVAE(NativeVAE):
    """Causal video VAE for images and videos of any length that satisfies `StreamingVAE`.

    Frames are [B, 3, F, H, W] in [-1, 1], latents [B, C, T, h, w] with F = 1 + r (T - 1).
    The default is 4x8x8.

    Args:
        latent_channels: channels of a latent.
        block_out_channels: channels of each level; each level but the last halves height and width.
        layers_per_block: residual blocks of an encoder level; the decoder has one more.
        temporal_levels: for each level but the last, whether the frame rate halves behind it too.
        encoder_temporal_kernels: for each level, 3 for causal 3-D convolutions or 1 for 2-D ones, which cost
            a third.
        decoder_temporal_kernels: likewise.
        norm: "group" over each frame, as image VAEs have, or "channel", which tiles in space do not change.
        norm_num_groups: groups of "group".
        mid_block_add_attention: whether the frames of the last level have self-attention.
        latents: "kl" has a mean and a variance per latent, "deterministic" one value.
        use_quant_conv: one more 1x1 convolution behind the encoder, as Stable Diffusion has.
        use_post_quant_conv: likewise in front of the decoder.
        text_dim: width of the tokens of a caption that the decoder can follow; None for no such module.
        text_heads: heads of that module.
        latents_mean: per channel, of the encoder's raw output; None for 0.
        latents_std: per channel, None for 1; encode returns (raw - mean) / std, decode undoes it.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        temporal_levels: Sequence[bool] = (False, True, True),
        encoder_temporal_kernels: Sequence[int] = (1, 1, 3, 3),
        decoder_temporal_kernels: Sequence[int] = (3, 3, 3, 3),
        norm: Norm = "group",
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        latents: Latents = "kl",
        use_quant_conv: bool = False,
        use_post_quant_conv: bool = False,
        text_dim: int | None = None,
        text_heads: int = 4,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check_config(self.config)
        moments = latent_channels * (2 if latents == "kl" else 1)
        self.encoder = Encoder(self._network(encoder_temporal_kernels), moments)
        self.quant_conv = FrameConv(moments, moments, 1) if use_quant_conv else nn.Identity()
        self.post_quant_conv = (
            FrameConv(latent_channels, latent_channels, 1) if use_post_quant_conv else nn.Identity()
        )
        network = self._network(decoder_temporal_kernels)
        self.decoder = Decoder(network, latent_channels, text_dim, text_heads)
        self._memory_latents = _memory_latents(self.decoder)
        self._set_statistics(latents_mean, latents_std, latent_channels)

    @classmethod
    def from_image_vae(
        cls,
        image_vae: AutoencoderKL,
        *,
        temporal_levels: Sequence[bool] = (False, True, True),
        encoder_temporal_kernels: Sequence[int] = (1, 1, 3, 3),
        decoder_temporal_kernels: Sequence[int] = (3, 3, 3, 3),
        text_dim: int | None = None,
    ) -> "CausalVideoVAE":
        """A video VAE that does to one frame what `image_vae` does to an image (tail initialisation, OD-VAE).

        Its latents are normalised as diffusion models expect those of `image_vae`.
        """
        image = image_vae.config
        _check_image_config(image_vae)
        mean, std = _image_statistics(image)
        vae: CausalVideoVAE = cls(
            latent_channels=image.latent_channels,
            block_out_channels=list(image.block_out_channels),
            layers_per_block=image.layers_per_block,
            temporal_levels=temporal_levels,
            encoder_temporal_kernels=encoder_temporal_kernels,
            decoder_temporal_kernels=decoder_temporal_kernels,
            norm_num_groups=image.norm_num_groups,
            mid_block_add_attention=image.mid_block_add_attention,
            use_quant_conv=image.use_quant_conv,
            use_post_quant_conv=image.use_post_quant_conv,
            text_dim=text_dim,
            latents_mean=mean,
            latents_std=std,
        )
        without_source = inflate(image_vae, vae)
        unknown = [
            name for name in without_source if "temporal" not in name and "text_attentions" not in name
        ]
        if unknown:
            raise ValueError(f"image_vae must have weights for {', '.join(unknown)}")
        vae.to(image_vae.device).type(image_vae.dtype)
        return vae

    @property
    def spec(self) -> VAESpec:
        """Ratios, channels and memory."""
        return VAESpec(
            temporal_ratio=2 ** sum(self.config.temporal_levels),
            spatial_ratio=2 ** len(self.config.temporal_levels),
            latent_channels=self.config.latent_channels,
            memory_latents=self._memory_latents,
        )

    def condition(self, state: VAEState, text: Tensor, mask: Tensor) -> None:
        """Let the decoder follow a caption from the next chunk on; no tokens at all stand for none.

        Args:
            state: of decoding.
            text: [B, L, D] tokens of a text encoder.
            mask: [B, L], 0 where a caption has no token.
        """
        check_state(state, "decode", describe(self), self._weight)
        if self.config.text_dim is None:
            raise ValueError("text needs a VAE with text_dim, got one whose text_dim is None")
        like = self._weight
        check_tensor("text", text, (state.batch_size, None, self.config.text_dim), like)
        if mask.shape != text.shape[:2]:
            raise ValueError(f"mask must be {list(text.shape[:2])} like text, got {list(mask.shape)}")
        told = {_TEXT: text.detach().to(like, copy=True), _TEXT_MASK: mask.to(like)}
        state.advance(0, {**state.slots, **told})

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode_chunk(self, frames: Tensor, state: VAEState) -> Tensor:
        """Latents [B, C, T, h, w] that become complete with `frames` [B, 3, F, H, W]; the rest waits."""
        posterior, slots = self._encode(frames, state)
        state.advance(posterior.mean.shape[2], _detached(slots))
        return posterior.mean

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode_window(self, frames: Tensor, state: VAEState) -> Posterior:
        """`encode_chunk` for training: gradient flows through the state to earlier windows.

        `detach_state` ends that, and with it the memory that the earlier windows hold.
        """
        posterior, slots = self._encode(frames, state)
        state.advance(posterior.mean.shape[2], slots)
        return posterior

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode_chunk_unclamped(self, latents: Tensor, state: VAEState) -> Tensor:
        """`decode_chunk` before the clamp, whose gradient is zero outside the range."""
        frames, slots = self._decode(latents, state)
        state.advance(latents.shape[2], _detached(slots))
        return frames

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode_window(self, latents: Tensor, state: VAEState) -> Tensor:
        """`decode_chunk` for training: not clamped, and gradient flows as in `encode_window`."""
        frames, slots = self._decode(latents, state)
        state.advance(latents.shape[2], slots)
        return frames

    def _encode(self, frames: Tensor, state: VAEState) -> tuple[Posterior, dict[str, Tensor]]:
        """Posterior of the groups that `frames` complete, and the next slots."""
        waiting = self._with_pending(frames, state)
        ready = self._complete_frames(waiting.shape[2], state)
        if ready == 0:
            nothing = self._no_latents(state)
            return self._posterior(nothing, nothing), {**state.slots, PENDING: waiting}
        memory = Memory(self.encoder, state.slots)
        moments = self.quant_conv(self.encoder(waiting[:, :, :ready], memory))
        mean, *rest = moments.split(self.config.latent_channels, dim=1)
        posterior = self._posterior(mean, rest[0] if rest else mean)
        return posterior, {**memory.slots, PENDING: waiting[:, :, ready:].clone()}

    def _posterior(self, mean: Tensor, log_variance: Tensor) -> Posterior:
        """Normalise raw moments. The variance is kept in a range where its exponential is finite."""
        normalised = self._normalised(mean)
        if self.config.latents == "deterministic":
            return Posterior(mean=normalised, log_variance=None)
        bounded = log_variance.clamp(*_LOG_VARIANCE_RANGE)
        _, std = self._statistics()
        return Posterior(mean=normalised, log_variance=(bounded - 2 * std.log()).to(normalised.dtype))

    def _decode(self, latents: Tensor, state: VAEState) -> tuple[Tensor, dict[str, Tensor]]:
        """Frames, not clamped, and the next slots."""
        self._check_latents(latents, state)
        if latents.shape[2] == 0:
            return self._no_frames(state), dict(state.slots)
        text, mask = state.slots[_TEXT], state.slots[_TEXT_MASK]
        memory = Memory(self.decoder, state.slots)
        frames = self.decoder(self.post_quant_conv(self._raw(latents)), memory, text, mask)
        return frames, {**memory.slots, _TEXT: text, _TEXT_MASK: mask}

    def _first_slots(
        self, direction: Direction, batch_size: int, height: int, width: int
    ) -> dict[str, Tensor]:
        network = self.encoder if direction == "encode" else self.decoder
        slots = {
            name: self._weight.new_zeros((batch_size, 0)) for name in remembering_layers(network).values()
        }
        if direction == "decode":
            slots[_TEXT] = self._weight.new_zeros((batch_size, 0, self.config.text_dim or 0))
            slots[_TEXT_MASK] = self._weight.new_zeros((batch_size, 0))
        return slots

    def _complete_frames(self, waiting: int, state: VAEState) -> int:
        """How many of the waiting frames fill whole groups; the first group of a stream is one frame."""
        ratio = self.spec.temporal_ratio
        if state.steps > 0 or waiting == 0:
            return waiting - waiting % ratio
        return waiting - (waiting - 1) % ratio

    def _network(self, temporal_kernels: Sequence[int]) -> NetworkSettings:
        config = self.config
        return NetworkSettings(
            channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            temporal_levels=tuple(config.temporal_levels),
            temporal_kernels=tuple(temporal_kernels),
            norm=config.norm,
            norm_groups=config.norm_num_groups,
            attention=config.mid_block_add_attention,
        )


def detach_state(state: VAEState) -> None:
    """Let later windows send no gradient into those that made `state`."""
    state.advance(0, _detached(state.slots))


def _detached(slots: dict[str, Tensor]) -> dict[str, Tensor]:
    # The memory of an endless stream must not hold an endless graph.
    return {name: slot.detach() for name, slot in slots.items()}


def _memory_latents(decoder: nn.Module) -> int:
    """How many latent frames back a frame depends on. Layers are registered in the order in which they run.

    Its convolutions reach back `reach` latent frames in all. A group's first frame lies (r - 1) / r latent
    frames before its latent frame, and the frame it reaches may lie between two latent frames.
    """
    reach, rate = 0.0, 1
    for layer in decoder.modules():
        if isinstance(layer, CausalConv3d):
            reach += (layer.kernel_size[0] - 1) / rate
        elif isinstance(layer, CausalInterpolation):
            rate *= 2
    return 1 + math.ceil(reach - 1 / rate)


def _check_config(config: FrozenDict) -> None:
    check_counts(
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
    )
    levels = len(config.block_out_channels)
    if len(config.temporal_levels) != levels - 1:
        raise ValueError(
            f"temporal_levels must be {levels - 1} values for {levels} levels, "
            f"got {list(config.temporal_levels)}"
        )
    for name in ("encoder_temporal_kernels", "decoder_temporal_kernels"):
        kernels = list(config[name])
        if len(kernels) != levels or not set(kernels) <= {1, 3}:
            raise ValueError(f"{name} must be {levels} numbers of 1 or 3, got {kernels}")
    for name, allowed in (("norm", get_args(Norm)), ("latents", get_args(Latents))):
        if config[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {config[name]!r}")
    groups = config.norm_num_groups
    if config.norm == "group" and any(width % groups for width in config.block_out_channels):
        raise ValueError(
            f"block_out_channels must divide by norm_num_groups = {groups}, "
            f"got {list(config.block_out_channels)}"
        )
    if config.text_dim is not None and config.block_out_channels[-1] % config.text_heads:
        raise ValueError(
            f"text_heads must divide the last of block_out_channels = {config.block_out_channels[-1]}, "
            f"got {config.text_heads}"
        )


def _check_image_config(image_vae: object) -> None:
    """Refuse image VAEs of another architecture than Stable Diffusion's."""
    if not isinstance(image_vae, AutoencoderKL):
        raise ValueError(f"image_vae must be an AutoencoderKL, got {type(image_vae).__name__}")
    config = image_vae.config
    levels = len(config.block_out_channels)
    expected = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "act_fn": "silu",
        "in_channels": RGB,
        "out_channels": RGB,
    }
    for name, wanted in expected.items():
        value = list(config[name]) if isinstance(wanted, list) else config[name]
        if value != wanted:
            raise ValueError(f"image_vae must have {name} = {wanted}, got {value}")


def _image_statistics(config: FrozenDict) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel that say what the image VAE's own configuration says."""
    count, factor = config.latent_channels, config.scaling_factor
    if config.latents_mean is not None and config.latents_std is not None:
        return list(config.latents_mean), [std / factor for std in config.latents_std]
    return [config.shift_factor or 0.0] * count, [1 / factor] * count
