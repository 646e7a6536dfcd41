"""The same frames, however a stream is run: at once, interrupted, interleaved, forked, replayed, batched."""

import pytest
import torch

from genstream.streaming.controls import (
    PauseControl,
    PromptControl,
    ResetControl,
    ResumeControl,
    StopControl,
)
from genstream.streaming.settings import RecachePolicy

RED, BLUE = "a red circle moving right", "a blue square moving left"
FRAMES = 1 + 4 * 17  # six chunks: sinks, window, and three after the first frames have been dropped


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def whole(pipe):
    """The stream that the others are compared with."""
    return torch.cat([chunk.frames for chunk in pipe.stream(RED, num_frames=FRAMES, seed=5)], dim=2)


def test_call_gives_the_stream(pipe, whole):
    frames = pipe(RED, num_frames=FRAMES, seed=5, output_type="pt").frames
    assert_same(frames, (whole / 2 + 0.5).transpose(1, 2))


@pytest.mark.parametrize("chunks", range(6))
def test_snapshot_in_the_middle(pipe, ask, collect, whole, tmp_path, chunks):
    state = pipe.start(ask(num_frames=FRAMES, seed=5))
    before = [pipe.step(state).frames for _ in range(chunks)]
    pipe.save_state(state, tmp_path / "stream.safetensors")
    restored = pipe.load_state(tmp_path / "stream.safetensors")
    assert (restored.chunk_index, restored.frames_out, restored.frame) == (
        chunks,
        state.frames_out,
        state.frame,
    )
    assert_same(torch.cat([*before, collect(restored)], dim=2), whole)


def test_interleaved_streams(pipe, ask, collect, collect_in_turn):
    requests = [ask(num_frames=FRAMES, seed=5), ask(BLUE, num_frames=FRAMES, seed=6)]
    together = collect_in_turn([pipe.start(request) for request in requests])
    for request, frames in zip(requests, together, strict=True):
        assert_same(frames, collect(pipe.start(request)))


@pytest.mark.parametrize("chunks", [0, 1, 4])
def test_fork(pipe, ask, collect, whole, chunks):
    state = pipe.start(ask(num_frames=FRAMES, seed=5))
    before = [pipe.step(state).frames for _ in range(chunks)]
    fork = state.clone()
    fork.submit(PromptControl(prompt=BLUE, recache=RecachePolicy.NOTHING))
    forked = collect(fork)
    continued = torch.cat([*before, collect(state)], dim=2)
    assert_same(continued, whole)
    assert not torch.equal(forked, whole[:, :, -forked.shape[2] :])


def scripted(pipe, request):
    """A stream that is changed in every way; also gives the numbers of frames of its chunks."""
    state = pipe.start(request)
    state.submit(PromptControl(prompt=BLUE, recache=RecachePolicy.WINDOW), not_before=20)
    frames = [pipe.step(state).frames, pipe.step(state).frames]
    state.submit(PauseControl())
    assert pipe.step(state).frames is None
    state.submit(PromptControl(prompt="a red square", blend_chunks=3))
    assert pipe.step(state).frames is None
    state.submit(ResumeControl())
    frames += [pipe.step(state).frames for _ in range(4)]
    state.submit(ResetControl(seed=11))
    frames += [pipe.step(state).frames, pipe.step(state).frames]
    state.submit(PromptControl(prompt=BLUE, recache=RecachePolicy.NOTHING))
    frames += [pipe.step(state).frames]
    state.submit(ResetControl())
    frames += [pipe.step(state).frames, pipe.step(state).frames]
    state.submit(StopControl())
    assert pipe.step(state).frames is None
    assert state.finished
    return state, torch.cat(frames, dim=2)


def test_replay(pipe, ask, tmp_path):
    request = ask(seed=5)
    state, frames = scripted(pipe, request)
    assert len(state.log) == 8
    replayed = pipe.start(request, controls=state.log)
    again = torch.cat([chunk.frames for chunk in pipe.run(replayed)], dim=2)
    assert_same(again, frames)
    assert [item.frame for item in replayed.log] == [item.frame for item in state.log]


