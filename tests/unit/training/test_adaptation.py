"""Causal adaptation: sampling paths of a teacher, and students that follow them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from retraining import retrain

from genstream.cache.layout import CacheLayout, PositionPolicy
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler, FlowEulerScheduler
from genstream.streaming.engine import CacheEngine
from genstream.training import adaptation
from genstream.training.adaptation import AdaptationSettings, AdaptationTrainee, adapt_teacher
from genstream.training.denoiser import Denoiser, DenoiserSettings
from genstream.training.forcing import draw_context
from genstream.training.objectives import guided
from genstream.training.processes import own_rng
from genstream.training.trajectories import Sampling, Trajectories, collect, solve, stream

MODEL = DenoiserSettings(width=48, layers=1, ffn_width=48, text_width=16, text_layers=1)
TINY = {
    "trajectories": 20,
    "num_steps": 2,
    "substeps": 2,
    "chunk_frames": 1,
    "window_chunks": 1,
    "total_steps": 4,
    "batch_size": 2,
    "checkpoint_steps": 2,
    "evaluate_steps": 2,
    "precision": "fp32",
}
SAMPLING = Sampling(num_steps=4, substeps=3, shift=5.0, guidance_scale=2.0)


class Killed(Exception):
    pass


class Straight:
    """A teacher that knows the clean sample: `told` with a prompt, 0 without; its paths are straight."""

    def __init__(self, told: float) -> None:
        self.told = told

    def embed(self, captions):
        return torch.tensor([self.told if caption else 0.0 for caption in captions])

    def velocity(self, x, sigma, embeds):
        return (x - embeds.view(-1, 1, 1, 1, 1)) / sigma[:, None, :, None, None]


def test_paths_go_from_noise_to_what_guidance_makes_of_the_sample():
    noise = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    states = solve(Straight(1.5), noise, ["a", "b"], SAMPLING)
    assert states.shape == (2, 5, 4, 3, 2, 2)
    end = guided(torch.tensor(1.5), torch.tensor(0.0), 2.0)
    for state, sigma in zip(states.unbind(1), SAMPLING.sigmas, strict=True):
        torch.testing.assert_close(state, (1 - sigma) * end + sigma * noise, rtol=1e-6, atol=1e-6)


def test_a_path_is_what_the_pipeline_samples():
    torch.manual_seed(0)
    teacher = Denoiser.new(MODEL, 4).eval()
    with torch.no_grad():
        for weight in teacher.transformer.proj_out.parameters():
            weight.normal_(std=0.3)
    noise = torch.randn(1, 4, 3, 16, 16)
    path = solve(teacher, noise, ["a red circle"], SAMPLING)
    schedule = FlowEulerScheduler(num_steps=12, shift=5.0).schedule()
    x = noise
    with torch.no_grad():
        for step, sigma in enumerate(schedule.sigmas):
            levels = torch.full((1, 3), sigma)
            told, untold = (
                teacher.velocity(x, levels, teacher.embed([text])) for text in ("a red circle", "")
            )
            x = schedule.advance(step, x, guided(told, untold, 2.0), lambda: None)
    torch.testing.assert_close(path[:, -1], x, rtol=1e-4, atol=1e-4)


def test_shards_are_sampled_once_and_keep_their_captions(tmp_path):
    asked = []

    def sample(first, count):
        asked.append((first, count))
        states = torch.arange(first, first + count).view(-1, 1, 1, 1, 1, 1).float()
        return Trajectories([f"path {first + number}, of many" for number in range(count)], states)

    whole = collect(sample, 20, tmp_path)
    assert asked == [(0, 16), (16, 4)]
    (tmp_path / "000016-000020.safetensors").unlink()
    again = collect(sample, 20, tmp_path)
    assert asked[2:] == [(16, 4)]
    assert again.captions == whole.captions == [f"path {number}, of many" for number in range(20)]
    assert torch.equal(again.states, whole.states)
    assert torch.equal(whole.states.flatten(), torch.arange(20).half())


@pytest.fixture
def causal_teacher(build_pipeline):
    """A pipeline that streams in chunks of two latent frames."""
    torch.manual_seed(0)
    denoiser = Denoiser.new(MODEL, 4).eval()
    with torch.no_grad():
        for weight in denoiser.transformer.proj_out.parameters():
            weight.normal_(std=0.3)
    return CausalVideoPipeline(
        denoiser.tokenizer,
        denoiser.text_encoder,
        denoiser.transformer,
        build_pipeline().vae,
        FewStepScheduler(steps=[1000.0, 500.0], shift=3.0),
        chunk_frames=2,
        sink_frames=2,
        window_frames=2,
        positions="window",
        guidance_scale=2.0,
        text_tokens=32,
        default_height=64,
        default_width=64,
    )


@pytest.mark.parametrize(("context", "guidance"), [("clean", 2.0), ("fused", 1.0), ("recompute", 2.0)])
def test_paths_of_a_causal_teacher_are_its_streams(causal_teacher, context, guidance):
    """Where they end is what the pipeline streams with as many Euler steps; each state follows from noise."""
    causal_teacher.register_to_config(context=context, guidance_scale=guidance)
    sampling = Sampling(num_steps=2, substeps=3, shift=5.0, guidance_scale=guidance)
    states = stream(causal_teacher, ["a red circle", "a blue square"], [5, 7], 4, sampling)
    assert states.shape[:4] == (2, 3, 4, 8)
    causal_teacher.scheduler = FlowEulerScheduler(num_steps=6, shift=5.0)
    request = causal_teacher.request("a blue square", num_frames=29, seed=7, guidance_scale=guidance)
    chunks = list(causal_teacher.run(causal_teacher.start(request)))
    streamed = torch.cat([chunk.latents for chunk in chunks], dim=2)
    torch.testing.assert_close(states[1:, -1], streamed, rtol=1e-4, atol=1e-4)
    for start in range(0, 8, 2):
        noise = request.noise.initial(start, streamed[:, :, :2].shape)
        assert torch.equal(states[1:, 0, :, start : start + 2], noise)


def test_states_of_a_causal_teacher_lie_at_the_levels_of_the_student(causal_teacher, monkeypatch):
    """With a velocity that leads straight to 0, the states are noise times their levels."""
    monkeypatch.setattr(CacheEngine, "predict", lambda self, x, timestep, state: x * 1000 / timestep)
    sampling = Sampling(num_steps=4, substeps=3, shift=5.0, guidance_scale=1.0)
    states = stream(causal_teacher, ["a red circle"], [5], 2, sampling)
    for state, sigma in zip(states.unbind(1), sampling.sigmas, strict=True):
        torch.testing.assert_close(state, sigma * states[:, 0], rtol=1e-4, atol=1e-4)


def trainee_for(frames=6, **changes) -> AdaptationTrainee:
    torch.manual_seed(0)
    settings = AdaptationSettings(**{**TINY, "num_steps": 4, **changes})
    noise = torch.randn(20, 4, frames, 4, 4)
    clean = torch.randn(1, 4, 1, 1, 1).expand_as(noise)
    sigmas = Sampling(num_steps=4, substeps=1, shift=2.0, guidance_scale=1.0).sigmas
    states = torch.stack([(1 - sigma) * clean + sigma * noise for sigma in sigmas], dim=1)
    paths = Trajectories([f"a red circle {number}" for number in range(20)], states)
    sizes = range(1, settings.chunk_frames + 1)
    return AdaptationTrainee(settings, Denoiser.new(MODEL, 4), paths, sigmas, sizes)


class Knowing(torch.nn.Module):
    """A student that predicts exactly what a straight path asks for."""

    def __init__(self, paths: Trajectories) -> None:
        super().__init__()
        self.transformer = Denoiser.new(MODEL, 4).transformer
        self.line = (paths.states[:, 0] - paths.states[:, -1]).float()

    def embed(self, captions):
        self.asked = [int(caption.rsplit(" ", 1)[1]) for caption in captions]

    def velocity(self, x, sigma, text, positions, mask):
        assert x.shape[2] == sigma.shape[1] == len(positions) == len(mask)
        return self.line[self.asked][:, :, self.frames]


@pytest.mark.parametrize("objective", ["ode", "multistep"])
@pytest.mark.parametrize("forcing", ["teacher", "diffusion"])
@pytest.mark.parametrize("random_masks", [False, True])
def test_a_student_that_follows_the_paths_has_no_loss(objective, forcing, random_masks, monkeypatch):
    trainee = trainee_for(objective=objective, forcing=forcing, window_chunks=2, random_masks=random_masks)
    student, draw = Knowing(trainee.paths), trainee._sequence

    def drawn(rng):
        sequence = draw(rng)
        student.frames = [*sequence.clean_frames, *sequence.noisy_frames]
        return sequence

    monkeypatch.setattr(trainee, "_sequence", drawn)
    trainee.module = student
    for step in range(20):
        assert trainee._loss(np.random.default_rng(step), range(20)).item() < 1e-9


def test_chunks_see_what_the_stream_shows_them():
    trainee = trainee_for(frames=6, window_chunks=2, random_masks=True)
    seen = set()
    for step in range(300):
        sequence = trainee._sequence(np.random.default_rng(step))
        assert not sequence.clean
        target = sequence.noisy[-1]
        starts = [sequence.noisy[index].frames.start for index in target.sees]
        window = [start for start in starts if start or target.frames.start <= 2]
        assert window == list(range(target.frames.start - len(window), target.frames.start))
        seen.add((target.frames.start, tuple(starts)))
    assert {(5, (0, 3, 4)), (5, (3, 4)), (5, (4,)), (5, (0, 4)), (0, ())} <= seen


def test_random_masks_show_what_the_caches_of_all_chunk_sizes_show(monkeypatch):
    trainee = trainee_for(frames=13, chunk_frames=3, window_chunks=2, random_masks=True, forcing="teacher")
    contexts, far = [], set()
    monkeypatch.setattr(
        adaptation, "draw_context", lambda *given: contexts.append(draw_context(*given)) or contexts[-1]
    )
    for step in range(300):
        sequence = trainee._sequence(np.random.default_rng(step))
        context, target = contexts[-1], sequence.noisy[-1]
        size, sink = context.chunk_frames, context.chunk_frames * context.sink
        assert len(target.frames) == size and target.frames.stop <= 13
        layout = CacheLayout(
            chunk_frames=size,
            sink_frames=sink,
            window_frames=size * context.window_chunks,
            positions=PositionPolicy.WINDOW,
        )
        start, stop = target.frames.start, target.frames.stop
        kept = {*range(min(sink, start)), *layout.kept(start, stop)}
        pieces = [sequence.clean[index] for index in target.sees]
        assert {frame for piece in pieces for frame in piece.frames} == kept
        sinks = layout.sink_positions(stop)
        for piece in pieces:
            in_stream = sinks.start if sink and piece.frames.start == 0 else piece.frames.start
            assert target.positions.start - piece.positions.start == start - in_stream
        if target.positions != target.frames:
            far.add(size)
    assert {context.chunk_frames for context in contexts} == far == {1, 2, 3}


def test_a_context_that_is_given_is_clean_but_for_its_noise():
    trainee = trainee_for(forcing="teacher", context_noise=0.5, window_chunks=2, batch_size=64)
    seen = []

    def velocity(x, sigma, text, positions, mask):
        seen.append((x, sigma))
        return x

    trainee.module.velocity = velocity
    for step in range(20):
        sequence = trainee._sequence(own_rng(trainee.settings.seed, step))
        trainee.loss(step)
        x, sigma = seen.pop()
        clean = len(sequence.clean_frames)
        assert (sigma[:, :clean] == 0).all() and (sigma[:, clean:] > 0).all()
        if clean:
            deviation = (x[:, :, :clean] - trainee.paths.states[0, -1, :, :1]).flatten(1).std(dim=1)
            assert deviation.max() < 0.6 and deviation.max() > 0.4 and deviation.min() < 0.1


@pytest.mark.parametrize("objective", ["ode", "multistep"])
@pytest.mark.parametrize("forcing", ["teacher", "diffusion"])
def test_loss_falls(objective, forcing):
    trainee = trainee_for(objective=objective, forcing=forcing, batch_size=8)
    before = trainee.evaluate()["loss"]
    optimizer = torch.optim.AdamW(trainee.module.transformer.parameters(), lr=5e-3)
    for step in range(25):
        optimizer.zero_grad()
        trainee.loss(step)[0].backward()
        optimizer.step()
    assert trainee.evaluate()["loss"] < 0.8 * before


@pytest.fixture(scope="module")
def teacher(build_pipeline, tmp_path_factory):
    """Folder of a teacher that sees three latent frames."""
    folder = tmp_path_factory.mktemp("teacher")
    pipe = build_pipeline(chunk_frames=3, sink_frames=0, window_frames=0, guidance_scale=2.0)
    denoiser = Denoiser.new(MODEL, 4)
    CausalVideoPipeline(
        denoiser.tokenizer,
        denoiser.text_encoder,
        denoiser.transformer,
        pipe.vae,
        FlowEulerScheduler(num_steps=4, shift=3.0),
        chunk_frames=3,
        window_frames=0,
        guidance_scale=2.0,
        text_tokens=32,
        default_height=64,
        default_width=64,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("objective", ["ode", "multistep"])
def test_a_run_leaves_a_causal_student(teacher, tmp_path, objective):
    settings = AdaptationSettings(**TINY, teacher=str(teacher), objective=objective)
    adapt_teacher(settings, tmp_path / "causal")
    pipe = CausalVideoPipeline.from_pretrained(tmp_path / "causal" / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.settings.chunk_frames, pipe.settings.sink_frames, pipe.settings.window_frames) == (1, 1, 1)
    assert pipe.settings.guidance_scale == 1
    assert isinstance(pipe.scheduler, FewStepScheduler if objective == "ode" else FlowEulerScheduler)
    assert pipe.scheduler.config.shift == 3.0
    assert len(pipe.scheduler.schedule().timesteps) == 2
    frames = pipe("a red circle", num_frames=17, output_type="pt").frames
    assert frames.shape == (1, 17, 3, 64, 64)
    record = json.loads((tmp_path / "causal" / "model" / "training" / "causal.json").read_text())
    assert record["command"].startswith("genstream distill causal --teacher ")


def test_a_causal_teacher_teaches_fewer_steps_without_guidance(causal_teacher, tmp_path):
    causal_teacher.save_pretrained(tmp_path / "teacher")
    settings = {**TINY, "chunk_frames": 2, "stream_chunks": 4, "forcing": "teacher", "context_noise": 0.1}
    settings["teacher"] = str(tmp_path / "teacher")
    adapt_teacher(AdaptationSettings(**settings), tmp_path / "causal")
    pipe = CausalVideoPipeline.from_pretrained(tmp_path / "causal" / "model")
    assert pipe.settings == replace(causal_teacher.settings, guidance_scale=1.0)
    assert pipe.scheduler.config.steps == [1000.0, 500.0]
    with pytest.raises(ValueError, match="chunk_frames must be 2 like the causal teacher's, got 1"):
        adapt_teacher(AdaptationSettings(**{**settings, "chunk_frames": 1}), tmp_path / "other")


@pytest.mark.parametrize(
    ("index", "changes", "error"),
    [
        ({"engine": "queue"}, {}, "engine of teacher must be 'cache', .* got 'queue'"),
        ({"independent_first_frame": True}, {}, "independent_first_frame of teacher must be False, .* True"),
        ({"context": "last_step"}, {}, "context of teacher must be 'clean' or .* got 'last_step'"),
        (
            {"context": "recompute", "sink_frames": 0},
            {},
            "sink_frames of teacher must be above 0 for context",
        ),
        ({"past_weight": 0.5}, {}, "past_weight of teacher must be 1.0, .* got 0.5"),
        ({"context_timestep": 9.0}, {}, "context_timestep of teacher must be 0.0, .* got 9.0"),
        (
            {"context": "fused", "guidance_scale": 1.0},
            {"guidance_scale": 2.0},
            "context 'fused' .* guidance_scale must be 1, got 2.0",
        ),
    ],
)
def test_teachers_that_stream_as_no_student_is_trained_to_are_refused_before_they_are_loaded(
    causal_teacher, tmp_path, monkeypatch, index, changes, error
):
    causal_teacher.register_to_config(**index)
    causal_teacher.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(adaptation, "load_model", None)
    own = {"teacher": str(tmp_path / "teacher"), "chunk_frames": 2}
    with pytest.raises(ValueError, match=error):
        adapt_teacher(AdaptationSettings(**{**TINY, **own, **changes}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


SHOWN = "the sink, window_chunks = {} and the current one, got"


@pytest.mark.parametrize(
    ("folder", "changes", "error"),
    [
        (
            "causal",
            ({"stream_chunks": 3}, {"stream_chunks": 2}),
            f"stream_chunks must be at least 3, {SHOWN} 2",
        ),
        (
            "causal",
            ({"window_chunks": 4}, {"window_chunks": 5}),
            f"stream_chunks must be at least 7, {SHOWN} 6",
        ),
        (
            "causal",
            [{"window_chunks": 0, "stream_chunks": chunks} for chunks in (2, 1)],
            f"stream_chunks must be at least 2, {SHOWN} 1",
        ),
        ("whole", ({}, {"window_chunks": 2}), f"chunks of 2 frames must be at least 4, {SHOWN} 3"),
        ("whole", ({}, {"chunk_frames": 3}), f"chunks of 3 frames must be at least 3, {SHOWN} 2"),
    ],
)
def test_paths_show_all_that_the_student_will_stream_in(
    causal_teacher, tmp_path, monkeypatch, folder, changes, error
):
    """What is too short is refused before anything is loaded."""
    if folder == "whole":
        causal_teacher.register_to_config(chunk_frames=6, sink_frames=0, window_frames=0)
    causal_teacher.save_pretrained(tmp_path / "teacher")
    own = {**TINY, "teacher": str(tmp_path / "teacher"), "chunk_frames": 2}
    monkeypatch.setattr(adaptation, "load_model", None)
    enough, settings = (AdaptationSettings(**{**own, **change}) for change in changes)
    with pytest.raises(ValueError, match=error.format(settings.window_chunks)):
        adapt_teacher(settings, tmp_path / "run")
    with pytest.raises(TypeError, match="not callable"):
        adapt_teacher(enough, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_paths_of_another_teacher_are_not_mixed_with_those_before(teacher, tmp_path, monkeypatch):
    def killed(*given):
        raise Killed

    shutil.copytree(teacher, tmp_path / "teacher")
    settings = AdaptationSettings(**TINY, teacher=str(tmp_path / "teacher"))
    monkeypatch.setattr(adaptation, "run", killed)
    with pytest.raises(Killed):
        adapt_teacher(settings, tmp_path / "run")
    retrain(tmp_path / "teacher" / "transformer")
    with pytest.raises(ValueError, match="teacher must hold what the run in"):
        adapt_teacher(settings, tmp_path / "run")


def test_paths_of_changed_prompts_are_not_mixed_with_those_before(teacher, tmp_path, monkeypatch):
    def killed(*given):
        raise Killed

    (tmp_path / "prompts.txt").write_text("a red circle")
    settings = AdaptationSettings(**TINY, teacher=str(teacher), prompts=str(tmp_path / "prompts.txt"))
    monkeypatch.setattr(adaptation, "run", killed)
    with pytest.raises(Killed):
        adapt_teacher(settings, tmp_path / "run")
    (tmp_path / "prompts.txt").write_text("a blue circle")
    with pytest.raises(
        ValueError, match=r"prompts must hold what the run in '.*' is made from, .* in '.*prompts\.txt'"
    ):
        adapt_teacher(settings, tmp_path / "run")


@pytest.mark.parametrize(("folder", "sizes"), [("teacher", [1, 2]), ("causal", [2])])
def test_chunks_of_a_causal_teacher_keep_their_size(causal_teacher, tmp_path, monkeypatch, folder, sizes):
    """Those of a clip that was made at once can be smaller."""
    causal_teacher.save_pretrained(tmp_path / "causal")
    causal_teacher.register_to_config(chunk_frames=6, sink_frames=0, window_frames=0)
    causal_teacher.save_pretrained(tmp_path / "teacher")
    trainees = []
    monkeypatch.setattr(adaptation, "run", lambda loop, trainee, output: trainees.append(trainee))
    monkeypatch.setattr(adaptation, "export", lambda *given: None)
    changes = {"chunk_frames": 2, "random_masks": True, "stream_chunks": 3 if folder == "causal" else 6}
    settings = AdaptationSettings(**{**TINY, **changes, "teacher": str(tmp_path / folder)})
    adapt_teacher(settings, tmp_path / "run")
    assert list(trainees[0].sizes) == sizes


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"forcing": "self"}, "forcing must be 'teacher' or 'diffusion', got 'self'"),
        ({"context_noise": -1.0}, r"context_noise must be at least 0 and finite, got -1\.0"),
        ({"context_noise": 0.1}, r"context_noise must be 0 for forcing 'diffusion', got 0\.1"),
        ({"stream_chunks": 0}, "stream_chunks must be at least 1, got 0"),
        ({"objective": "dmd"}, "objective must be 'ode' or 'multistep', got 'dmd'"),
        ({"trajectories": 16}, "trajectories must be more than 16, which are kept for evaluation, got 16"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"substeps": 0}, "substeps must be at least 1, got 0"),
        ({"window_chunks": -1}, "window_chunks must be at least 0, got -1"),
        ({"window_chunks": 0, "random_masks": True}, "window_chunks must be at least 1, got 0"),
        ({"guidance_scale": 0.5}, r"guidance_scale must be at least 1 \(off\) and finite, got 0.5"),
    ],
)
def test_bad_settings(wrong, error):
    with pytest.raises(ValueError, match=error):
        AdaptationSettings(**wrong)


def test_what_does_not_fit_is_refused_before_the_run_starts(teacher, tmp_path):
    for wrong, error in (
        (
            {"teacher": "nowhere"},
            "teacher must be an installed model or the folder of a model or of a finished run, got 'nowhere'",
        ),
        ({"prompts": "nowhere.txt"}, "prompts must be a text file, got 'nowhere.txt'"),
        ({"chunk_frames": 2}, "chunk_frames must divide 3, the teacher's frames, got 2"),
    ):
        with pytest.raises(ValueError, match=error):
            adapt_teacher(AdaptationSettings(**{**TINY, "teacher": str(teacher), **wrong}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
