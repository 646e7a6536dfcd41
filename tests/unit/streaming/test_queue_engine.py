"""What is the queue's own: the passes a chunk takes, how it begins and ends, what a new prompt reaches."""

from dataclasses import replace

import pytest
import torch

from genstream.pipelines.causal_video import ENGINES, CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.streaming.controls import PromptControl, ResetControl
from genstream.streaming.noise import GivenNoise
from genstream.streaming.queue_engine import QueueEngine
from genstream.streaming.settings import ContextPolicy, RecachePolicy

RED, BLUE = "a red circle moving right", "a blue square moving left"
LEVELS, CHUNK, FAR = 3, 3, 1_000_000
STEPS = (1000.0, 700.0, 300.0)


@pytest.fixture(scope="module")
def pipe(build_pipeline):
    """Three noise levels, one sink chunk, one finished chunk in sight of a full queue."""
    return build_pipeline(engine="queue", window_frames=12, scheduler=FewStepScheduler(steps=STEPS))


@pytest.fixture
def passes(pipe):
    """Number of latent frames and timesteps of every pass through the transformer."""
    found = []

    def note(module, inputs, options):
        frames = inputs[0].shape[2]
        by_frame = inputs[1].reshape(len(inputs[1]), -1).expand(-1, frames)
        found.append((frames, tuple(by_frame[0].tolist())))

    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    yield found
    handle.remove()


def run(pipe, state, chunks=None):
    found = []
    while not state.finished and (chunks is None or len(found) < chunks):
        found.append(pipe.step(state).latents)
    return torch.cat(found, dim=2)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def joint(*levels):
    """A pass over chunks at these levels."""
    schedule = FewStepScheduler(steps=STEPS).schedule()
    return CHUNK * len(levels), tuple(schedule.timesteps[level] for level in levels for _ in range(CHUNK))


COMMIT = (CHUNK, (0.0,) * CHUNK)


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 6])
def test_passes_of_a_stream(pipe, ask, passes, chunks):
    """One joint pass a chunk after the first; with those that fill the queue, chunks + levels - 1."""
    state = pipe.start(ask(num_frames=9 + 12 * (chunks - 1), decode=False))
    at = {
        chunk: [window - chunk for window in range(chunk, chunk + LEVELS)] for chunk in range(chunks)
    }  # the windows' levels of each chunk
    for chunk in range(chunks):
        passes.clear()
        pipe.step(state)
        windows = range(LEVELS) if chunk == 0 else [chunk + LEVELS - 1]
        expected = [
            joint(*(window - other for other in at if window - other in range(LEVELS))) for window in windows
        ]
        assert passes == [*expected, COMMIT]
    assert state.finished
    assert state.queue.shape[2] == 0


@pytest.mark.parametrize("scale", [1, 2])
def test_what_a_chunk_costs_is_known_beforehand(pipe, ask, passes, scale):
    request = ask(num_frames=9 + 12 * 3, guidance_scale=scale)
    assert pipe.engine.chunk_count(request) == 4
    state = pipe.start(request)
    pipe.step(state)
    passes.clear()
    pipe.step(state)
    assert pipe.engine.evaluations_per_chunk(request) == len(passes)


def test_an_endless_stream_has_no_tail(pipe, ask, passes):
    state = pipe.start(ask(decode=False))
    run(pipe, state, chunks=4)
    passes.clear()
    run(pipe, state, chunks=20)
    assert passes == [joint(2, 1, 0), COMMIT] * 20
    assert state.queue.shape[2] == CHUNK * (LEVELS - 1)


def test_only_the_end_knows_of_the_end(pipe, ask):
    """All chunks but the last levels - 1 are those of an endless stream."""
    endless = run(pipe, pipe.start(ask(seed=5, decode=False)), chunks=7)
    ending = run(pipe, pipe.start(ask(num_frames=81, seed=5, decode=False)))
    same = ending.shape[2] - CHUNK * (LEVELS - 1)
    assert_same(ending[:, :, :same], endless[:, :, :same])
    assert not torch.equal(ending[:, :, same : same + CHUNK], endless[:, :, same : same + CHUNK])


