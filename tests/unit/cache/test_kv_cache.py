"""Cached passes against one pass over the whole sequence with a mask over its frames."""

from itertools import product

import pytest
import torch
from accelerate.utils import send_to_device

from genstream.cache.kv_cache import KVCache, TextCache
from genstream.cache.layout import CacheLayout, PositionPolicy
from genstream.kernels.rope import phases, rotate

GRIDS = list(product((1, 3), (0, 2, 3), (0, 2, 5)))
FAR = 1_000_000


@pytest.fixture(scope="module")
def models(build_pipeline):
    """Transformers by number of layers."""
    return {
        layers: build_pipeline(layers=layers).transformer.requires_grad_(requires_grad=False)
        for layers in (1, 2)
    }


@pytest.fixture
def context():
    return torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(1))


def layout_of(chunk, sink, window, positions=PositionPolicy.ABSOLUTE) -> CacheLayout:
    return CacheLayout(chunk_frames=chunk, sink_frames=sink, window_frames=window, positions=positions)


def latents_of(frames: int) -> torch.Tensor:
    return torch.randn(1, 4, frames, 4, 4, generator=torch.Generator().manual_seed(2))


def cached_passes(model, cache: KVCache, latents, context, timestep=0.0, at=0):
    """Velocities of all chunks, each in the context of those before it."""
    text, found = model.text_cache(context), []
    for start in range(0, latents.shape[2], cache.layout.chunk_frames):
        x = latents[:, :, start : start + cache.layout.chunk_frames]
        positions = range(at + start, at + start + x.shape[2])
        time = torch.full((1,), timestep)
        found.append(model(x, time, frame_positions=positions, kv_cache=cache, text_cache=text).sample)
    return torch.cat(found, dim=2)


