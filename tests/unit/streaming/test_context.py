"""Where the keys and values of the past come from, and how much the past weighs."""

from dataclasses import replace

import pytest
import torch

from genstream.schedulers.few_step import FewStepScheduler
from genstream.streaming.controls import PromptControl, ResetControl
from genstream.streaming.engine import NonFiniteError
from genstream.streaming.noise import GivenNoise, SeededNoise
from genstream.streaming.settings import ContextPolicy, PositionPolicy, RecachePolicy, StreamSettings

RED, BLUE = "a red circle moving right", "a blue square moving left"
FRAMES = 1 + 4 * 17  # six chunks; the buffer of the policies below is full after two or three
WAYS = {
    "clean": {"past_weight": 0.3},
    "fused": {"context": "fused"},
    "fused and weighed": {"context": "fused", "past_weight": 0.3, "positions": "absolute"},
    "last step": {"context": "last_step"},
    "recomputed": {"context": "recompute", "sink_frames": 0, "window_frames": 3},
    "recomputed behind a sink": {"context": "recompute", "sink_frames": 1, "window_frames": 3},
}


def assert_same(actual, expected, atol=0.0):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module", params=list(WAYS))
def pipe(request, build_pipeline):
    """A pipeline that runs in each of the ways."""
    return build_pipeline(**WAYS[request.param])


@pytest.fixture(scope="module")
def plain(build_pipeline):
    """A pipeline whose settings the tests replace."""
    return build_pipeline()


def latents_of(pipe, settings, *, prompts=(RED,), controls=(), **arguments):
    """All latents of a stream under other settings."""
    arguments = {"num_frames": FRAMES, "seed": 5, **arguments}
    state = pipe.start(pipe.request(list(prompts), settings=settings, **arguments))
    for control, frame in controls:
        state.submit(control, not_before=frame)
    return torch.cat([chunk.latents for chunk in pipe.run(state)], dim=2)


@pytest.mark.parametrize("positions", list(PositionPolicy))
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (0, 4), (1, 0), (2, 5)])
def test_fused_equals_clean(plain, sinks, window, single, positions):
    """The finished chunk sees what it sees in a pass of its own, frames that the next overwrites too."""
    settings = StreamSettings(
        sink_frames=sinks, window_frames=window, positions=positions, independent_first_frame=single
    )
    clean = latents_of(plain, settings)
    fused = latents_of(plain, replace(settings, context=ContextPolicy.FUSED))
    assert_same(fused, clean, atol=1e-5)


@pytest.mark.parametrize("recache", list(RecachePolicy))
def test_fused_equals_clean_across_prompts_resets_and_given_latents(plain, recache):
    settings = StreamSettings(sink_frames=3, window_frames=3, context_timestep=100.0, recache=recache)
    controls = [
        (PromptControl(prompt=BLUE), 9),
        (PromptControl(prompt=RED, blend_chunks=2), 33),
        (ResetControl(seed=8), 81),
    ]
    given = torch.randn(2, 4, 6, 4, 4, generator=torch.Generator().manual_seed(1))

    def run(context):
        changed = replace(settings, context=context)
        return latents_of(
            plain, changed, prompts=(RED, BLUE), controls=controls, initial_latents=given, num_frames=121
        )

    assert_same(run(ContextPolicy.FUSED), run(ContextPolicy.CLEAN), atol=1e-5)


def test_a_last_step_without_noise_equals_clean(build_pipeline):
    """A shift near 0 leaves next to no noise at timestep 0."""
    pipe = build_pipeline(scheduler=FewStepScheduler(steps=(1000.0, 500.0, 0.0), shift=1e-3))
    settings = StreamSettings(sink_frames=3, window_frames=3)
    clean = latents_of(pipe, settings)
    assert_same(latents_of(pipe, replace(settings, context=ContextPolicy.LAST_STEP)), clean, atol=1e-4)
    noisy = build_pipeline(scheduler=FewStepScheduler(steps=(1000.0, 500.0), shift=5.0))
    last = latents_of(noisy, replace(settings, context=ContextPolicy.LAST_STEP))
    assert (last - latents_of(noisy, settings)).abs().max() > 1e-3


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_recomputed_equals_cached_while_nothing_is_dropped(plain, sinks, single):
    settings = StreamSettings(sink_frames=sinks, independent_first_frame=single)
    arguments = {"prompts": (RED, BLUE), "num_frames": 57}
    clean = latents_of(plain, settings, **arguments)
    rebuilt = latents_of(plain, replace(settings, context=ContextPolicy.RECOMPUTE), **arguments)
    assert_same(rebuilt, clean, atol=1e-5)


