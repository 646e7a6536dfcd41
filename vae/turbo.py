"""Turbo-VAED: small decoders distilled from large video VAEs (2508.09136).

Depthwise-separable 3-D convolutions where most channels are, and a 3-D pixel shuffle taken apart into a
reshape over time and 2-D shuffles. Key and configuration names are those of the published weights
(https://github.com/hustvl/Turbo-VAED); `genstream.vae.turbo_weights.load_turbo_vaed` reads them.
"""

import math
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from genstream.shapes import check_counts, check_positive
from genstream.vae.checks import check_clip, check_start, check_state, check_tensor
from genstream.vae.chunks import decoding_state
from genstream.vae.identity import describe
from genstream.vae.layers import Memory, remembering_layers
from genstream.vae.native import NativeDecoder
from genstream.vae.protocol import Direction, VAESpec, VAEState
from genstream.vae.turbo_network import TurboDecoder, reach_latents

_WAITING = "waiting"


class TurboVAED(NativeDecoder):
    """Decoder of another VAE's latents that satisfies the decoding half of `StreamingVAE`.

    As published it looks ahead, further than any useful delay: `decode` gives what its authors' code gives.
    Chunk by chunk it decodes overlapping windows at fixed places, so that any chunking gives the same frames;
    `window_error` measures how far they are from `decode`. With `decoder_causal` and `depthwise_causal` it
    looks back only, needs weights trained that way, and streams exactly.

    Frames are [B, 3, F, H, W], latents [B, C, T, h, w], F = 1 + r (T - 1), or r T with `is_video_dc_ae`.
    Lists start at the frames, as in the published configurations.

    Args:
        latent_channels: channels of a latent.
        patch_size: 1, or 4 for two more doublings of height and width by 2-D pixel shuffles.
        decoder_block_out_channels: channels of each level.
        decoder_layers_per_block: residual blocks of each level, then those of the middle.
        decoder_is_dw_conv: for each level and the middle, whether its convolutions are depthwise-separable.
        decoder_dw_kernel_size: their size in space and time.
        spatio_temporal_scaling: for each level, whether it doubles height, width and frame rate.
        decoder_spatio_only: for each level, whether its frame rate stays; None for no level.
        decoder_causal: whether dense convolutions look back only.
        depthwise_causal: whether depthwise ones do too; published weights are made for False.
        is_video_dc_ae: whether the first latent frame gives r frames like every other.
        resnet_norm_eps: of the layer normalisation of shortcuts.
        scaling_factor: latents are (raw - mean) / std * scaling_factor, with the mean and std of the buffers.
        context_latents: latent frames in front of each window, decoded again to warm it up.
        chunk_latents: latent frames that a window adds.
        lookahead_latents: latent frames behind them, decoded in advance.
        takes_normalised: trained on normalised latents, so that the buffers are 0 and 1 for good; without it
            they stand for statistics that nobody gave.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        latent_channels: int = 16,
        patch_size: int = 1,
        decoder_block_out_channels: Sequence[int] = (16, 32, 256, 512),
        decoder_layers_per_block: Sequence[int] = (5, 4, 4, 4, 5),
        decoder_is_dw_conv: Sequence[bool] = (False, False, False, True, True),
        decoder_dw_kernel_size: int = 5,
        spatio_temporal_scaling: Sequence[bool] = (True, True, True, False),
        decoder_spatio_only: Sequence[bool] | None = None,
        decoder_causal: bool = False,
        depthwise_causal: bool = False,
        is_video_dc_ae: bool = False,
        resnet_norm_eps: float = 1e-6,
        scaling_factor: float = 1.0,
        context_latents: int = 4,
        chunk_latents: int = 4,
        lookahead_latents: int = 2,
        takes_normalised: bool = False,
    ) -> None:
        super().__init__()
        if decoder_spatio_only is None:
            self.register_to_config(decoder_spatio_only=[False] * len(decoder_block_out_channels))
        _check_config(self.config)
        self.decoder = TurboDecoder(self.config)
        self._reach = reach_latents(self.decoder)
        self.register_buffer("latents_mean", torch.zeros(latent_channels))
        self.register_buffer("latents_std", torch.ones(latent_channels))

    @property
    def is_causal(self) -> bool:
        """Whether no frame depends on a later latent frame."""
        return bool(self.config.decoder_causal and self.config.depthwise_causal)

    @property
    def has_statistics(self) -> bool:
        """Whether it decodes normalised latents; without, those as its teacher's encoder gives them."""
        neutral = bool((self.latents_mean == 0).all() and (self.latents_std == 1).all())
        return self.config.takes_normalised or not neutral or self.config.scaling_factor != 1

    @property
    def spec(self) -> VAESpec:
        """Ratios, and how a stream is cut: by the layers' own memory if causal, else in windows."""
        config = self.config
        scales = zip(config.spatio_temporal_scaling, config.decoder_spatio_only, strict=True)
        ratio = math.prod(2 for grows, spatial in scales if grows and not spatial)
        back, ahead = self.reach_latents
        in_windows = not self.is_causal
        covered = back <= config.context_latents and ahead <= config.lookahead_latents
        return VAESpec(
            temporal_ratio=ratio,
            spatial_ratio=2 ** sum(config.spatio_temporal_scaling) * config.patch_size,
            latent_channels=config.latent_channels,
            memory_latents=config.context_latents + config.chunk_latents - 1 if in_windows else back,
            first_frames=ratio if config.is_video_dc_ae else 1,
            first_latents=config.chunk_latents if in_windows else 1,
            chunk_latents=config.chunk_latents if in_windows else 1,
            lookahead_latents=config.lookahead_latents if in_windows else 0,
            exactness="approximate" if in_windows and not covered else "exact",
        )

    @property
    def reach_latents(self) -> tuple[int, int]:
        """How many latent frames back and ahead a frame of `decode` depends on."""
        return self._reach

    def init_state(self, direction: Direction, batch_size: int, height: int, width: int) -> VAEState:
        """State of a stream that has not started; `height` and `width` in pixels."""
        if direction != "decode":
            raise ValueError(f"direction must be 'decode' for a VAE without encoder, got {direction!r}")
        state: VAEState = super().init_state(direction, batch_size, height, width)
        return state

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode_chunk_unclamped(self, latents: Tensor, state: VAEState) -> Tensor:
        """`decode_chunk` before the clamp, whose gradient is zero outside the range."""
        self._check_latents(latents, state)
        if latents.shape[2] == 0:
            return self._no_frames(state)
        return self._next_frames(latents, state) if self.is_causal else self._next_windows(latents, state)

    def flush(self, state: VAEState) -> Tensor:
        """Frames of the latents that still wait for later ones; the stream is then at its end."""
        check_state(state, "decode", describe(self), self._weight)
        frames = self._no_frames(state)
        if not self.is_causal and state.slots[_WAITING].shape[2] > 0:
            waiting, done = state.slots[_WAITING], self._decoded_latents(state.steps)
            windows = self._windows(waiting, range(done, state.steps, self.config.chunk_latents), state.steps)
            frames = torch.cat([frames, *windows], dim=2).clamp(-1, 1)
            state.advance(0, {_WAITING: waiting[:, :, :0].clone()})
        state.ended = True
        return frames

    def encode(self, frames: Tensor) -> Tensor:
        """Refused: there is no encoder."""
        raise ValueError(
            f"{type(self).__name__} has no encoder: encode with the VAE whose latents it decodes"
        )

    def encode_chunk(self, frames: Tensor, state: VAEState) -> Tensor:
        """Refused: there is no encoder."""
        return self.encode(frames)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B, 3, F, H, W] in [-1, 1] of a whole clip [B, C, T, h, w]."""
        frames: Tensor = self.decode_unclamped(latents)
        return frames.clamp(-1, 1)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode_unclamped(self, latents: Tensor) -> Tensor:
        """`decode` before the clamp, as the published code gives it."""
        check_clip("latents", latents)
        ratio = self.spec.spatial_ratio
        batch_size, _, _, height, width = latents.shape
        check_start("decode", batch_size, height * ratio, width * ratio, ratio)
        check_tensor("latents", latents, (None, self.config.latent_channels, None, None, None), self._weight)
        past = {name: latents.new_zeros(0) for name in remembering_layers(self.decoder).values()}
        return self._run(latents, Memory(self.decoder, past))

    @torch.no_grad()
    def window_error(self, latents: Tensor) -> float:
        """Largest difference of a pixel between decoding chunk by chunk and `decode`, on these latents.

        Zero but for rounding where `context_latents` and `lookahead_latents` cover `reach_latents`.
        """
        state = decoding_state(self, latents)
        frames = torch.cat([self.decode_chunk(latents, state), self.flush(state)], dim=2)
        return float((frames - self.decode(latents)).abs().max())

    def forward(self, sample: Tensor) -> Tensor:
        """Frames of a clip's latents."""
        return self.decode(sample)

    def _run(self, latents: Tensor, memory: Memory) -> Tensor:
        """The network on normalised latents."""
        std, mean = self.latents_std.view(-1, 1, 1, 1), self.latents_mean.view(-1, 1, 1, 1)
        frames: Tensor = self.decoder(latents * std / self.config.scaling_factor + mean, memory)
        return frames

    def _next_frames(self, latents: Tensor, state: VAEState) -> Tensor:
        """Exactly the next frames, from the layers' memory."""
        memory = Memory(self.decoder, state.slots)
        frames = self._run(latents, memory)
        # Detached: the memory of an endless stream must not hold an endless graph.
        slots = {name: slot.detach() for name, slot in memory.slots.items()}
        state.advance(latents.shape[2], slots)
        return frames

    def _next_windows(self, latents: Tensor, state: VAEState) -> Tensor:
        """The frames of all windows that `latents` complete."""
        waiting = torch.cat([state.slots[_WAITING], latents], dim=2)
        known = state.steps + latents.shape[2]
        done, ready = self._decoded_latents(state.steps), self._decoded_latents(known)
        windows = self._windows(waiting, range(done, ready, self.config.chunk_latents), known)
        frames = torch.cat([self._no_frames(state), *windows], dim=2)
        kept = known - max(0, ready - self.config.context_latents)
        slots = {_WAITING: waiting[:, :, waiting.shape[2] - kept :].detach().clone()}
        state.advance(latents.shape[2], slots)
        return frames

    def _decoded_latents(self, known: int) -> int:
        """How many of `known` latent frames are in windows whose look-ahead is known too."""
        ready: int = max(0, known - self.config.lookahead_latents)
        ready -= ready % self.config.chunk_latents
        return ready

    def _windows(self, waiting: Tensor, starts: range, known: int) -> list[Tensor]:
        """Frames of the windows that start at these latent frames.

        Args:
            waiting: the last latent frames of the `known` ones.
            starts: the latent frame that each window starts to add.
            known: latent frames of the stream so far.
        """
        config, spec = self.config, self.spec
        first = known - waiting.shape[2]
        frames = []
        for start in starts:
            stop = min(start + config.chunk_latents, known)
            begin = max(0, start - config.context_latents)
            end = min(stop + config.lookahead_latents, known)
            window = self.decode_unclamped(waiting[:, :, begin - first : end - first])
            skipped, shown = (
                max(0, spec.first_frames + spec.temporal_ratio * (place - begin - 1))
                for place in (start, stop)
            )
            frames.append(window[:, :, skipped:shown])
        return frames

    def _first_slots(
        self, direction: Direction, batch_size: int, height: int, width: int
    ) -> dict[str, Tensor]:
        like = self._weight
        if self.is_causal:
            layers = remembering_layers(self.decoder).values()
            return {name: like.new_zeros((batch_size, 0)) for name in layers}
        size = (height // self.spec.spatial_ratio, width // self.spec.spatial_ratio)
        return {_WAITING: like.new_zeros((batch_size, self.config.latent_channels, 0, *size))}


def _check_config(config: FrozenDict) -> None:
    check_counts(
        latent_channels=config.latent_channels,
        decoder_block_out_channels=config.decoder_block_out_channels,
        decoder_dw_kernel_size=config.decoder_dw_kernel_size,
    )
    check_positive("scaling_factor", config.scaling_factor)
    levels = len(config.decoder_block_out_channels)
    lengths = {
        "decoder_layers_per_block": levels + 1,
        "decoder_is_dw_conv": levels + 1,
        "spatio_temporal_scaling": levels,
        "decoder_spatio_only": levels,
    }
    for name, length in lengths.items():
        if len(config[name]) != length:
            raise ValueError(f"{name} must be {length} values for {levels} levels, got {list(config[name])}")
    if config.patch_size not in (1, 4):
        raise ValueError(f"patch_size must be 1 or 4, got {config.patch_size}")
    if config.decoder_block_out_channels[0] % config.patch_size**2:
        raise ValueError(
            f"decoder_block_out_channels must start with a multiple of {config.patch_size**2} "
            f"(patch_size^2), got {list(config.decoder_block_out_channels)}"
        )
    if config.decoder_dw_kernel_size % 2 == 0:
        raise ValueError(f"decoder_dw_kernel_size must be odd, got {config.decoder_dw_kernel_size}")
    # A window's first latent frame gives fewer frames than the others, so it cannot be one that is kept.
    for name, least in (("context_latents", 1), ("chunk_latents", 1), ("lookahead_latents", 0)):
        if config[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {config[name]}")
