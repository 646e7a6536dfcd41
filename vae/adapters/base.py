"""What all adapters share: checks, waiting frames, cutting a stream into pieces, latent statistics."""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from diffusers import ModelMixin
from torch import Tensor

from genstream.vae.adapters.memory import Memory
from genstream.vae.adapters.scale import LatentScale
from genstream.vae.checks import (
    check_chunk,
    check_frames,
    check_is_state,
    check_like,
    check_owner,
    check_start,
    check_state,
)
from genstream.vae.chunks import decoding_state
from genstream.vae.identity import weights_digest
from genstream.vae.protocol import RGB, Direction, VAESpec, VAEState

Exactness = Literal["exact", "partition", "approximate"]

_PENDING = "pending"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a probe found out about an adapter on random latents and frames.

    Attributes:
        decode_error: largest difference of a frame's value between the stream and the whole clip.
        encode_error: the same for latents.
        decode_scale: largest absolute value of a frame of the whole clip, which the error compares with.
        encode_scale: the same for latents.
        lookahead_latents: latent frames behind a frame that change it when the whole clip is decoded at once.
        exactness: for the specification.
    """

    decode_error: float
    encode_error: float
    decode_scale: float
    encode_scale: float
    lookahead_latents: int
    exactness: Exactness


class Adapter(ABC):
    """Gives a diffusers VAE the `StreamingVAE` protocol; the VAE itself is never written to.

    A stream is worked off in pieces: `_ready` says which may run with what has arrived, `_decode_piece` and
    `_encode_piece` run one.

    Args:
        vae: the diffusers model.
        measured: by `probe`. Without it nothing is known of the exactness: it counts as approximate.

    Attributes:
        scale: the statistics of the latents; nothing else normalises them.
    """

    def __init__(self, vae: ModelMixin, measured: Measured | None = None) -> None:
        self.vae = vae
        self.measured = measured
        self.scale = self._latent_scale()
        config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
        settings = json.dumps([config, repr(self._layout())], sort_keys=True, default=str)
        self._settings = hashlib.sha256(settings.encode()).hexdigest()[:12]
        self._spec = replace(self._layout(), exactness=measured.exactness if measured else "approximate")

    @abstractmethod
    def _layout(self) -> VAESpec:
        """The specification but for its exactness."""

    @abstractmethod
    def _latent_scale(self) -> LatentScale:
        """The statistics of the VAE's latents."""

    @abstractmethod
    def _encode_piece(self, frames: Tensor, memory: Memory) -> Tensor:
        """Raw latents of the whole groups `frames`, those of the look-ahead not included."""

    @abstractmethod
    def _decode_piece(self, raw: Tensor, memory: Memory) -> Tensor:
        """Frames of raw latents, those of the look-ahead not included; may lie outside [-1, 1]."""

    def whole_decode(self, raw: Tensor) -> Tensor:
        """Frames of a whole clip of raw latents as the VAE's own class decodes it."""
        frames: Tensor = self.vae.decode(raw, return_dict=False)[0]
        return frames

    def whole_encode(self, frames: Tensor) -> Tensor:
        """Raw latents of a whole clip as the VAE's own class encodes it."""
        latents: Tensor = self.vae.encode(frames, return_dict=False)[0].mode()
        return latents

    def _ready(self, direction: Direction, count: int, steps: int) -> list[int]:
        """Latent frames of each piece that may run when `count` wait after `steps`."""
        return [count] if count else []

    def _rest(self, direction: Direction, count: int, steps: int) -> list[int]:
        """Latent frames of each piece for the `count` left at a stream's end, in sum at least as many."""
        return [count] if count else []

    def _lookahead(self, direction: Direction) -> int:
        """Latent frames behind a piece that are handed in with it."""
        return 0

    @property
    def spec(self) -> VAESpec:
        """Ratios and channels, with the measured exactness."""
        return self._spec

    @property
    def dtype(self) -> torch.dtype:
        """Of the VAE's weights."""
        dtype: torch.dtype = self.vae.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Of the VAE's weights."""
        device: torch.device = self.vae.device
        return device

    def init_state(self, direction: Direction, batch_size: int, height: int, width: int) -> VAEState:
        """State of a stream that has not started; `height` and `width` in pixels."""
        check_start(direction, batch_size, height, width, self.spec.spatial_ratio)
        self._load()
        state = VAEState(
            direction=direction, vae=self._describe(), batch_size=batch_size, height=height, width=width
        )
        shape = self._frames_shape(state) if direction == "encode" else self._latents_shape(state)
        state.slots[_PENDING] = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return state

    def encode_chunk(self, frames: Tensor, state: VAEState) -> Tensor:
        """Latents [B, C, T, h, w] that become complete with `frames` [B, 3, F, H, W]; the rest waits."""
        self._load()
        self._check_state(state, "encode")
        self._check_chunk("frames", frames, self._frames_shape(state), state)
        waiting = torch.cat([state.slots[_PENDING], frames], dim=2)
        groups = (waiting.shape[2] + self._missing_first(state.steps)) // self.spec.temporal_ratio
        return self._encode_pieces(waiting, self._ready("encode", groups, state.steps), state)

    def decode_chunk(self, latents: Tensor, state: VAEState) -> Tensor:
        """Frames [B, 3, F, H, W] in [-1, 1] that become complete with `latents` [B, C, T, h, w]."""
        return self.decode_chunk_unclamped(latents, state).clamp(-1, 1)

    def decode_chunk_unclamped(self, latents: Tensor, state: VAEState) -> Tensor:
        """`decode_chunk` before the clamp."""
        self._load()
        self._check_state(state, "decode")
        self._check_chunk("latents", latents, self._latents_shape(state), state)
        waiting = torch.cat([state.slots[_PENDING], latents], dim=2)
        return self._decode_pieces(waiting, self._ready("decode", waiting.shape[2], state.steps), state)

    def flush(self, state: VAEState) -> Tensor:
        """What still waits: latents, their last group filled up with its last frame, or frames.

        A rest that is too short for the VAE is filled up with its last latent frame, and cut off again.
        """
        rest = self.flush_unclamped(state)
        return rest if state.direction == "encode" else rest.clamp(-1, 1)

    def flush_unclamped(self, state: VAEState) -> Tensor:
        """`flush` before the clamp of frames."""
        check_is_state(state)
        self._load()
        rest = self._flush_encode(state) if state.direction == "encode" else self._flush_decode(state)
        state.ended = True
        return rest

    def encode(self, frames: Tensor) -> Tensor:
        """Latents [B, C, T, h, w] of a whole clip [B, 3, first_frames + r (T - 1), H, W]."""
        check_frames(frames, self.spec)
        state = self.init_state("encode", frames.shape[0], frames.shape[3], frames.shape[4])
        return torch.cat([self.encode_chunk(frames, state), self.flush(state)], dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B, 3, first_frames + r (T - 1), H, W] in [-1, 1] of a whole clip [B, C, T, h, w]."""
        return self.decode_unclamped(latents).clamp(-1, 1)

    def decode_unclamped(self, latents: Tensor) -> Tensor:
        """`decode` before the clamp."""
        state = decoding_state(self, latents)
        return torch.cat([self.decode_chunk_unclamped(latents, state), self.flush_unclamped(state)], dim=2)

    def _encode_pieces(self, frames: Tensor, pieces: list[int], state: VAEState) -> Tensor:
        memory = _memory(state)
        latents = [frames.new_zeros(_sized(self._latents_shape(state), 0))]
        for piece in pieces:
            count = self._frames_of(piece, memory.steps)
            memory.piece = piece
            ahead = self._lookahead("encode") * self.spec.temporal_ratio
            raw = self._encode_piece(frames[:, :, : count + ahead], memory)
            latents.append(self.scale.normalised(raw, memory.steps))
            frames = frames[:, :, count:]
            memory.advance(piece)
        state.advance(sum(pieces), self._slots(memory, frames))
        return torch.cat(latents, dim=2)

    def _decode_pieces(self, latents: Tensor, pieces: list[int], state: VAEState) -> Tensor:
        memory = _memory(state)
        frames = [latents.new_zeros(_sized(self._frames_shape(state), 0))]
        for piece in pieces:
            memory.piece = piece
            raw = self.scale.raw(latents[:, :, : piece + self._lookahead("decode")], memory.steps)
            frames.append(self._decode_piece(raw, memory))
            latents = latents[:, :, piece:]
            memory.advance(piece)
        state.advance(sum(pieces), self._slots(memory, latents))
        return torch.cat(frames, dim=2)

    def _slots(self, memory: Memory, waiting: Tensor) -> dict[str, Tensor]:
        """What to remember, in the precision of the weights: autocast may have made it coarser."""
        past = {name: slot.to(self.dtype) for name, slot in memory.past.items()}
        return {**past, _PENDING: waiting.detach().clone()}

    def _flush_encode(self, state: VAEState) -> Tensor:
        self._check_state(state, "encode")
        waiting, steps = state.slots[_PENDING], state.steps
        groups = -(-(waiting.shape[2] + self._missing_first(steps)) // self.spec.temporal_ratio)
        if waiting.shape[2] == 0:
            groups = 0
        pieces = self._rest("encode", groups, steps)
        filled = _filled(waiting, self._frames_of(sum(pieces), steps))
        return self._encode_pieces(filled, pieces, state)[:, :, :groups]

    def _flush_decode(self, state: VAEState) -> Tensor:
        self._check_state(state, "decode")
        waiting, steps = state.slots[_PENDING], state.steps
        count = waiting.shape[2]
        pieces = self._rest("decode", count, steps)
        frames = self._decode_pieces(_filled(waiting, sum(pieces)), pieces, state)
        return frames[:, :, : self._frames_of(count, steps)]

    def _missing_first(self, steps: int) -> int:
        """Frames by which the next latent frame is shorter than the others."""
        return 0 if steps else self.spec.temporal_ratio - self.spec.first_frames

    def _frames_of(self, latents: int, steps: int) -> int:
        """Frames of `latents` latent frames after `steps`."""
        return latents * self.spec.temporal_ratio - self._missing_first(steps) if latents else 0

    def _frames_shape(self, state: VAEState) -> tuple[int, ...]:
        return state.batch_size, RGB, 0, state.height, state.width

    def _latents_shape(self, state: VAEState) -> tuple[int, ...]:
        ratio = self.spec.spatial_ratio
        return state.batch_size, self.spec.latent_channels, 0, state.height // ratio, state.width // ratio

    def _load(self) -> None:
        """Bring an offloaded VAE to its device, as diffusers does for `encode` and `decode`."""
        hook = getattr(self.vae, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self.vae)

    def _describe(self) -> str:
        """The VAE's class, settings and weights, and how it is streamed."""
        return f"{type(self.vae).__name__}[{self._settings}], weights {weights_digest(self.vae)}"

    def _check_state(self, state: VAEState, direction: Direction) -> None:
        vae = self._describe()
        check_owner(state, direction, vae)
        # What models remember besides may be laid out in any way.
        waiting = {_PENDING: state.slots[_PENDING]} if _PENDING in state.slots else {}
        check_state(replace(state, slots=waiting), direction, vae, self._like)
        for slot in state.slots.values():
            check_like("state", slot, self._like)

    def _check_chunk(self, name: str, chunk: Tensor, shape: tuple[int, ...], state: VAEState) -> None:
        """Compare with the shape that the state was made for; the third dimension may have any length."""
        check_chunk(name, chunk, state, (*shape[:2], None, *shape[3:]), self._like)

    @property
    def _like(self) -> Tensor:
        """Nothing, in the dtype and on the device of the weights."""
        return torch.empty(0, dtype=self.dtype, device=self.device)


def _memory(state: VAEState) -> Memory:
    return Memory(state.steps, {name: slot for name, slot in state.slots.items() if name != _PENDING})


def _sized(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    return *shape[:2], count, *shape[3:]


def _filled(x: Tensor, count: int) -> Tensor:
    """`x` with its last frame repeated up to `count` frames."""
    return torch.cat([x, x[:, :, -1:].expand(-1, -1, max(0, count - x.shape[2]), -1, -1)], dim=2)