def test_recomputing_leaves_nothing_of_dropped_frames(plain):
    """Of nine given latent frames the first and the last two are kept, the others can be any."""
    generator = torch.Generator().manual_seed(1)
    given, others = torch.randn(2, 1, 4, 9, 4, 4, generator=generator)
    others[:, :, [0, 7, 8]] = given[:, :, [0, 7, 8]]
    settings = StreamSettings(sink_frames=1, window_frames=2)

    def last_chunk(context, latents):
        found = latents_of(
            plain, replace(settings, context=context), initial_latents=latents, num_frames=1 + 4 * 11
        )
        return found[:, :, -3:]

    recompute, clean = ContextPolicy.RECOMPUTE, ContextPolicy.CLEAN
    assert_same(last_chunk(recompute, given), last_chunk(recompute, others))
    assert (last_chunk(clean, given) - last_chunk(clean, others)).abs().max() > 1e-3


@pytest.mark.parametrize(("chunk", "window", "chunks"), [(3, 3, 3), (3, 3, 5), (2, 4, 6), (4, 1, 3)])
def test_the_oldest_frame_is_encoded_again(build_pipeline, chunk, window, chunks):
    """The next chunk is that of a stream which starts with the encoded frame and the latents behind it."""
    pipe = build_pipeline(chunk_frames=chunk, sink_frames=0, window_frames=window, context="recompute")
    state = pipe.start(pipe.request(RED, seed=5))
    made = [pipe.step(state) for _ in range(chunks)]
    frames, latents = (torch.cat([getattr(x, name) for x in made], dim=2) for name in ("frames", "latents"))
    expected = pipe.step(state).latents

    seen = frames[:, :, -(1 + 4 * (window - 1)) :]
    recent = latents[:, :, chunk * chunks - window + 1 :]
    context = torch.cat([pipe.vae.encode(seen[:, :, :1]), recent], dim=2).detach()
    noise, shape = SeededNoise((5,)), (1, 4, chunk, 4, 4)
    again = GivenNoise(
        noise.initial(chunk * chunks, shape), (noise.fresh(chunk * chunks, 0, shape),), first_frame=window
    )
    engine, settings = pipe.engine, StreamSettings(chunk_frames=chunk, window_frames=window)
    short = pipe.start(pipe.request(RED, noise=again, num_frames=1 + 4 * (window + chunk), settings=settings))
    for start in range(0, window, chunk):
        piece = context[:, :, start : start + chunk]
        engine.commit(piece, short)
        short.frame += piece.shape[2]
    with torch.no_grad():
        assert_same(engine.generate(short), expected, atol=1e-5)


def test_what_a_new_prompt_does_to_a_recomputed_past(build_pipeline):
    """Without re-caching the switching chunk still sees the past as the old prompt made it."""
    pipe = build_pipeline(**WAYS["recomputed behind a sink"])

    def past(policy):
        """Values of the four context frames that the switching chunk saw."""
        state = pipe.start(pipe.request(RED, seed=5))
        for _ in range(4):
            pipe.step(state)
        if policy is not None:
            state.submit(PromptControl(prompt=BLUE, recache=policy))
        pipe.step(state)
        return state.kv.values[1][:, : 4 * 4].clone()

    assert_same(past(RecachePolicy.NOTHING), past(None))
    assert_same(past(RecachePolicy.WINDOW), past(RecachePolicy.ALL))
    assert (past(RecachePolicy.ALL) - past(None)).abs().max() > 1e-3


def test_numbers_of_passes(plain):
    """Two denoising steps for each of six chunks, and what the past costs."""
    passes = []
    handle = plain.transformer.register_forward_pre_hook(lambda *_: passes.append(None))
    counts = {}
    for context in ContextPolicy:
        passes.clear()
        latents_of(plain, StreamSettings(sink_frames=1, window_frames=5, context=context))
        counts[str(context)] = len(passes)
    handle.remove()
    # Recomputing: one chunk in front of the second chunk, two in front of the others.
    assert counts == {"clean": 18, "fused": 12, "last_step": 12, "recompute": 12 + 1 + 2 * 4}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(("sinks", "window"), [(0, 3), (1, 5), (3, 6)])
