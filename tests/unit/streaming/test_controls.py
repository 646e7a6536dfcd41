"""When controls take effect, what they change, and what they leave alone."""

import json
from threading import Thread

import numpy as np
import pytest
import torch

from genstream.streaming.controls import (
    PauseControl,
    PromptControl,
    ResetControl,
    ResumeControl,
    StopControl,
    from_json,
    to_json,
)
from genstream.streaming.engine import NonFiniteError
from genstream.streaming.settings import RecachePolicy

RED, BLUE = "a red circle moving right", "a blue square moving left"
ALL = (
    PromptControl(prompt=BLUE, recache=RecachePolicy.WINDOW, blend_chunks=2),
    PauseControl(),
    ResumeControl(),
    StopControl(),
    ResetControl(seed=3),
)


def test_a_prompt_may_be_switched_by_its_embeddings(pipe, ask, collect, tmp_path):
    told, given = pipe.start(ask(num_frames=45)), pipe.start(ask(num_frames=45))
    embeds = pipe.encode_prompt(BLUE)
    told.submit(PromptControl(prompt=BLUE), not_before=21)
    given.submit(PromptControl(prompt_embeds=embeds), not_before=21)
    pipe.save_state(given, tmp_path / "state.safetensors")
    expected = collect(told)
    assert_same(collect(given), expected)
    assert_same(collect(pipe.load_state(tmp_path / "state.safetensors")), expected)
    copy = from_json(json.loads(json.dumps(to_json(PromptControl(prompt_embeds=embeds.bfloat16())))))
    assert_same(copy.prompt_embeds, embeds.bfloat16().float())


def test_what_is_no_control_is_refused_at_once(pipe, ask):
    state = pipe.start(ask(num_frames=9))
    with pytest.raises(ValueError, match="control must be one of genstream's, got 'hello'"):
        state.submit("hello")
    assert not state.pending


def test_embeddings_of_another_shape_are_refused(pipe, ask):
    state = pipe.start(ask(num_frames=45))
    state.submit(PromptControl(prompt_embeds=torch.zeros(1, 3, 16)))
    with pytest.raises(ValueError, match=r"prompt_embeds must be \[1 or 1, 12, 16\], got \[1, 3, 16\]"):
        pipe.step(state)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("not_before", [0, 1, 9, 10, 21, 22, 33])
def test_a_control_waits_for_its_frame(pipe, ask, not_before):
    state = pipe.start(ask(num_frames=45))
    number = state.submit(PromptControl(prompt=BLUE), not_before=not_before)
    for chunk in pipe.run(state):
        if chunk.applied:
            assert [item.sequence for item in chunk.applied] == [number]
            assert chunk.applied[0].frame == chunk.first_frame
            break
    assert chunk.first_frame == min(start for start in (0, 9, 21, 33) if start >= not_before)
    assert not state.pending


def test_sequence_numbers_count_up_and_come_back(pipe, ask):
    state = pipe.start(ask())
    numbers = [state.submit(PromptControl(prompt=prompt)) for prompt in (RED, BLUE, RED)]
    assert numbers == [1, 2, 3]
    assert [item.sequence for item in pipe.step(state).applied] == numbers
    assert pipe.step(state).applied == ()


def test_what_happened_before_a_switch_stays(pipe, ask, collect):
    plain = collect(pipe.start(ask(num_frames=45, seed=5)))
    state = pipe.start(ask(num_frames=45, seed=5))
    state.submit(PromptControl(prompt=BLUE), not_before=20)
    switched = collect(state)
    assert_same(switched[:, :, :21], plain[:, :, :21])
    assert not torch.equal(switched[:, :, 21:], plain[:, :, 21:])


def test_pause_changes_no_frame(pipe, ask, collect):
    expected = collect(pipe.start(ask(num_frames=45, seed=5)))
    state = pipe.start(ask(num_frames=45, seed=5))
    frames = [pipe.step(state).frames]
    state.submit(PauseControl())
    for _ in range(3):
        chunk = pipe.step(state)
        assert (chunk.frames, chunk.latents, chunk.timings) == (None, None, None)
        assert (chunk.index, chunk.first_frame) == (1, 9)
    state.submit(ResumeControl())
    assert_same(torch.cat([*frames, collect(state)], dim=2), expected)


