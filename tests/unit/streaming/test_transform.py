"""Video to video: what a stream makes of its source, however the source arrives."""

import random
from dataclasses import replace

import pytest
import torch

from genstream.schedulers.few_step import FewStepScheduler, FlowEulerScheduler
from genstream.streaming.controls import (
    PauseControl,
    PromptControl,
    ResetControl,
    ResumeControl,
    StopControl,
)
from genstream.streaming.intake import MotionNoise
from genstream.streaming.source import LiveFrames

RED, BLUE = "a red circle moving right", "a blue square moving left"
TRAINED = 5 / 6
"""Noise level of the second and last step of the shared pipeline's student; the first is at 1."""
COUNT = 45  # chunks of 9, 12, 12 and 12 frames


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def clip(count, seed=0):
    """Frames `[3, 32, 32]` of a bright square that moves over noise."""
    generator = torch.Generator().manual_seed(seed)
    frames = []
    for index in range(count):
        frame = torch.rand(3, 32, 32, generator=generator) * 0.2 - 0.8
        frame[:, 8:20, index % 20 : index % 20 + 10] = 0.7
        frames.append(frame)
    return frames


def as_video(frames):
    """Frames as `[1, 3, F, H, W]`."""
    return torch.stack(frames, dim=1)[None]


class Bits:
    """A source whose frames come in given portions, one portion per step of the stream."""

    def __init__(self, frames, portions):
        self.frames, self.portions = list(frames), iter(portions)

    @property
    def ended(self):
        return not self.frames

    def take(self, count):
        count = min(count, next(self.portions, count))
        taken, self.frames = self.frames[:count], self.frames[count:]
        return taken


@pytest.fixture(scope="module")
def pipe(build_pipeline):
    """A pipeline that denoises chunk by chunk."""
    return build_pipeline()


@pytest.fixture
def start(pipe):
    """`start(frames, ...)`: a video-to-video stream of the shared pipeline."""

    def start(frames, prompt=RED, **arguments):
        return pipe.start(pipe.request(prompt, **{"strength": 0.6, **arguments}), source=frames)

    return start


@pytest.fixture
def collect(pipe):
    """`collect(state)`: all frames that are left, one tensor."""

    def collect(state):
        return torch.cat([chunk.frames for chunk in pipe.run(state)], dim=2)

    return collect


@pytest.fixture
def whole(start, collect):
    return collect(start(clip(COUNT)))


@pytest.mark.parametrize("count", range(1, 36))
def test_as_many_frames_come_out_as_go_in(start, collect, count):
    state = start(clip(count), strength=0.3)
    assert collect(state).shape == (1, 3, count, 32, 32)
    assert state.frames_out == state.intake.frames == state.num_frames == count


@pytest.mark.parametrize("limit", [1, 7, 9, 20])
def test_it_ends_where_it_was_asked_to(start, collect, limit):
    assert_same(collect(start(iter(clip(COUNT)), num_frames=limit)), collect(start(clip(COUNT)[:limit])))


def test_strength_one_is_text_to_video(pipe, start, collect):
    generated = collect(pipe.start(pipe.request(RED, num_frames=COUNT, seed=4)))
    assert_same(collect(start(clip(COUNT), strength=1, seed=4)), generated)


@torch.no_grad()
@pytest.mark.parametrize("scheduler", [FewStepScheduler(), FlowEulerScheduler(num_steps=5)])
def test_the_weaker_the_nearer_to_the_source(build_pipeline, scheduler):
    pipe = build_pipeline(scheduler=scheduler)
    latents = pipe.vae.encode(as_video(clip(21)))

    def distance(strength):
        request = pipe.request(RED, strength=strength, decode=False)
        state = pipe.start(request, source=clip(21))
        made = torch.cat([chunk.latents for chunk in pipe.run(state)], dim=2)
        return float((made - latents).square().mean().sqrt())

    distances = [distance(strength) for strength in (1e-4, 0.1, 0.5, 1.0)]
    assert distances == sorted(distances)
    assert distances[0] < 1e-3 < distances[-1]