@pytest.mark.parametrize(
    ("context", "scale"),
    [(context, 1) for context in ContextPolicy]
    + [(context, 2) for context in ContextPolicy if context is not ContextPolicy.FUSED],
)
def test_what_a_chunk_costs_is_known_beforehand(plain, context, scale, sinks, window, single):
    settings = StreamSettings(
        sink_frames=sinks,
        window_frames=window,
        context=context,
        guidance_scale=scale,
        independent_first_frame=single,
    )
    request = plain.request(RED, settings=settings, num_frames=FRAMES)
    passes = []
    handle = plain.transformer.register_forward_pre_hook(lambda *_: passes.append(None))
    for _ in plain.run(plain.start(request)):
        last = len(passes)
        passes.clear()
    handle.remove()
    assert plain.engine.evaluations_per_chunk(request) == last


def test_a_full_weight_changes_nothing(plain):
    settings = StreamSettings(sink_frames=3, window_frames=3)
    expected = latents_of(plain, settings)
    assert_same(latents_of(plain, replace(settings, past_weight=1.0)), expected)
    nearly = latents_of(plain, replace(settings, past_weight=1 - 1e-9))
    assert_same(nearly, expected, atol=1e-5)
    assert (latents_of(plain, replace(settings, past_weight=0.3)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("context", [ContextPolicy.CLEAN, ContextPolicy.FUSED, ContextPolicy.LAST_STEP])
def test_a_past_without_weight_is_its_first_frame(build_pipeline, context):
    """In one layer keys and values depend on nothing else, so the others might as well be dropped."""
    pipe = build_pipeline(layers=1)
    settings = StreamSettings(sink_frames=1, window_frames=5, past_weight=1e-30, context=context)
    alone = StreamSettings(sink_frames=1, window_frames=0, context=context)
    assert_same(latents_of(pipe, settings), latents_of(pipe, alone), atol=1e-5)


def test_passes_that_make_the_past_are_not_weighed(plain):
    """Keys and values of given latents are the same, however little the past weighs."""
    given = torch.randn(1, 4, 9, 4, 4, generator=torch.Generator().manual_seed(1))
    caches = []
    for weight in (1.0, 0.1):
        settings = StreamSettings(sink_frames=3, window_frames=3, past_weight=weight)
        state = plain.start(plain.request(RED, settings=settings, num_frames=69, initial_latents=given))
        for _ in range(3):
            plain.step(state)
        plain.engine.recache(state, RecachePolicy.ALL)
        caches.append(state.kv.tensors())
    for name, tensor in caches[0].items():
        assert_same(caches[1][name], tensor)


def test_guidance_with_the_other_ways(plain):
    for context in (ContextPolicy.LAST_STEP, ContextPolicy.RECOMPUTE):
        settings = StreamSettings(sink_frames=1, window_frames=3, context=context)
        expected = latents_of(plain, settings)
        assert not torch.allclose(latents_of(plain, replace(settings, guidance_scale=3.0)), expected)


@pytest.mark.parametrize("chunks", [1, 4])
def test_snapshot_and_fork_in_the_middle(pipe, ask, collect, tmp_path, chunks):
    whole = collect(pipe.start(ask(num_frames=FRAMES, seed=5)))
    state = pipe.start(ask(num_frames=FRAMES, seed=5))
    before = [pipe.step(state).frames for _ in range(chunks)]
    pipe.save_state(state, tmp_path / "stream.safetensors")
    restored, fork = pipe.load_state(tmp_path / "stream.safetensors"), state.clone()
    assert restored.request.settings == state.request.settings
    for again in (restored, fork, state):
        assert_same(torch.cat([*before, collect(again)], dim=2), whole)


def test_interleaved_streams(pipe, ask, collect, collect_in_turn):
    requests = [ask(num_frames=FRAMES, seed=5), ask(BLUE, num_frames=FRAMES, seed=6)]
    together = collect_in_turn([pipe.start(request) for request in requests])
    for request, frames in zip(requests, together, strict=True):
        assert_same(frames, collect(pipe.start(request)))


def test_batch_equals_single_streams(pipe, ask, collect):
    together = collect(pipe.start(ask([RED, BLUE], num_frames=FRAMES, seed=[5, 6])))
    for row, (prompt, seed) in enumerate([(RED, 5), (BLUE, 6)]):
        alone = collect(pipe.start(ask(prompt, num_frames=FRAMES, seed=seed)))
        assert_same(together[row : row + 1], alone, atol=1e-4)


def test_a_step_that_fails_leaves_the_stream_as_it_was(pipe, ask, collect, monkeypatch):
    expected = collect(pipe.start(ask(num_frames=FRAMES, seed=5)))
    state = pipe.start(ask(num_frames=FRAMES, seed=5))
    bias, frames = pipe.transformer.blocks[0].attn1.to_v.bias, []
    good = bias.detach().clone()
    while not state.finished:
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(pipe.vae, "decode_chunk", fail)
            pipe.step(state)
        bias.data.fill_(float("nan"))
        with pytest.raises(NonFiniteError):
            pipe.step(state)
        bias.data.copy_(good)
        frames.append(pipe.step(state).frames)
    assert_same(torch.cat(frames, dim=2), expected)


def fail(latents, state):
    raise MemoryError


def test_a_reset_is_a_fresh_stream(pipe, ask, collect):
    expected = collect(pipe.start(ask(seed=11)), chunks=4)
    state = pipe.start(ask(seed=5))
    collect(state, chunks=4)
    state.submit(ResetControl(seed=11))
    assert_same(collect(state, chunks=4), expected)


def test_memory_is_constant(pipe, ask):
    state, sizes = pipe.start(ask()), set()
    for index in range(30):
        pipe.step(state)
        pixels = 0 if state.pixels is None else state.pixels.nbytes
        if index >= 4:
            sizes.add((state.kv.nbytes, state.history.nbytes, pixels, len(state.kv.overwritten)))
    assert len(sizes) == 1


def test_recomputing_needs_decoded_frames(plain):
    settings = StreamSettings(window_frames=3, context=ContextPolicy.RECOMPUTE)
    with pytest.raises(ValueError, match=r"needs decode=True .*or sink_frames above 0; got decode=False"):
        plain.start(plain.request(RED, settings=settings, num_frames=9, decode=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"past_weight": 0.0}, "past_weight must be above 0 and at most 1"),
        ({"past_weight": 1.5}, "past_weight must be above 0 and at most 1"),
        ({"past_weight": float("nan")}, "past_weight must be above 0 and at most 1"),
        ({"context": ContextPolicy.FUSED, "guidance_scale": 2.0}, "guidance_scale must be 1, got 2"),
        ({"context": ContextPolicy.RECOMPUTE, "window_frames": 0}, "window_frames must be above 0, got 0"),
        ({"context": "old"}, r"context must be one of \['clean', 'fused', .*\], got 'old'"),
        ({"positions": None}, "positions must be one of .*, got None"),
        ({"recache": "some"}, "recache must be one of .*, got 'some'"),
    ],
)
def test_settings_that_contradict_each_other(arguments, message):
    with pytest.raises(ValueError, match=message):
        StreamSettings(**arguments)