def test_run_waits_while_paused(pipe, ask, monkeypatch):
    state = pipe.start(ask(num_frames=21))
    state.submit(PauseControl())
    waits = []

    def resume_at_third():
        waits.append(None)
        if len(waits) == 3:
            state.submit(ResumeControl())

    engine = type(pipe.engine)(pipe.transformer, pipe.vae, pipe.encode_prompt, idle=resume_at_third)
    assert len(list(engine.run(state))) == 2
    assert len(waits) == 3


def test_stop_ends_the_stream(pipe, ask):
    state = pipe.start(ask())
    chunks = []
    for chunk in pipe.run(state):
        chunks.append(chunk)
        if chunk.index == 1:
            state.submit(StopControl())
    assert len(chunks) == 2
    assert state.finished


@pytest.mark.parametrize("after", [0, 1, 4])
def test_reset_is_a_fresh_stream(pipe, ask, collect, after):
    expected = collect(pipe.start(ask(seed=11)), chunks=3)
    state = pipe.start(ask(seed=5))
    collect(state, chunks=after) if after else None
    state.submit(ResetControl(seed=11))
    assert_same(collect(state, chunks=3), expected)
    assert state.chunk_index == after + 3


def test_reset_without_a_seed_repeats_the_request(pipe, ask, collect):
    expected = collect(pipe.start(ask([RED, BLUE], seed=5)), chunks=2)
    state = pipe.start(ask([RED, BLUE], seed=5))
    state.submit(ResetControl(seed=11))
    assert not torch.equal(collect(state, chunks=2), expected)
    state.submit(ResetControl())
    assert_same(collect(state, chunks=2), expected)


def test_reset_of_a_batch_counts_up_from_its_seed(pipe, ask, collect):
    expected = collect(pipe.start(ask([RED, BLUE], seed=11)), chunks=2)
    state = pipe.start(ask([RED, BLUE], seed=5))
    state.submit(ResetControl(seed=11))
    assert_same(collect(state, chunks=2), expected)


def test_blend_reaches_the_new_prompt_step_by_step(pipe, ask):
    state = pipe.start(ask())
    source, target = state.prompt_embeds, pipe.encode_prompt(BLUE)
    state.submit(PromptControl(prompt=BLUE, blend_chunks=4))
    for done in range(1, 5):
        pipe.step(state)
        torch.testing.assert_close(state.prompt_embeds, source + (target - source) * done / 4)
    assert state.blend is None
    pipe.step(state)
    assert_same(state.prompt_embeds, target)


def test_the_models_own_recache_policy(build_pipeline):
    """A control that names none follows the settings."""
    for policy in RecachePolicy:
        pipe, frames = build_pipeline(recache=str(policy)), []
        for recache in (None, policy):
            state = pipe.start(pipe.request(RED, num_frames=69))
            state.submit(PromptControl(prompt=BLUE, recache=recache), not_before=45)
            frames.append(torch.cat([chunk.frames for chunk in pipe.run(state)], dim=2))
        assert_same(*frames)


def test_recache_matters_and_so_do_the_sinks(pipe, ask, collect):
    frames = {}
    for name, options in {
        "new sinks": {"recache": RecachePolicy.ALL},
        "old sinks": {"recache": RecachePolicy.WINDOW},
        "old cache": {"recache": RecachePolicy.NOTHING},
    }.items():
        state = pipe.start(ask(seed=5))
        collect(state, chunks=6)
        sinks = [keys.clone() for keys in state.kv.sinks]
        state.submit(PromptControl(prompt=BLUE, **options))
        frames[name] = collect(state, chunks=2)
        kept = all(torch.equal(*pair) for pair in zip(sinks, state.kv.sinks, strict=True))
        assert kept == (name != "new sinks")
    assert not torch.equal(frames["new sinks"], frames["old sinks"])
    assert not torch.equal(frames["old sinks"], frames["old cache"])