def test_replay_of_a_restored_log(pipe, ask, tmp_path):
    request = ask(seed=5)
    state, frames = scripted(pipe, request)
    pipe.save_state(state, tmp_path / "s")
    log = pipe.load_state(tmp_path / "s").log
    assert log == state.log
    assert_same(torch.cat([c.frames for c in pipe.run(pipe.start(request, controls=log))], dim=2), frames)


def test_snapshot_with_controls_under_way(pipe, ask, collect, tmp_path):
    def run(save_after):
        state = pipe.start(ask(num_frames=FRAMES, seed=5))
        state.submit(PromptControl(prompt=BLUE, blend_chunks=3), not_before=9)
        state.submit(PromptControl(prompt="a red square"), not_before=45)
        state.submit(ResetControl(seed=11), not_before=40)
        frames = []
        while not state.finished:
            if len(frames) == save_after:
                pipe.save_state(state, tmp_path / "s")
                state = pipe.load_state(tmp_path / "s")
            frames.append(pipe.step(state).frames)
        return torch.cat(frames, dim=2)

    expected = run(None)
    for save_after in range(6):
        assert_same(run(save_after), expected)


def test_batch_equals_single_streams(pipe, ask, collect):
    together = collect(pipe.start(ask([RED, BLUE], num_frames=FRAMES, seed=[5, 6])))
    for row, (prompt, seed) in enumerate([(RED, 5), (BLUE, 6)]):
        alone = collect(pipe.start(ask(prompt, num_frames=FRAMES, seed=seed)))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("frames", range(1, 31))
def test_exact_number_of_frames(pipe, ask, collect, frames):
    lengths = [{"seconds": frames / 16}]
    if frames % 4 == 1:
        lengths.append({"num_frames": frames})
    for length in lengths:
        state = pipe.start(ask(**length))
        result = collect(state)
        assert result.shape == (1, 3, frames, 32, 32)
        assert state.frames_out == frames


def test_shorter_streams_are_beginnings(pipe, ask, collect, whole):
    """But for their last chunk in a queue: there, a longer stream denoises it together with a further one."""
    for seconds in (0.5, 1, 2.1, 4):
        request = ask(seconds=seconds, seed=5)
        frames = collect(pipe.start(request))
        last = pipe.engine.chunk_start(pipe.engine.chunk_count(request) - 1, request)
        same = frames.shape[2] if pipe.config.engine == "cache" else last
        assert_same(frames[:, :, :same], whole[:, :, :same])


def test_chunks_count_up(pipe):
    expected = 0
    for index, chunk in enumerate(pipe.stream(RED, num_frames=FRAMES)):
        assert (chunk.index, chunk.first_frame) == (index, expected)
        assert chunk.frames.shape[2] == (9 if index == 0 else 12)
        assert chunk.frames.abs().max() <= 1
        assert min(chunk.timings.denoise_s, chunk.timings.commit_s, chunk.timings.decode_s) > 0
        expected += chunk.frames.shape[2]
    assert expected == FRAMES


def test_memory_is_constant(pipe, ask):
    state = pipe.start(ask())
    sizes = set()
    for index in range(50):
        pipe.step(state)
        if index >= 4:
            tensors = (state.history, state.vae, *([] if state.queue is None else [state.queue]))
            sizes.add((state.kv.nbytes, *(x.nbytes for x in tensors), len(state.log), len(state.pending)))
    assert len(sizes) == 1
    assert state.history.shape[2] == state.kv.layout.capacity_frames


def test_a_finished_stream_refuses_a_step(pipe, ask, collect):
    state = pipe.start(ask(num_frames=9))
    collect(state)
    with pytest.raises(ValueError, match="finished"):
        pipe.step(state)
