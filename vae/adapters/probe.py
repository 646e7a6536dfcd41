"""Measures how a streamed clip differs from the whole one, instead of trusting a model's name."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genstream.vae.adapters.base import Adapter, Exactness
from genstream.vae.protocol import VAESpec

_LATENT_SIZE = 2
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a probe found out on random latents and frames.

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


def probe(adapter: Adapter) -> Measured:
    """Compare a small clip that is streamed latent frame by latent frame with the whole one.

    Errors up to the square root of the precision of the weights, relative to the largest value, are rounding.
    """
    with torch.no_grad():
        decode_error, decode_scale = _decode_error(adapter)
        encode_error, encode_scale = _encode_error(adapter)
        lookahead = _lookahead(adapter)
    tolerance = math.sqrt(torch.finfo(adapter.dtype).eps)
    rounding = decode_error <= tolerance * decode_scale and encode_error <= tolerance * encode_scale
    return Measured(
        decode_error=decode_error,
        encode_error=encode_error,
        decode_scale=decode_scale,
        encode_scale=encode_scale,
        lookahead_latents=lookahead,
        exactness=_exactness(adapter.spec) if rounding else "approximate",
    )


def _exactness(spec: VAESpec) -> Exactness:
    return "exact" if spec.first_latents == spec.chunk_latents == 1 else "partition"


def _decode_error(adapter: Adapter) -> tuple[float, float]:
    raw = _raw(adapter)
    whole = adapter.whole_decode(raw)
    latents = adapter.scale.normalised(raw, 0)
    size = whole.shape[3:]
    state = adapter.init_state("decode", 1, *size)
    chunks = [adapter.decode_chunk_unclamped(chunk, state) for chunk in latents.split(1, dim=2)]
    streamed = torch.cat([*chunks, adapter.flush_unclamped(state)], dim=2)
    # Some models clamp in their own decoding.
    return _error(streamed.clamp(whole.min(), whole.max()), whole), float(whole.abs().max())


def _encode_error(adapter: Adapter) -> tuple[float, float]:
    spec = adapter.spec
    size = _LATENT_SIZE * spec.spatial_ratio
    count = spec.first_frames + spec.temporal_ratio * (_latent_count(spec) - 1)
    frames = _random(adapter, (1, 3, count, size, size)).clamp(-2, 2) / 2
    whole = adapter.whole_encode(frames)
    state = adapter.init_state("encode", 1, size, size)
    chunks = [adapter.encode_chunk(chunk, state) for chunk in frames.split(1, dim=2)]
    streamed = adapter.scale.raw(torch.cat([*chunks, adapter.flush(state)], dim=2), 0)
    return _error(streamed, whole), float(whole.abs().max())


def _lookahead(adapter: Adapter) -> int:
    """Latent frames between the last one and the first frame that it changes."""
    spec, raw = adapter.spec, _raw(adapter)
    changed = raw.clone()
    changed[:, :, -1] += _random(adapter, changed[:, :, -1].shape)
    before, after = adapter.whole_decode(raw), adapter.whole_decode(changed)
    first = int((before != after).flatten(0, 1).flatten(2).any(dim=2).any(dim=0).nonzero()[0])
    latent = 0 if first < spec.first_frames else 1 + (first - spec.first_frames) // spec.temporal_ratio
    return raw.shape[2] - 1 - latent


def _latent_count(spec: VAESpec) -> int:
    """Enough for several pieces, and odd, as CogVideoX needs it."""
    count = spec.first_latents + 2 * spec.chunk_latents + spec.lookahead_latents
    return max(count + 1 - count % 2, 5)


def _raw(adapter: Adapter) -> Tensor:
    spec = adapter.spec
    shape = (1, spec.latent_channels, _latent_count(spec), _LATENT_SIZE, _LATENT_SIZE)
    return adapter.scale.raw(_random(adapter, shape), 0)


def _random(adapter: Adapter, shape: Any) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(device=adapter.device, dtype=adapter.dtype)


def _error(streamed: Tensor, whole: Tensor) -> float:
    if streamed.shape != whole.shape:
        return math.inf
    return float((streamed - whole).abs().max())
