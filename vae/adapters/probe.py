"""Measures how a streamed clip differs from the whole one, instead of trusting a model's name."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genstream.vae.adapters.base import Adapter, Exactness, Measured
from genstream.vae.protocol import VAESpec

_LATENT_SIZE = 2
_SEED = 0


def probe(adapter: Adapter) -> Measured:
    """Compare a small clip that is streamed latent frame by latent frame with the whole one.

    Frames that depend on more than the stream knows of when it decodes them are never exact. Errors up to the
    square root of the precision, relative to the largest value, are rounding. The precision is that of the
    weights, at most float32: several models normalise in float32 whatever their weights are.
    """
    with torch.no_grad():
        latents = _latents(adapter)
        whole = adapter.whole_decode(adapter.scale.raw(latents, 0))
        decode_error, decode_scale = _decode_error(adapter, latents, whole)
        try:
            encode_error, encode_scale = _encode_error(adapter)
        except NotImplementedError as error:
            kind = type(adapter.vae).__name__
            raise ValueError(
                f"{kind} cannot encode in {adapter.dtype} on {adapter.device}: {error}"
            ) from error
        lookahead = _lookahead(adapter, latents, whole)
    precision = max(torch.finfo(adapter.dtype).eps, torch.finfo(torch.float32).eps)
    tolerance = math.sqrt(precision)
    rounding = decode_error <= tolerance * decode_scale and encode_error <= tolerance * encode_scale
    known = lookahead <= _known_latents(adapter.spec)
    return Measured(
        decode_error=decode_error,
        encode_error=encode_error,
        decode_scale=decode_scale,
        encode_scale=encode_scale,
        lookahead_latents=lookahead,
        exactness=_exactness(adapter.spec) if rounding and known else "approximate",
    )


def _exactness(spec: VAESpec) -> Exactness:
    return "exact" if spec.first_latents == spec.chunk_latents == 1 else "partition"


def _known_latents(spec: VAESpec) -> int:
    """Latent frames behind the first of a piece that are handed in with it."""
    return max(spec.first_latents, spec.chunk_latents) - 1 + spec.lookahead_latents


def _decode_error(adapter: Adapter, latents: Tensor, whole: Tensor) -> tuple[float, float]:
    state = adapter.init_state("decode", 1, whole.shape[3], whole.shape[4])
    chunks = [adapter.decode_chunk_unclamped(chunk, state) for chunk in latents.split(1, dim=2)]
    streamed = torch.cat([*chunks, adapter.flush_unclamped(state)], dim=2)
    # Some models clamp in their own decoding.
    return _error(streamed.clamp(whole.min(), whole.max()), whole), float(whole.abs().max())


def _encode_error(adapter: Adapter) -> tuple[float, float]:
    spec = adapter.spec
    size = _LATENT_SIZE * spec.spatial_ratio
    count = spec.first_frames + spec.temporal_ratio * (_latent_count(spec) - 1)
    frames = _random(adapter, (1, 3, count, size, size)).clamp(-2, 2) / 2
    whole = adapter.scale.normalised(adapter.whole_encode(frames), 0)
    state = adapter.init_state("encode", 1, size, size)
    chunks = [adapter.encode_chunk(chunk, state) for chunk in frames.split(1, dim=2)]
    return _error(torch.cat([*chunks, adapter.flush(state)], dim=2), whole), float(whole.abs().max())


def _lookahead(adapter: Adapter, latents: Tensor, whole: Tensor) -> int:
    """Latent frames between the last one and the first frame that it changes; 0 if it changes none."""
    spec, changed = adapter.spec, latents.clone()
    changed[:, :, -1] += _random(adapter, changed[:, :, -1].shape)
    after = adapter.whole_decode(adapter.scale.raw(changed, 0))
    differs = (whole != after).flatten(0, 1).flatten(2).any(dim=2).any(dim=0)
    first = int(differs.long().argmax()) if differs.any() else len(differs) - 1
    latent = 0 if first < spec.first_frames else 1 + (first - spec.first_frames) // spec.temporal_ratio
    return latents.shape[2] - 1 - latent


def _latent_count(spec: VAESpec) -> int:
    """Enough for several pieces, and odd, as CogVideoX needs it."""
    count = spec.first_latents + 2 * spec.chunk_latents + spec.lookahead_latents
    return max(count + 1 - count % 2, 5)


def _latents(adapter: Adapter) -> Tensor:
    spec = adapter.spec
    return _random(adapter, (1, spec.latent_channels, _latent_count(spec), _LATENT_SIZE, _LATENT_SIZE))


def _random(adapter: Adapter, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(device=adapter.device, dtype=adapter.dtype)


def _error(streamed: Tensor, whole: Tensor) -> float:
    if streamed.shape != whole.shape:
        return math.inf
    return float((streamed - whole).abs().max())
