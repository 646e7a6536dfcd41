"""Joint passes over unfinished chunks, and the passes that commit chunks behind them, against short clips.

With one layer the keys of a frame depend on that frame alone, so what a pass sees might as well be a clip.
"""

from itertools import product

import pytest
import torch
from accelerate.utils import send_to_device

from genstream.cache.joint_context import JointContext
from genstream.cache.layout import CacheLayout, PositionPolicy

FRAMES, FAR = 19, 1_000_000
# Chunk, sinks, window of a joint pass, latent frames of the first chunk.
GRIDS = [grid for grid in product((1, 3), (0, 2, 3), (3, 6), (1, 3)) if grid[3] in (1, grid[0])]


@pytest.fixture(scope="module")
def models(build_pipeline):
    """Transformers by number of layers."""
    return {
        layers: build_pipeline(layers=layers).transformer.requires_grad_(requires_grad=False)
        for layers in (1, 2)
    }


@pytest.fixture(scope="module")
def context():
    return torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def latents():
    return torch.randn(1, 4, FRAMES, 4, 4, generator=torch.Generator().manual_seed(2))


def layouts(chunk, sink, window, positions=PositionPolicy.WINDOW) -> tuple[CacheLayout, CacheLayout]:
    """Of the stream's cache, and of joint passes that see as many latent frames."""
    attended = sink + window + chunk
    past = CacheLayout(
        chunk_frames=chunk, sink_frames=sink, window_frames=attended - chunk, sink_reach_frames=attended
    )
    joint = CacheLayout(chunk_frames=chunk, sink_frames=sink, window_frames=window, positions=positions)
    return past, joint


def passes(model, kept, latents, text, first, at=0):
    """For each chunk: frames and velocity of the joint pass that starts with it, then of its commit."""
    chunk, longest = kept.layout.chunk_frames, kept.layout.ring_frames - kept.layout.chunk_frames
    starts = [0, *range(first, FRAMES - chunk + 1, chunk)]
    stops = [*starts[1:], starts[-1] + chunk]
    for start, stop in zip(starts, stops, strict=True):
        end = min(stops[-1], stop + longest - longest % chunk)
        reach, span = range(at + start, at + end), range(at + start, at + stop)
        inputs = (1 - latents[:, :, start:end], times(reach))
        together = model(*inputs, frame_positions=reach, kv_cache=kept, text_cache=text).sample
        inputs = (latents[:, :, start:stop], torch.zeros(1))
        clean = model(*inputs, frame_positions=span, kv_cache=kept.past, text_cache=text).sample
        yield reach, span, together, clean


def times(frames):
    """Rising noise levels."""
    return torch.tensor([[200.0 + 10 * index for index in range(len(frames))]])


def context_of(model, past, joint) -> JointContext:
    return JointContext.allocate(model.kv_cache(past, 1, 4, 4), joint)


@pytest.mark.parametrize("positions", PositionPolicy)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_passes_equal_clips(models, context, latents, grid, positions):
    *sizes, first = grid
    past, joint = layouts(*sizes, positions)
    model, attended, sinks = models[1], past.ring_frames, joint.sink_frames
    kept, text = context_of(model, past, joint), model.text_cache(context)
    for reach, span, together, clean in passes(model, kept, latents, text, first):
        anchored, shift = min(sinks, reach.start), 0
        if positions is PositionPolicy.WINDOW:
            shift = max(0, reach.stop - attended)
        seen = range(max(anchored, reach.stop - joint.ring_frames), reach.start)
        clip = torch.cat([latents[:, :, [*range(anchored), *seen]], 1 - latents[:, :, reach]], dim=2)
        time = torch.cat([torch.zeros(1, anchored + len(seen)), times(reach)], dim=1)
        places = [*range(shift, shift + anchored), *seen, *reach]
        expected = model(clip, time, context, frame_positions=places).sample
        torch.testing.assert_close(together, expected[:, :, -len(reach) :], rtol=0, atol=1e-5)

        oldest = 0 if span.stop <= attended or span.start < sinks else max(sinks, span.stop - attended)
        frames = range(oldest, span.stop)
        expected = model(latents[:, :, frames], torch.zeros(1), context, frame_positions=frames).sample
        torch.testing.assert_close(clean, expected[:, :, -len(span) :], rtol=0, atol=1e-5)


def test_a_joint_pass_leaves_no_trace(models, context, latents):
    past, joint = layouts(3, 3, 6)
    model = models[2]
    kept, text = context_of(model, past, joint), model.text_cache(context)
    alone = model.kv_cache(past, 1, 4, 4)
    for _, span, _, clean in passes(model, kept, latents, text, 3):
        inputs = (latents[:, :, span], torch.zeros(1))
        expected = model(*inputs, frame_positions=span, kv_cache=alone, text_cache=text).sample
        torch.testing.assert_close(clean, expected, rtol=0, atol=0)
    for name, tensor in alone.tensors().items():
        assert torch.equal(kept.past.tensors()[name], tensor)


def test_a_late_stream_is_as_exact_as_an_early_one(models, context, latents):
    past, joint = layouts(3, 3, 6)
    model = models[2]
    text, found = model.text_cache(context), []
    for at in (0, FAR):
        kept = context_of(model, past, joint)
        kept.past.origin = at
        results = passes(model, kept, latents, text, 3, at)
        found.append(torch.cat([x for _, _, together, clean in results for x in (together, clean)], dim=2))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_device_hooks_leave_it_alone(models):
    past, joint = layouts(3, 3, 6)
    kept = context_of(models[2], past, joint)
    assert send_to_device({"a": kept}, "meta") == {"a": kept}


def test_its_buffer_is_that_of_one_layer(models):
    past, joint = layouts(3, 3, 6)
    cache = models[2].kv_cache(past, 5, 8, 4)
    kept = JointContext.allocate(cache, joint)
    tokens, bytes_per_token = 4 * 2, 2 * 12 * 4
    assert kept.keys.nbytes + kept.values.nbytes == 2 * 5 * tokens * bytes_per_token * joint.capacity_frames
