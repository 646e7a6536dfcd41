"""What a chunk sees in training is what it sees in a stream."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from genstream.cache.layout import CacheLayout, PositionPolicy
from genstream.streaming.controls import PromptControl
from genstream.streaming.settings import ContextPolicy, StreamSettings
from genstream.training.denoiser import Denoiser, velocity_in
from genstream.training.forcing import (
    FORCED,
    Context,
    draw_context,
    from_middle,
    from_start,
    in_stream,
    with_noisy_context,
)


def visible_in_a_stream(layout: CacheLayout, start: int) -> set[int]:
    """Frames before `start` that a pass at `start` sees."""
    end = start + layout.chunk_frames
    slots = {layout.slot(frame): frame for frame in range(end)}
    shown = {slots[slot] for slot in range(layout.visible_frames(end))}
    return {frame for frame in shown if frame < start}


def seen(sequence, piece) -> list[int]:
    return [frame for index in piece.sees for frame in sequence.clean[index].frames]


@pytest.mark.parametrize("chunk_frames", [1, 2, 3])
@pytest.mark.parametrize("window_chunks", [0, 1, 2])
@pytest.mark.parametrize("chunks", [1, 2, 4, 7])
def test_from_start_sees_what_the_cache_shows(chunk_frames, window_chunks, chunks):
    layout = CacheLayout(
        chunk_frames=chunk_frames, sink_frames=chunk_frames, window_frames=window_chunks * chunk_frames
    )
    sequence = from_start([chunk_frames] * chunks, window_chunks)
    assert len(sequence.noisy) == chunks
    for piece in (*sequence.clean, *sequence.noisy):
        assert set(seen(sequence, piece)) == visible_in_a_stream(layout, piece.frames.start)
        assert piece.positions == piece.frames


@pytest.mark.parametrize("chunk_frames", [1, 2, 3])
@pytest.mark.parametrize(("first", "window_chunks"), [(2, 1), (2, 2), (5, 2), (9, 3)])
def test_from_middle_stands_as_in_the_cache(chunk_frames, first, window_chunks):
    layout = CacheLayout(
        chunk_frames=chunk_frames,
        sink_frames=chunk_frames,
        window_frames=window_chunks * chunk_frames,
        positions=PositionPolicy.WINDOW,
    )
    chunks = [0, *range(first, first + window_chunks + 1)]
    sequence = from_middle([chunk * chunk_frames for chunk in chunks], chunk_frames, copies=2)
    assert sequence.noisy[0] == sequence.noisy[1]
    target = sequence.noisy[0]
    assert target.frames.start == (first + window_chunks) * chunk_frames
    assert set(seen(sequence, target)) == visible_in_a_stream(layout, target.frames.start)
    sinks = layout.sink_positions(target.frames.stop)
    for piece in sequence.clean:
        in_stream = sinks.start if piece.frames.start == 0 else piece.frames.start
        assert target.positions.start - piece.positions.start == target.frames.start - in_stream


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("window_chunks", [0, 1, 2])
def test_in_a_stream_every_chunk_sees_what_the_cache_shows(window_chunks, sink):
    context = Context(2, window_chunks, sink)
    layout = CacheLayout(chunk_frames=2, sink_frames=2 * sink, window_frames=2 * window_chunks)
    for chunk in range(7):
        sequence = in_stream(chunk, context)
        assert sequence.noisy_frames == [2 * chunk, 2 * chunk + 1]
        assert set(seen(sequence, sequence.noisy[0])) == visible_in_a_stream(layout, 2 * chunk)
        assert sequence.positions == list(range(len(sequence.positions)))
        assert len(sequence.clean) + 1 == min(chunk + 1, context.longest_chunks)
    # Where nothing is out of sight yet, it is the last target of a sequence that holds all of them.
    for chunk in range(window_chunks + 1):
        whole = from_start([2] * (chunk + 1), window_chunks, sink=sink)
        last = replace(whole, noisy=whole.noisy[-1:])
        sequence = in_stream(chunk, context)
        assert (sequence.mask(), sequence.positions) == (last.mask(), last.positions)


def test_contexts_are_those_of_models():
    streaming = StreamSettings(chunk_frames=2, sink_frames=2, window_frames=4, positions="window")
    assert Context.of(streaming) == Context(2, 2, sink=True)
    assert Context.of(replace(streaming, sink_frames=0, positions="absolute")) == Context(2, 2, sink=False)
    for wrong, error in (
        ({"sink_frames": 1}, "sink_frames must be 0 or 2, a chunk, got 1"),
        ({"window_frames": 3}, "window_frames must be a multiple of 2, the frames of a chunk, got 3"),
        ({"window_frames": None}, "window_frames must be a multiple of 2, the frames of a chunk, got None"),
        ({"positions": "absolute"}, "positions must be 'window' with sinks, got 'absolute'"),
    ):
        with pytest.raises(ValueError, match=error):
            Context.of(replace(streaming, **wrong))


def test_mask_rows_follow_the_pieces():
    sequence = from_start([1, 2, 2], 1)
    mask = torch.tensor(sequence.mask())
    assert sequence.clean_frames == [0, 1, 2]
    assert sequence.noisy_frames == [0, 1, 2, 3, 4]
    assert sequence.positions == [0, 1, 2, 0, 1, 2, 3, 4]
    assert mask.diagonal().all()
    clean, noisy = mask[:3], mask[3:]
    assert not clean[:, 3:].any()
    assert clean.tolist()[1][:3] == [True, True, True]
    assert noisy[0].nonzero().flatten().tolist() == [3]
    assert noisy[1].nonzero().flatten().tolist() == [0, 4, 5]
    assert noisy[4].nonzero().flatten().tolist() == [0, 1, 2, 6, 7]


@pytest.mark.parametrize(("first_chunk", "size"), [(1, 1), (1, 2), (2, 2), (1, 3), (3, 3)])
def test_a_masked_pass_gives_what_streaming_gives(build_pipeline, first_chunk, size):
    """Both halves at once, against one pass after another with a cache."""
    model = build_pipeline().transformer.requires_grad_(requires_grad=False)
    chunks = [first_chunk, size, size, size]
    sequence = from_start(chunks, window_chunks=2)
    clean, noisy = torch.randn(2, 1, 4, sum(chunks), 4, 4)
    context, level = torch.randn(1, 12, 16), 700.0
    both = torch.cat([clean[:, :, sequence.clean_frames], noisy[:, :, sequence.noisy_frames]], dim=2)
    count = len(sequence.clean_frames)
    timestep = torch.full((1, both.shape[2]), level)
    timestep[:, :count] = 0
    mask = torch.tensor(sequence.mask())
    trained = model(both, timestep, context, frame_positions=sequence.positions, attention_mask=mask).sample
    layout = CacheLayout(
        chunk_frames=size, sink_frames=size, window_frames=2 * size, positions=PositionPolicy.WINDOW
    )
    cache, text, found = model.kv_cache(layout, 1, 4, 4), model.text_cache(context), []
    for piece in sequence.noisy:
        span = slice(piece.frames.start, piece.frames.stop)
        for x, time in ((noisy, level), (clean, 0.0)):
            out = model(
                x[:, :, span],
                torch.full((1,), time),
                frame_positions=piece.frames,
                kv_cache=cache,
                text_cache=text,
            ).sample
            if time:
                found.append(out)
    torch.testing.assert_close(trained[:, :, count:], torch.cat(found, dim=2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("context", "sink"),
    [
        *((context, True) for context in FORCED["context"]),
        (ContextPolicy.CLEAN, False),
        (ContextPolicy.FUSED, False),
    ],
)
def test_a_chunk_sees_in_its_sequence_what_the_stream_shows_it(build_pipeline, context, sink):
    """Until frames are dropped, which leave something in those that saw them, unless all are made anew."""
    pipe = build_pipeline(
        chunk_frames=2, sink_frames=2 * sink, window_frames=2, positions="window", context=context
    )
    seen, prompt = Context.of(pipe.settings), ["a red circle"]
    state = pipe.start(pipe.request(prompt, num_frames=49, decode=False))
    noise, level, exact = torch.randn(1, 4, 2, 4, 4), 700.0, []
    latents = noise[:, :, :0]
    for chunk in range(5):
        draft, sequence = state.draft(), in_stream(chunk, seen)
        past, sigma = latents[:, :, sequence.clean_frames], torch.full((1, 2), level / 1000)
        with torch.no_grad():
            if context is ContextPolicy.RECOMPUTE:
                pipe.engine._rebuild(draft)
            found = pipe.engine.predict(noise, level, draft)
            embeds = pipe.encode_prompt(prompt)
            trained = velocity_in(Denoiser.of(pipe), past, noise, sigma, embeds, sequence)
        exact.append(torch.allclose(trained, found, rtol=0, atol=1e-5))
        latents = torch.cat([latents, pipe.step(state).latents], dim=2)
    always = context is ContextPolicy.RECOMPUTE
    assert exact == [always or chunk < seen.longest_chunks for chunk in range(5)]


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_masked_pass_gives_what_a_prompt_switch_gives(build_pipeline, done):
    pipe = build_pipeline(sink_frames=3, window_frames=6, positions="window", chunk_frames=3)
    state = pipe.start(pipe.request("a red circle", num_frames=49 + 12))
    latents = torch.cat([pipe.step(state).latents for _ in range(done)], dim=2)
    state.submit(PromptControl(prompt="a blue square"))
    noise = state.noise.initial(3 * done, (1, 4, 3, *latents.shape[3:]))
    level = 700.0
    draft = state.draft()
    pipe.engine._apply_due(draft)
    pipe.engine._advance_blend(draft)
    with torch.no_grad():
        found = pipe.engine.predict(noise, level, draft)
    sequence = from_middle([3 * chunk for chunk in range(done + 1)], 3, copies=1, recached=done)
    both = torch.cat([latents[:, :, sequence.clean_frames], noise], dim=2)
    timestep = torch.full((1, both.shape[2]), 0.0)
    timestep[:, -3:] = level
    with torch.no_grad():
        trained = pipe.transformer(
            both,
            timestep,
            pipe.encode_prompt(["a blue square"]),
            frame_positions=sequence.positions,
            attention_mask=torch.tensor(sequence.mask()),
        ).sample
    torch.testing.assert_close(trained[:, :, -3:], found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window_chunks", [1, 2])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_from_start_without_a_sink_sees_what_the_cache_shows(window_chunks, chunks):
    layout = CacheLayout(chunk_frames=1, sink_frames=0, window_frames=window_chunks)
    sequence = from_start([1] * chunks, window_chunks, sink=False)
    for piece in (*sequence.clean, *sequence.noisy):
        assert set(seen(sequence, piece)) == visible_in_a_stream(layout, piece.frames.start)


@pytest.mark.parametrize("sequence", [from_start([3, 3, 3, 3], 1), from_middle([0, 6, 9, 12], 3, 4, 2)])
def test_noisy_context_is_the_clean_one_under_noise(sequence):
    noisy = with_noisy_context(sequence)
    frames = [piece.frames for piece in noisy.noisy]
    assert not noisy.clean
    assert len(set(frames)) == len(frames)
    expected = {piece.frames: piece for piece in (*sequence.clean, *sequence.noisy)}
    assert set(frames) == set(expected)
    for piece in noisy.noisy:
        assert piece.positions == expected[piece.frames].positions
        context = [frame for index in piece.sees for frame in noisy.noisy[index].frames]
        assert context == seen(sequence, expected[piece.frames])


def test_contexts_come_in_all_sizes_that_a_stream_can_have():
    drawn = Counter(draw_context(np.random.default_rng(seed), range(1, 4), 6) for seed in range(3000))
    assert {(each.chunk_frames, each.window_chunks, each.sink) for each in drawn} == {
        (size, window, sink) for size in (1, 2, 3) for window in range(1, 6 // size + 1) for sink in (0, 1)
    }
    for size in (1, 2, 3):
        share = sum(count for each, count in drawn.items() if each.chunk_frames == size) / 3000
        assert abs(share - 1 / 3) < 0.05