def test_recache_rebuilds_every_kept_frame_but_kept_sinks(pipe, ask, collect):
    """The first layer's keys depend on the frame alone, the second's on the prompt too."""
    state = pipe.start(ask(seed=5))
    collect(state, chunks=6)
    before = [tensor.unflatten(1, (-1, 4)).clone() for tensor in state.kv.values]
    state.prompt_embeds = pipe.encode_prompt(BLUE)
    state.text = pipe.engine.text_cache(state.prompt_embeds, state.request)
    pipe.engine.recache(state, RecachePolicy.WINDOW)
    first, second = (
        (after.unflatten(1, (-1, 4)) - old).abs().amax(dim=(0, 2, 3, 4))
        for after, old in zip(state.kv.values, before, strict=True)
    )
    assert first.max() < 1e-5
    assert (second[:3] == 0).all()
    assert (second[3:] > 1e-3).all()


@pytest.mark.parametrize("chunks", range(1, 6))
def test_sinks_are_rebuilt_until_frames_have_been_dropped(pipe, ask, collect, chunks):
    """While the rebuilt window starts at frame 0 it holds the sinks, so keeping them has no meaning yet."""
    frames = []
    for policy in (RecachePolicy.WINDOW, RecachePolicy.ALL):
        state = pipe.start(ask(seed=5))
        collect(state, chunks=chunks)
        state.submit(PromptControl(prompt=BLUE, recache=policy))
        frames.append(collect(state, chunks=2))
    fits = state.kv.layout.capacity_frames >= 3 * chunks
    assert torch.equal(*frames) == fits


@pytest.mark.parametrize("chunks", [1, 5])
def test_recache_of_one_chunk_with_the_same_prompt_changes_nothing(build_pipeline, chunks):
    """Re-caching sees all kept frames at once, as committing one chunk does; more chunks differ."""
    pipe = build_pipeline(sink_frames=0, window_frames=0)
    plain = [chunk.frames for chunk in pipe.stream(RED, num_frames=9 + 12 * chunks)]
    state = pipe.start(pipe.request(RED, num_frames=9 + 12 * chunks))
    state.submit(PromptControl(prompt=RED), not_before=9 + 12 * (chunks - 1))
    for expected, chunk in zip(plain, pipe.run(state), strict=True):
        torch.testing.assert_close(chunk.frames, expected, rtol=0, atol=1e-5)


def test_recache_leaves_a_single_layer_as_it_was(build_pipeline):
    """The keys of a single layer do not depend on what else is seen."""
    pipe = build_pipeline(layers=1)
    state = pipe.start(pipe.request(RED))
    for _ in range(5):
        pipe.step(state)
    before = {name: tensor.clone() for name, tensor in state.kv.tensors().items()}
    pipe.engine.recache(state, RecachePolicy.WINDOW)
    for name, tensor in state.kv.tensors().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-5)


def test_a_step_that_fails_leaves_the_stream_as_it_was(pipe, ask, collect, monkeypatch):
    def run(fail_at):
        state = pipe.start(ask(num_frames=57, seed=5))
        state.submit(PromptControl(prompt=BLUE, blend_chunks=2), not_before=21)
        frames = []
        while not state.finished:
            if state.chunk_index == fail_at:
                with monkeypatch.context() as patch, pytest.raises(MemoryError):
                    patch.setattr(pipe.vae, "decode_chunk", fail)
                    pipe.step(state)
            frames.append(pipe.step(state).frames)
        return torch.cat(frames, dim=2), state.log

    def fail(latents, state):
        raise MemoryError

    expected, log = run(None)
    for fail_at in range(5):
        frames, failed_log = run(fail_at)
        assert_same(frames, expected)
        assert failed_log == log


def test_a_control_that_does_not_fit_is_dropped(pipe, ask, collect):
    expected = ask(num_frames=33, seed=5)
    state = pipe.start(expected)
    state.submit(PromptControl(prompt="red " * 30))
    kept = state.submit(PromptControl(prompt=BLUE), not_before=21)
    with pytest.raises(ValueError, match="prompt must have at most 12 tokens, got 31"):
        pipe.step(state)
    frames = collect(state)
    assert [item.sequence for item in state.log] == [kept]
    assert_same(frames[:, :, :21], collect(pipe.start(expected))[:, :, :21])