def test_hardly_any_noise_returns_the_reconstruction(pipe, start, collect):
    frames = collect(start(clip(COUNT), strength=1e-6))
    torch.testing.assert_close(
        frames, pipe.vae.decode(pipe.vae.encode(as_video(clip(COUNT)))), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_portions_of_the_source_do_not_matter(pipe, seed):
    portions = [random.Random(seed).randrange(2 + 3 * seed) for _ in range(12)]

    def run(source):
        request = pipe.request(RED, strength=0.6, motion=MotionNoise())
        state = pipe.start(request, source=source)
        chunks = [pipe.step(state) for _ in range(40) if not state.finished]
        assert state.finished
        return torch.cat([chunk.frames for chunk in chunks if chunk.frames is not None], dim=2)

    assert_same(run(Bits(clip(30), portions)), run(clip(30)))


def test_a_slow_source_is_waited_for(pipe, whole):
    frames, waits = clip(COUNT), []
    source = LiveFrames(height=32, width=32)

    def idle():
        waits.append(len(frames))
        for _ in range(min(5, len(frames))):
            source.put(frames.pop(0))
        if not frames:
            source.close()

    engine = replace(pipe.engine, idle=idle)
    state = engine.start(pipe.request(RED, strength=0.6), source=source)
    assert_same(torch.cat([chunk.frames for chunk in engine.run(state)], dim=2), whole)
    assert len(waits) >= 9 and source.dropped == 0


def test_a_fast_source_loses_its_oldest_frames(pipe, start, collect, caplog):
    source, frames = LiveFrames(height=32, width=32, capacity=12), clip(40)
    for frame in frames:
        source.put(frame)
    source.close()
    assert source.dropped == 28
    assert "oldest are dropped" in caplog.text
    assert_same(collect(start(source)), collect(start(frames[28:])))
    with pytest.raises(ValueError, match="before close"):
        source.put(frames[0])


@pytest.mark.parametrize("chunks", range(4))
def test_snapshot_in_the_middle(pipe, start, collect, tmp_path, chunks):
    arguments = {"motion": MotionNoise(), "strength": 0.9}
    expected = collect(start(clip(COUNT), **arguments))
    state = start(clip(COUNT), **arguments)
    before = [pipe.step(state).frames for _ in range(chunks)]
    pipe.save_state(state, tmp_path / "s")
    restored = pipe.load_state(tmp_path / "s", source=clip(COUNT)[state.intake.frames :])
    assert restored.request.transform == state.request.transform
    assert_same(torch.cat([*before, collect(restored)], dim=2), expected)


def test_snapshot_in_the_middle_of_a_chunk(pipe, collect, whole, tmp_path):
    source = LiveFrames(height=32, width=32, capacity=100)
    for frame in clip(COUNT)[:14]:
        source.put(frame)
    state = pipe.start(pipe.request(RED, strength=0.6), source=source)
    before = [chunk.frames for chunk in (pipe.step(state), pipe.step(state)) if chunk.frames is not None]
    assert len(before) == 1 and state.intake.frames == 14
    pipe.save_state(state, tmp_path / "s")
    restored = pipe.load_state(tmp_path / "s", source=clip(COUNT)[14:])
    assert_same(torch.cat([*before, collect(restored)], dim=2), whole)


def test_interleaved_streams(pipe, start, collect):
    def streams():
        return [start(clip(COUNT)), start(clip(COUNT, seed=1), BLUE, seed=3, strength=0.9)]

    apart = [collect(state) for state in streams()]
    states, together = streams(), [[], []]
    while not all(state.finished for state in states):
        for state, frames in zip(states, together, strict=True):
            if not state.finished:
                frames.append(pipe.step(state).frames)
    for frames, expected in zip(together, apart, strict=True):
        assert_same(torch.cat([part for part in frames if part is not None], dim=2), expected)


def test_a_fork_takes_a_source_of_its_own(pipe, start, collect, whole):
    state = start(clip(COUNT))
    before = pipe.step(state).frames
    fork = state.clone()
    with pytest.raises(ValueError, match="source must be set"):
        pipe.step(fork)
    fork.source = Bits(clip(COUNT)[state.intake.frames :], [])
    assert_same(torch.cat([before, collect(fork)], dim=2), whole)
    assert_same(torch.cat([before, collect(state)], dim=2), whole)


def test_a_failed_step_loses_no_frame(pipe, start, collect, whole, monkeypatch):
    state = start(clip(COUNT))
    frames = [pipe.step(state).frames]

    def fail(*_):
        raise ArithmeticError("made to fail")

    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.engine), "commit", fail)
        with pytest.raises(ArithmeticError, match="made to fail"):
            pipe.step(state)
    assert_same(torch.cat([*frames, collect(state)], dim=2), whole)


def test_controls(pipe, start, collect, whole):
    state = start(clip(COUNT))
    frames = [pipe.step(state).frames]
    state.submit(PauseControl())
    assert pipe.step(state).frames is None
    taken = state.intake.frames
    assert pipe.step(state).frames is None
    assert state.intake.frames == taken
    state.submit(ResumeControl())
    state.submit(PromptControl(prompt=BLUE))
    frames += [chunk.frames for chunk in pipe.run(state)]
    made = torch.cat(frames, dim=2)
    assert made.shape == whole.shape
    assert_same(made[:, :, :9], whole[:, :, :9])
    assert not torch.equal(made[:, :, 9:], whole[:, :, 9:])
    again = start(clip(COUNT))
    for applied in state.log:
        again.submit(applied.control, not_before=applied.frame)
    assert_same(collect(again), made)