def frame_mask(layout: CacheLayout, frames: int) -> torch.Tensor:
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for start in range(0, frames, layout.chunk_frames):
        rows = slice(start, start + layout.chunk_frames)
        mask[rows, : layout.sink_frames] = True
        mask[rows, max(0, start - layout.window_frames) : start] = True
        mask[rows, rows] = True
        mask[rows, start + layout.chunk_frames :] = False
    return mask


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_cached_passes_equal_one_masked_pass(models, context, grid, layers):
    """With absolute positions the mask reproduces what each chunk saw when it was committed."""
    layout, model, latents = layout_of(*grid), models[layers], latents_of(15)
    cache = model.kv_cache(layout, 1, 4, 4)
    cached = cached_passes(model, cache, latents, context)
    whole = model(latents, torch.zeros(1), context, attention_mask=frame_mask(layout, 15)).sample
    torch.testing.assert_close(cached, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_window_positions_equal_a_short_clip(models, context, grid):
    """With one layer: what a chunk sees might as well be a clip that starts at frame 0."""
    layout, model, latents = layout_of(*grid, PositionPolicy.WINDOW), models[1], latents_of(15)
    cached = cached_passes(model, model.kv_cache(layout, 1, 4, 4), latents, context)
    chunk = layout.chunk_frames
    for start in range(0, 15, chunk):
        recent = range(max(0, start - layout.window_frames), start + chunk)
        frames = sorted({*range(min(layout.sink_frames, start)), *recent})
        clip = model(latents[:, :, frames], torch.zeros(1), context).sample
        torch.testing.assert_close(
            cached[:, :, start : start + chunk], clip[:, :, -chunk:], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("positions", list(PositionPolicy))
def test_a_late_stream_is_as_exact_as_an_early_one(models, context, positions):
    layout, model, latents = layout_of(3, 3, 3, positions), models[2], latents_of(18)
    early = cached_passes(model, model.kv_cache(layout, 1, 4, 4), latents, context)
    cache = model.kv_cache(layout, 1, 4, 4)
    cache.origin = FAR
    late = cached_passes(model, cache, latents, context, at=FAR)
    torch.testing.assert_close(late, early, rtol=0, atol=1e-5)


def test_positions_of_a_clip_are_relative(models, context):
    model, latents = models[2], latents_of(6)
    early = model(latents, torch.zeros(1), context).sample
    late = model(latents, torch.zeros(1), context, frame_positions=range(FAR, FAR + 6)).sample
    torch.testing.assert_close(late, early, rtol=0, atol=1e-5)
    stretched = model(latents, torch.zeros(1), context, frame_positions=range(0, 12, 2)).sample
    assert (stretched - early).abs().max() > 1e-3


@pytest.mark.parametrize("chunks", range(1, 7))
def test_sinks_are_rotated_from_their_masters(models, context, chunks):
    layout, model = layout_of(3, 2, 3, PositionPolicy.WINDOW), models[2]
    cache = model.kv_cache(layout, 1, 4, 4)
    cached_passes(model, cache, latents_of(3 * chunks), context)
    at = phases(layout.sink_positions(3 * chunks), 2, 2, 12, torch.device("cpu"))
    for keys, masters in zip(cache.keys, cache.sinks, strict=True):
        torch.testing.assert_close(keys[:, :8], rotate(masters, at), rtol=0, atol=0)


def test_noisy_passes_leave_no_trace(models, context):
    """Denoising steps write into the slots that the commit overwrites."""
    layout, model, latents = layout_of(3, 3, 3, PositionPolicy.WINDOW), models[2], latents_of(18)
    clean = model.kv_cache(layout, 1, 4, 4)
    expected = cached_passes(model, clean, latents, context)
    cache, text, found = model.kv_cache(layout, 1, 4, 4), model.text_cache(context), []
    for start in range(0, 18, 3):
        for x, timestep in ((torch.randn(1, 4, 3, 4, 4), 900.0), (latents[:, :, start : start + 3], 0.0)):
            positions, time = range(start, start + 3), torch.full((1,), timestep)
            out = model(x, time, frame_positions=positions, kv_cache=cache, text_cache=text).sample
        found.append(out)
    torch.testing.assert_close(torch.cat(found, dim=2), expected, rtol=0, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("finished", [0, 1])
def test_weights_of_the_past(models, grid, finished):
    """Slot by slot: the first frame and the frames of the pass itself count in full."""
    chunk, sinks, _ = grid
    layout = layout_of(*grid)
    cache = models[1].kv_cache(layout, 1, 2, 2)  # one token per frame
    for start in range(0, 6 * chunk, chunk):
        own = range(start, start + chunk)
        if finished and start:
            cache.begin(start - chunk, 2 * chunk, finished_frames=chunk, past_weight=0.5)
            assert cache.parts[0].weights is None
        else:
            cache.begin(start, chunk, past_weight=0.5)
        kept = [frame for frame in range(own.stop) if frame < sinks or frame >= own.stop - layout.ring_frames]
        expected = torch.empty(1, len(kept))
        for frame in kept:
            expected[0, layout.slot(frame)] = 1.0 if frame == 0 or frame in own else 0.5
        torch.testing.assert_close(cache.parts[-1].weights.exp(), expected)


def test_a_clone_is_independent(models, context):
    model = models[2]
    cache = model.kv_cache(layout_of(3, 3, 3), 1, 4, 4)
    cached_passes(model, cache, latents_of(6), context)
    copy = cache.clone()
    before = {name: tensor.clone() for name, tensor in copy.tensors().items()}
    cached_passes(model, cache, latents_of(12), context)
    assert all(torch.equal(tensor, before[name]) for name, tensor in copy.tensors().items())
    assert copy.nbytes == cache.nbytes


def test_size(models):
    cache = models[2].kv_cache(layout_of(3, 2, 4), 5, 8, 4)
    tokens, bytes_per_token = 4 * 2, 2 * 12 * 4
    assert cache.nbytes == 2 * 5 * tokens * bytes_per_token * (2 * 9 + 2)


def test_device_hooks_leave_it_alone(models, context):
    """Offloading hooks move what they find in arguments; the stream's state is none of theirs."""
    cache = models[2].kv_cache(layout_of(3, 2, 4), 1, 4, 4)
    text = models[2].text_cache(context)
    assert isinstance(text, TextCache)
    assert send_to_device({"a": cache, "b": text}, "meta") == {"a": cache, "b": text}