def test_broken_weights_never_reach_cache_or_video(build_pipeline):
    pipe = build_pipeline()
    expected = [chunk.frames for chunk in pipe.stream(RED, num_frames=45)]
    state = pipe.start(pipe.request(RED, num_frames=45))
    bias = pipe.transformer.proj_out.bias
    good = bias.detach().clone()
    for index, frames in enumerate(expected):
        bias.data.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match=f"chunk {index} .*float32"):
            pipe.step(state)
        bias.data.copy_(good)
        assert_same(pipe.step(state).frames, frames)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match=str(seed)):
        ResetControl(seed=seed)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": " "},
        {},
        {"prompt": RED, "blend_chunks": 0},
        {"prompt": RED, "recache": "window"},
        {"prompt": RED, "prompt_embeds": torch.zeros(1, 12, 16)},
        {"prompt_embeds": torch.zeros(12, 16)},
        {"prompt_embeds": torch.full((1, 12, 16), torch.nan)},
    ],
)
def test_bad_prompt_control(arguments):
    with pytest.raises(ValueError, match=r"prompt must|blend_chunks must|recache must|prompt_embeds"):
        PromptControl(**arguments)


@pytest.mark.parametrize("control", ALL, ids=lambda control: type(control).__name__)
def test_controls_survive_json(control):
    assert from_json(to_json(control)) == control


def test_unknown_kind():
    with pytest.raises(ValueError, match="'Jump'"):
        from_json({"kind": "Jump"})


def test_controls_from_other_threads(pipe, ask):
    """Nothing is lost or counted twice while steps run."""
    state = pipe.start(ask())

    def submit():
        for _ in range(300):
            state.submit(PromptControl(prompt=BLUE, recache=RecachePolicy.NOTHING), not_before=10**9)
            state.submit(ResumeControl())

    threads = [Thread(target=submit) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        pipe.step(state)
    pipe.step(state)
    numbers = [item.sequence for item in (*state.log, *state.pending)]
    assert sorted(numbers) == list(range(1, 1801))
    assert len(state.pending) == 900


def test_frames_that_are_not_finite_are_never_given(build_pipeline):
    pipe = build_pipeline()
    expected = [chunk.frames for chunk in pipe.stream(RED, num_frames=45)]
    state = pipe.start(pipe.request(RED, num_frames=45))
    weight = next(pipe.vae.decoder.parameters())
    good = weight.detach().clone()
    for index, frames in enumerate(expected):
        weight.data.fill_(float("nan"))
        message = rf"frames of chunk {index} .* the VAE or its dtype .*float32"
        with pytest.raises(NonFiniteError, match=message):
            pipe.step(state)
        weight.data.copy_(good)
        assert_same(pipe.step(state).frames, frames)


@pytest.mark.parametrize("wrong", [1.5, True, float("nan"), "2"])
def test_numbers_that_are_not_whole(build_pipeline, wrong):
    pipe = build_pipeline()
    with pytest.raises(ValueError, match="blend_chunks must be a whole number"):
        PromptControl(prompt=RED, blend_chunks=wrong)
    for seed in (wrong, [wrong]):
        with pytest.raises(ValueError, match="seed must be a whole number"):
            pipe.request(RED, seed=seed)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        ResetControl(seed=wrong)
    state = pipe.start(pipe.request(RED))
    with pytest.raises(ValueError, match="not_before must be a whole number"):
        state.submit(StopControl(), not_before=wrong)
    assert not state.pending


@pytest.mark.parametrize("prompt", [None, [RED, BLUE], 5])
def test_a_prompt_control_has_one_text(prompt):
    with pytest.raises(ValueError, match="prompt must be one text for the whole batch, got"):
        PromptControl(prompt=prompt)


def test_whole_numbers_of_numpy(build_pipeline, tmp_path):
    pipe = build_pipeline()
    sizes = {"num_frames": 9, "height": 32, "width": 32, "seed": 3}
    whole = {name: np.int64(value) for name, value in sizes.items()}
    expected, state = pipe.stream(RED, **sizes), pipe.start(pipe.request(RED, **whole))
    pipe.save_state(state, tmp_path / "stream.safetensors")
    assert_same(next(pipe.run(state)).frames, next(expected).frames)