def test_stop(pipe, start):
    state = start(clip(COUNT))
    pipe.step(state)
    state.submit(StopControl())
    assert pipe.step(state).frames is None
    assert state.finished and state.frames_out == 9


def test_a_reset_starts_anew_with_the_next_frame(pipe, start, collect):
    state = start(clip(COUNT))
    before = pipe.step(state).frames
    state.submit(ResetControl(seed=5))
    after = collect(state)
    assert before.shape[2] + after.shape[2] == COUNT
    assert_same(after, collect(start(clip(COUNT)[9:], seed=5)))


def test_prompts_side_by_side(pipe, start, collect):
    both = collect(start(clip(COUNT), [RED, BLUE], seed=[5, 6]))
    for row, (prompt, seed) in enumerate([(RED, 5), (BLUE, 6)]):
        alone = collect(start(clip(COUNT), prompt, seed=seed))
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=1e-4)


def test_memory_is_constant(pipe, start):
    state, sizes = start(clip(9 + 12 * 20)), set()
    for index in range(20):
        pipe.step(state)
        intake = state.intake
        if index >= 2:
            sizes.add((intake.vae.nbytes, intake.waiting.nbytes, intake.latents.nbytes, state.kv.nbytes))
    assert len(sizes) == 1


def levels(pipe, frames, **arguments):
    request = pipe.request(RED, **arguments)
    return [chunk.noise_level for chunk in pipe.run(pipe.start(request, source=frames))]


def test_motion_lowers_the_noise(pipe):
    still = [torch.zeros(3, 32, 32)] * COUNT
    jump = [torch.full((3, 32, 32), -0.5 if index >= 21 else 0.5) for index in range(COUNT)]
    motion = MotionNoise()
    assert levels(pipe, still, strength=0.9, motion=motion) == pytest.approx([TRAINED] * 4)
    # One jump in front of the third chunk; a tenth of its level stays for the fourth.
    third = 0.1 * TRAINED + 0.9 * (TRAINED - 0.1)
    expected = [TRAINED, TRAINED, third, 0.1 * third + 0.9 * TRAINED]
    assert levels(pipe, jump, strength=0.9, motion=motion) == pytest.approx(expected)
    assert levels(pipe, jump, strength=0.9) == [TRAINED] * 4


@pytest.mark.parametrize(
    ("strength", "level"), [(1.0, 1.0), (0.99, TRAINED), (TRAINED, TRAINED), (0.8, 0.8), (0.1, 0.1)]
)
def test_a_student_starts_at_a_trained_step(pipe, strength, level):
    assert levels(pipe, clip(9), strength=strength) == [level]


@pytest.mark.parametrize(
    ("frames", "arguments", "error"),
    [
        (clip(9), {"strength": 0}, "strength must be above 0 and at most 1, got 0"),
        (clip(9), {"strength": 1.5}, r"strength must be above 0 and at most 1, got 1\.5"),
        (clip(9), {"strength": None}, "strength must be given together, got source without strength"),
        (None, {}, "got strength without source"),
        (clip(9), {"strength": 0.05, "motion": MotionNoise()}, r"reduction must be below 0\.05.*got 0\.1"),
        (clip(9), {"image": torch.zeros(1, 3, 32, 32)}, "strength and initial_latents .* exclude each other"),
        (clip(9), {"strength": None, "motion": MotionNoise()}, "motion needs a strength"),
    ],
)
def test_what_does_not_fit_is_refused(start, frames, arguments, error):
    with pytest.raises(ValueError, match=error):
        start(frames, **arguments)


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (
            torch.zeros(3, 32, 48),
            r"frame 2 of the source is 48x32, the video is 32x32; resize it.*or ask for a video of its size",
        ),
        (torch.full((3, 32, 32), 2.0), r"frame 2 of the source must lie in \[-1, 1\]"),
        (torch.full((3, 32, 32), float("nan")), "frame 2 of the source must be finite"),
        (torch.zeros(32, 32), r"frame 2 of the source must be \[3, 32, 32\], got \[32, 32\]"),
        (None, "frame 2 of the source must be a PIL image, an array or a tensor, got NoneType"),
    ],
)
def test_a_bad_frame_is_named(pipe, start, frame, error):
    frames = clip(9)
    frames.insert(2, frame)
    state = start(frames)
    with pytest.raises(ValueError, match=error):
        pipe.step(state)
    assert pipe.step(state).frames.shape[2] == 9  # the others are all there


def test_a_source_without_frames(pipe, start):
    with pytest.raises(ValueError, match="source must hold at least one frame"):
        pipe.step(start([]))