@pytest.mark.parametrize("chunks", [1, 2, 5, 6])
def test_after_a_reset_it_ends_in_time(pipe, ask, passes, chunks):
    state = pipe.start(ask(num_frames=81, decode=False))
    run(pipe, state, chunks=chunks)
    state.submit(ResetControl(seed=1))
    left, given = 81 - state.frames_out, 0
    passes.clear()
    run(pipe, state)
    assert state.frames_out == 81
    latent_frames = 1 + -(-(left - 1) // 4)
    given = -(-latent_frames // CHUNK)
    assert len(passes) == 2 * given + LEVELS - 1


def test_one_level_without_sinks_is_the_cache_engine(build_pipeline):
    """A queue of one chunk is no queue."""
    found = []
    for engine in ("cache", "queue"):
        pipe = build_pipeline(
            engine=engine,
            sink_frames=0,
            window_frames=6,
            positions="absolute",
            scheduler=FewStepScheduler(steps=(1000.0,)),
        )
        state = pipe.start(pipe.request(RED, num_frames=69, seed=5, guidance_scale=2.0, decode=False))
        found.append(run(pipe, state))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_a_late_stream_is_as_exact_as_an_early_one(pipe, ask):
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, 4, 30, 4, 4, generator=generator) for _ in range(LEVELS)]
    found = []
    for at in (0, FAR):
        source = GivenNoise(noise[0], tuple(noise[1:]), first_frame=at)
        state = pipe.start(ask(noise=source, decode=False))
        state.frame = state.kv.origin = at
        found.append(run(pipe, state, chunks=8))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_a_prompt_reaches_the_next_chunk_at_its_last_level(pipe, ask, monkeypatch):
    """The next chunk saw the old prompt before, the one `levels - 1` chunks later never did."""
    used, predict = [], QueueEngine.predict_queue

    def note(engine, queue, timesteps, state, context):
        used.append((state.frame, timesteps.shape[1], state.text))
        return predict(engine, queue, timesteps, state, context)

    monkeypatch.setattr(QueueEngine, "predict_queue", note)
    state = pipe.start(ask(decode=False))
    run(pipe, state, chunks=2)
    old = state.text
    number = state.submit(PromptControl(prompt=BLUE))
    chunk = pipe.step(state)
    assert [(item.sequence, item.frame) for item in chunk.applied] == [(number, chunk.first_frame)]
    run(pipe, state, chunks=LEVELS)
    texts = {}
    for start, frames, text in used:
        for index in range(frames // CHUNK):
            texts.setdefault(start // CHUNK + index, []).append(text is old)
    assert texts[1] == [True, True, True]
    assert texts[2] == [True, True, False]
    assert texts[3] == [True, False, False]
    assert texts[4] == [False, False, False]


@pytest.mark.parametrize("recache", RecachePolicy)
@pytest.mark.parametrize("chunks", [1, 4, 7])
def test_a_new_prompt_leaves_what_was_given_out(pipe, ask, chunks, recache):
    plain = run(pipe, pipe.start(ask(num_frames=117, seed=5, decode=False)))
    state = pipe.start(ask(num_frames=117, seed=5, decode=False))
    before = run(pipe, state, chunks=chunks)
    state.submit(PromptControl(prompt=BLUE, recache=recache))
    after = run(pipe, state)
    assert_same(before, plain[:, :, : before.shape[2]])
    assert after[:, :, :CHUNK].sub(plain[:, :, before.shape[2] :][:, :, :CHUNK]).abs().max() > 1e-4


@pytest.mark.parametrize("given", [3, 6, 18])
def test_given_latents_come_out_and_are_gone_on_from(pipe, ask, passes, given):
    latents = torch.randn(1, 4, given, 4, 4, generator=torch.Generator().manual_seed(0))
    frames = 1 + 4 * (given + 11)
    found = run(pipe, pipe.start(ask(num_frames=frames, seed=5, initial_latents=latents, decode=False)))
    assert_same(found[:, :, :given], latents)
    assert found.shape[2] == given + 12
    assert passes[: given // CHUNK] == [COMMIT] * (given // CHUNK)
    assert passes[given // CHUNK :][:LEVELS] == [joint(0), joint(1, 0), joint(2, 1, 0)]
    other = run(pipe, pipe.start(ask(num_frames=frames, seed=5, initial_latents=-latents, decode=False)))
    assert not torch.allclose(found[:, :, given:], other[:, :, given:], atol=1e-4)


def test_start_from_an_image(pipe, ask):
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = run(pipe, pipe.start(ask(num_frames=77, seed=5, image=image, decode=False)))
    assert_same(found[:, :, :1], pipe.encode_image(image, 32, 32, batch_size=1))
    assert found.shape[2] == 22
    assert found.isfinite().all()


def test_a_first_chunk_of_one_frame(pipe, ask, passes):
    settings = replace(pipe.settings, independent_first_frame=True)
    state = pipe.start(ask(num_frames=25, seed=5, settings=settings, decode=False))
    shapes = [chunk.latents.shape[2] for chunk in pipe.run(state)]
    assert shapes == [1, 3, 3]
    assert [frames for frames, _ in passes] == [1, 4, 7, 1, 6, 3, 3, 3]
    assert state.frames_out == 25


def test_a_queue_that_does_not_fit_its_window(build_pipeline, pipe):
    message = r"window_frames must be at least 9 for a queue of 3 chunks of 3 .* behind 3 sink frames, got"
    for window in (0, 8, None):
        wrong = build_pipeline(engine="queue", window_frames=window, scheduler=FewStepScheduler(steps=STEPS))
        with pytest.raises(ValueError, match=f"{message} {window}"):
            wrong.start(wrong.request(RED, num_frames=9))


def test_a_queue_follows_no_source(pipe, ask):
    with pytest.raises(
        ValueError, match=r"a source cannot be followed by a queue of chunks .* start as noise"
    ):
        pipe.start(ask(strength=0.6), source=[torch.zeros(3, 32, 32)])


@pytest.mark.parametrize("chunks", [0, 1, 4, 6])
def test_a_snapshot_holds_the_queue(pipe, ask, tmp_path, chunks):
    whole = run(pipe, pipe.start(ask(num_frames=81, seed=5, decode=False)))
    state = pipe.start(ask(num_frames=81, seed=5, decode=False))
    before = [pipe.step(state).latents for _ in range(chunks)]
    pipe.save_state(state, tmp_path / "stream")
    after = run(pipe, pipe.load_state(tmp_path / "stream"))
    assert_same(torch.cat([*before, after], dim=2), whole)


@pytest.mark.parametrize(
    "setting",
    [*({"context": policy} for policy in ContextPolicy if policy != "clean"), {"past_weight": 0.5}],
    ids=str,
)
def test_ways_of_the_cache_engine_only(pipe, ask, setting):
    with pytest.raises(ValueError, match="context must be 'clean' and past_weight 1, got"):
        pipe.start(ask(settings=replace(pipe.settings, **setting)))


def test_the_engine_is_part_of_the_model(build_pipeline, tmp_path):
    for saved, other in (("queue", "cache"), ("cache", "queue")):
        build_pipeline(engine=saved).save_pretrained(tmp_path / saved)
        loaded = CausalVideoPipeline.from_pretrained(tmp_path / saved)
        assert type(loaded.engine) is ENGINES[saved]
        loaded = CausalVideoPipeline.from_pretrained(tmp_path / saved, engine=other)
        assert type(loaded.engine) is ENGINES[other]


def test_an_engine_that_does_not_exist(build_pipeline):
    with pytest.raises(ValueError, match=r"engine must be one of \['cache', 'queue'\], got 'loop'"):
        build_pipeline(engine="loop")


def test_a_snapshot_of_the_other_engine(build_pipeline, pipe, ask, tmp_path):
    state = pipe.start(ask())
    pipe.step(state)
    pipe.save_state(state, tmp_path / "stream")
    other = build_pipeline(engine="cache", window_frames=12, scheduler=FewStepScheduler(steps=STEPS))
    with pytest.raises(ValueError, match="snapshot must have the engine's cache layout"):
        other.load_state(tmp_path / "stream")