def test_policies_may_be_given_by_name(build_pipeline):
    named = StreamSettings(positions="window", context="recompute", recache="window", window_frames=3)
    assert (named.positions, named.context) == (PositionPolicy.WINDOW, ContextPolicy.RECOMPUTE)
    assert named.recache is RecachePolicy.WINDOW
    with pytest.raises(ValueError, match=r"context must be one of .*, got 'old'"):
        build_pipeline(context="old")


def test_a_clip_s_latents_where_the_past_is_encoded_again(build_pipeline):
    pipe = build_pipeline(context="recompute", sink_frames=0, window_frames=3)
    pipe.set_progress_bar_config(disable=True)
    expected = torch.cat([chunk.latents for chunk in pipe.stream(RED, num_frames=45, seed=2)], dim=2)
    assert_same(pipe(RED, num_frames=45, seed=2, output_type="latent").frames, expected)


def test_a_stream_takes_all_that_a_request_takes(plain):
    embeds, settings = plain.encode_prompt(BLUE), StreamSettings(window_frames=6)
    expected = latents_of(plain, settings, prompts=(BLUE,))
    chunks = plain.stream(prompt_embeds=embeds, settings=settings, num_frames=FRAMES, seed=5, decode=False)
    assert_same(torch.cat([chunk.latents for chunk in chunks], dim=2), expected)
