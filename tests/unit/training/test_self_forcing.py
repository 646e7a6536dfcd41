"""Distillation by self forcing: who learns when, from which piece of a stream; and a whole run."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from retraining import retrain
from small_videos import write_video

from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler, FlowEulerScheduler
from genstream.training import self_forcing
from genstream.training.adaptation import AdaptationSettings, adapt_teacher
from genstream.training.correctors import Discriminator, Matching
from genstream.training.denoiser import Denoiser, for_training
from genstream.training.memory import distillation_memory
from genstream.training.prompts import Asked, ScenePrompts, TextPrompts
from genstream.training.self_forcing import (
    Distillation,
    SelfForcingSettings,
    SelfForcingTrainee,
    check_models,
    distill_student,
)
from genstream.training.student import StudentTrainingSettings, train_student
from genstream.training.teacher import TeacherTrainingSettings, train_teacher
from genstream.transformer.causal_dit import CausalDiT
from genstream.vae.tiny import TinyVideoVAE

MODEL = {"width": 48, "layers": 1, "ffn_width": 48, "text_width": 16, "text_layers": 1}
TINY = {
    "total_steps": 9,
    "critic_steps": 2,
    "batch_size": 2,
    "stream_chunks": 5,
    "checkpoint_steps": 3,
    "evaluate_steps": 3,
    "log_steps": 3,
    "precision": "fp32",
}
STREAM = StudentTrainingSettings(**MODEL, chunk_frames=1, window_chunks=1, steps=(1000.0, 500.0))
HORIZON = 3


def vae():
    return TinyVideoVAE(latent_channels=4, encoder_width=8, decoder_widths=(8, 8, 8, 8), first_frame_copies=3)


def pipeline_of(student) -> CausalVideoPipeline:
    return CausalVideoPipeline(
        student.tokenizer,
        student.text_encoder,
        student.transformer,
        vae(),
        FewStepScheduler(steps=STREAM.steps, shift=STREAM.shift),
        chunk_frames=1,
        sink_frames=1,
        window_frames=1,
        positions="window",
        text_tokens=student.text_tokens,
        default_height=128,
        default_width=128,
    )


class Described(ScenePrompts):
    """Prompts with pieces of noise in place of clips."""

    def draw(self, count, rng):
        return replace(super().draw(count, rng), pieces=torch.randn(count, 4, HORIZON, 16, 16))


def trainee_for(context=None, **changes) -> SelfForcingTrainee:
    torch.manual_seed(0)
    student, critic, teacher = (for_training(Denoiser.new(STREAM, 4)) for _ in range(3))
    settings = SelfForcingSettings(**{**TINY, **changes})
    judge = Discriminator(critic) if settings.objective == "gan" else critic
    return SelfForcingTrainee(
        settings,
        Distillation(student, judge),
        settings.corrector(STREAM.shift, teacher, context),
        (Described(), Described()),
        pipeline_of(student),
        HORIZON,
    )


def learning(trainee) -> set[str]:
    """What has a gradient, and whether in the text encoder."""
    parts = [("", trainee.module)]
    if isinstance(trainee.corrector, Matching):
        parts.append(("teacher.", trainee.corrector.teacher))
    return {
        (prefix + name).split(".")[0] + (".text_encoder" if "text_encoder" in name else "")
        for prefix, module in parts
        for name, weight in module.named_parameters()
        if weight.grad is not None and weight.grad.any()
    }


@pytest.mark.parametrize("objective", ["dmd", "sid", "gan"])
def test_the_critic_learns_always_and_the_student_in_its_turns(objective):
    trainee = trainee_for(objective=objective)
    for step in range(6):
        trainee.module.zero_grad()
        loss, parts = trainee.loss(step)
        loss.backward()
        both = ["student", "critic"] if objective == "dmd" else ["student"]
        names = both if step % 3 == 0 else ["critic"]
        assert list(parts) == names
        assert learning(trainee) == set(names)


@pytest.mark.parametrize("objective", ["dmd", "sid", "gan"])
@pytest.mark.parametrize("shared", [False, True])
def test_text_encoders_read_captions_once_a_step_and_nothing_once_a_run(monkeypatch, objective, shared):
    trainee, embed, asked = trainee_for(objective=objective), Denoiser.embed, []
    judge = trainee.module.critic.denoiser if objective == "gan" else trainee.module.critic
    others = [trainee.corrector.teacher] if objective != "gan" else []
    for other in [*others, trainee.module.student] if shared else others:
        other.text_encoder, other.tokenizer = judge.text_encoder, judge.tokenizer

    def noted(denoiser, captions):
        asked.append((denoiser.text_encoder, tuple(captions)))
        return embed(denoiser, captions)

    monkeypatch.setattr(Denoiser, "embed", noted)
    for step in range(6):
        trainee.loss(step)
    read = [texts for _, texts in asked if any(texts)]
    pairs = 2 if objective == "gan" else 1  # its captions are those of real and made pieces
    encoders = [trainee.module.student.text_encoder, judge.text_encoder]
    if shared and objective != "gan":
        encoders.pop()
    assert len(read) == 6 * len(encoders)
    assert {len(texts) for texts in read} == {2, 2 * pairs}
    assert len(asked) - len(read) == (objective != "gan")
    asked.clear()
    trainee.evaluate()
    batches = len(asked) / len(encoders)
    trainee.evaluate()
    assert batches == 16  # two lengths of 16 streams, two at once
    assert len(asked) == 2 * 16 * len(encoders)


def test_the_whole_transformer_of_the_student_learns():
    trainee = trainee_for()
    trainee.loss(0)[0].backward()
    for name, weight in trainee.module.student.transformer.named_parameters():
        assert weight.grad is not None, name


@pytest.mark.parametrize("objective", ["dmd", "sid", "gan"])
def test_gradient_checkpointing_changes_nothing_but_memory(objective):
    gradients = []
    for checkpointing in (False, True):
        trainee = trainee_for(objective=objective)
        if checkpointing:
            for part in trainee.module.modules():
                if isinstance(part, CausalDiT):
                    part.enable_gradient_checkpointing()
        torch.manual_seed(3)
        trainee.loss(0)[0].backward()
        gradients.append(
            {name: w.grad for name, w in trainee.module.named_parameters() if w.grad is not None}
        )
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-7)


def test_data_follow_from_the_step():
    trainee, losses = trainee_for(), []
    for step in (0, 3, 1, 0, 1):
        torch.manual_seed(step)
        losses.append(trainee.loss(step)[0].item())
    assert losses[0] == losses[3] != losses[1]
    assert losses[2] == losses[4]


def test_pieces_are_the_ends_of_streams_of_all_lengths(monkeypatch):
    trainee, seen = trainee_for(stream_chunks=6), Counter()

    def rolled(engine, request, exit_step):
        chunks = 1 + (request.num_frames - 1) // 4
        seen[chunks, engine.gradient_from, exit_step] += 1
        return torch.arange(float(chunks)).view(1, 1, -1, 1, 1).expand(len(request.prompt), 4, -1, 16, 16)

    monkeypatch.setattr(self_forcing, "rollout", rolled)
    for step in range(800):
        rng = np.random.default_rng(step)
        piece = trainee._draw_piece(Asked(["a", "b"]), rng, rng)
        assert piece.latents.shape[2] == HORIZON
        stream = torch.cat([piece.past, piece.latents], dim=2)
        assert torch.equal(stream[0, 0, :, 0, 0], torch.arange(float(stream.shape[2])))
    assert {key[:2] for key in seen} == {(3, 0), (4, 1), (5, 2), (6, 3)}
    assert {key[2] for key in seen} == {0, 1}
    assert max(seen.values()) < 1.5 * min(seen.values())  # 100 of each
    seen.clear()
    figures = [trainee_for(stream_chunks=6, total_steps=steps).evaluate() for steps in (3, 5)]
    # The shortest and the longest, as a viewer gets them, 16 of each, no more at once than in a step.
    assert seen == {(3, 3, 1): 16, (6, 6, 1): 16}
    assert figures[0] == figures[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with finished runs of a teacher and a student, and their VAE."""
    folder = tmp_path_factory.mktemp("runs")
    vae().save_pretrained(folder / "vae")
    small = {
        **MODEL,
        "vae": str(folder / "vae"),
        "total_steps": 1,
        "batch_size": 2,
        "clips": 4,
        "evaluation_clips": 4,
        "clip_chunks": 6,
        "chunk_frames": 1,
        "precision": "fp32",
    }
    train_teacher(TeacherTrainingSettings(**small, horizon_chunks=HORIZON), folder / "teacher")
    steps = {"window_chunks": 1, "steps": (1000.0, 500.0)}
    train_student(StudentTrainingSettings(**small, **steps), folder / "student")
    return folder


def settings_for(runs, **changes) -> SelfForcingSettings:
    places = {"teacher": str(runs / "teacher"), "initial": str(runs / "student")}
    clips = {"clips": 8} if changes.get("objective") == "gan" else {}
    return SelfForcingSettings(**{**TINY, **places, **clips, **changes})


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("objective", "teacher"), [("dmd", "teacher"), ("dmd", "student"), ("gan", "teacher")]
)
def test_a_run_that_was_killed_ends_like_one_that_was_not(runs, tmp_path, monkeypatch, objective, teacher):
    settings = settings_for(runs, objective=objective, teacher=str(runs / teacher))
    distill_student(settings, tmp_path / "whole")
    loss = SelfForcingTrainee.loss

    def killed(trainee, step):
        if step == 5:
            raise Killed
        return loss(trainee, step)

    monkeypatch.setattr(SelfForcingTrainee, "loss", killed)
    with pytest.raises(Killed):
        distill_student(settings, tmp_path / "cut")
    monkeypatch.undo()
    distill_student(settings, tmp_path / "cut")
    whole, cut = (
        [row.rsplit(",", 1)[0] for row in (tmp_path / name / "log.csv").read_text().splitlines()]
        for name in ("whole", "cut")
    )
    assert whole == cut
    record = json.loads((tmp_path / "whole" / "model" / "training" / "whole.json").read_text())
    assert record["command"].startswith("genstream distill student --teacher ")
    assert {path.stem for path in (tmp_path / "whole" / "model" / "training").glob("*.json")} == {
        teacher,
        "student",
        "whole",
    }
    pipe = CausalVideoPipeline.from_pretrained(tmp_path / "whole" / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle moves right", num_frames=13, output_type="pt").frames.isfinite().all()
    assert pipe.settings.guidance_scale == 1
    assert (pipe.settings.window_frames, pipe.scheduler.config.shift) == (1, STREAM.shift)
    before = CausalVideoPipeline.from_pretrained(runs / "student" / "model", dtype=torch.float32)
    own, old = pipe.transformer.state_dict(), before.transformer.state_dict()
    assert not all(torch.equal(own[name], old[name]) for name in own)
    told, old_told = pipe.text_encoder.state_dict(), before.text_encoder.state_dict()
    assert all(torch.equal(told[name], old_told[name]) for name in told)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"objective": "vae"}, "objective must be 'dmd', 'sid' or 'gan', got 'vae'"),
        ({"objective": "gan", "prompts": "a.txt"}, "prompts must be None for 'gan', which needs clips"),
        ({"objective": "gan", "smoothness": -1.0}, "smoothness must be at least 0 and finite, got -1.0"),
        ({"smoothness": 0.2}, "smoothness must be left at 0.1 for objective 'dmd', got 0.2"),
        ({"videos": "clips"}, "videos must be left at None for objective 'dmd', got 'clips'"),
        (
            {"objective": "sid", "evaluation_clips": 8},
            "evaluation_clips must be left at None for objective 'sid', got 8",
        ),
        ({"objective": "gan", "evaluation_clips": 3}, "evaluation_clips must be at least 4, got 3"),
        (
            {"objective": "gan", "videos": "clips", "evaluation_clips": 0},
            "evaluation_clips must be at least 1, got 0",
        ),
        ({"objective": "sid", "clips": 8}, "clips must be left at 3072 for objective 'sid', got 8"),
        ({"objective": "dmd", "sid_alpha": 0.5}, "sid_alpha must be left at 1.0 for objective 'dmd'"),
        (
            {"objective": "gan", "teacher_guidance": 2.0},
            "teacher_guidance must be left at 3.0 for objective 'gan', got 2.0",
        ),
        ({"critic_steps": 0}, "critic_steps must be at least 1, got 0"),
        (
            {"critic_rate": 1e5},
            r"critic_rate must give the critic a learning rate of at most 1, got 10 for 100000\.0",
        ),
        ({"critic_rate": 0.0}, "critic_rate must be a positive number, got 0.0"),
        ({"teacher_guidance": 0.5}, r"teacher_guidance must be at least 1 \(off\) and finite, got 0.5"),
        ({"least_noise": 0.99}, r"in \(0, 1\], the least first, got 0.99 and 0.98"),
        ({"precision": "fp8"}, "precision must be"),
    ],
)
def test_bad_settings(wrong, error):
    with pytest.raises(ValueError, match=error):
        SelfForcingSettings(**wrong)


def test_what_does_not_fit_is_refused_before_the_run_starts(runs, tmp_path):
    (tmp_path / "long.txt").write_text("a red circle\n\n" + "a red circle and " * 20)
    for wrong, error in (
        (
            {"teacher": "nowhere"},
            "teacher must be an installed model or the folder of a model or of a finished run, got 'nowhere'",
        ),
        (
            {"initial": "nowhere"},
            "initial must be an installed model or the folder of a model or of a finished run, got 'nowhere'",
        ),
        ({"prompts": "nowhere.txt"}, "prompts must be a text file, got 'nowhere.txt'"),
        ({"prompts": str(tmp_path / "long.txt")}, "long.txt', line 3: prompt must have at most 32 tokens"),
        (
            {"teacher": runs / "student", "initial": runs / "teacher"},
            "initial must have chunks of 1 like the streaming teacher, got 3",
        ),
        (
            {"teacher": runs / "student", "stream_chunks": 2},
            "stream_chunks must be at least 3, what the teacher sees, got 2",
        ),
        ({"stream_chunks": 2}, "stream_chunks must be at least 3, what the teacher sees, got 2"),
    ):
        with pytest.raises(ValueError, match=error):
            distill_student(replace(settings_for(runs), **wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_read_are_refused(runs, tmp_path):
    folder = changed(runs, tmp_path, teacher_index={"text_encoder": [None, None]})
    for settings, distil in (
        (settings_for(runs, teacher=str(folder / "teacher")), distill_student),
        (AdaptationSettings(teacher=str(folder / "teacher"), chunk_frames=1, window_chunks=1), adapt_teacher),
    ):
        with pytest.raises(ValueError, match="teacher must have a tokenizer and a text encoder"):
            distil(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_chunks_of_streams_are_not_for_teachers_of_whole_clips(runs, tmp_path):
    settings = AdaptationSettings(teacher=str(runs / "teacher"), chunk_frames=1, stream_chunks=7)
    with pytest.raises(ValueError, match="stream_chunks must be left at 6 for a teacher of whole clips"):
        adapt_teacher(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def changed(runs, folder, **files):
    """Copies of teacher and student; each of `teacher_vae` and so on changes a config.json."""
    for name in ("teacher", "student"):
        shutil.copytree(runs / name / "model", folder / name)
        for part in ("index", "vae", "transformer"):
            place = "model_index.json" if part == "index" else f"{part}/config.json"
            path = folder / name / place
            path.write_text(json.dumps(json.loads(path.read_text()) | files.get(f"{name}_{part}", {})))
    return folder


NARROW = {"vae": {"latent_channels": 2}, "transformer": {"in_channels": 2, "out_channels": 2}}


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"teacher_index": {"default_width": 64}}, "default size 128x128 like initial, got 64x128"),
        (
            {f"teacher_{part}": values for part, values in NARROW.items()},
            "latent_channels 4 like initial, got 2",
        ),
        ({"teacher_vae": {"decoder_spatial_strides": [2, 2, 1], "patch_size": 1}}, "_ratio"),
        (
            {
                f"{name}_vae": {"latents_mean": [0.0, 0.0, 0.0, last]}
                for name, last in (("teacher", 1.0), ("student", 0.0))
            },
            r"latents_mean \[0.0, 0.0, 0.0, 0.0\] like initial, got \[0.0, 0.0, 0.0, 1.0\]",
        ),
        ({"student_transformer": {"in_channels": 8}}, "initial must take 4 channels, those of its latents"),
        ({"student_index": {"chunk_frames": 2}}, "initial must have chunks that divide 3"),
        (
            {"teacher_index": {"window_frames": None}},
            "teacher must stream as it was trained: window_frames must be a multiple of 3",
        ),
    ],
    ids=["size", "channels", "ratio", "statistics", "image", "chunks", "window"],
)
def test_a_teacher_of_other_latents_is_refused_by_the_run_and_its_dry_run(runs, tmp_path, files, error):
    folder = changed(runs, tmp_path, **files)
    settings = settings_for(runs, teacher=str(folder / "teacher"), initial=str(folder / "student"))
    for start in (
        lambda: distill_student(settings, tmp_path / "run"),
        lambda: distillation_memory(settings, 1),
    ):
        with pytest.raises(ValueError, match=error):
            start()
    assert not (tmp_path / "run").exists()


FUSED = {"context": "fused", "guidance_scale": 1.0}
OTHER_STREAMS = [
    ({"engine": "queue"}, "engine of {} must be 'cache', which training can follow, got 'queue'"),
    ({"independent_first_frame": True}, "independent_first_frame of {} must be False, .* got True"),
    ({"context": "last_step"}, "context of {} must be 'clean' or .*'recompute', .* got 'last_step'"),
    (
        {"context": "recompute", "sink_frames": 0},
        "sink_frames of {} must be above 0 for context 'recompute', .* got 0",
    ),
]


@pytest.mark.parametrize(
    ("name", "index", "error"),
    [
        *(("initial", *other) for other in OTHER_STREAMS),
        ("initial", FUSED, "context of {} must be 'clean' or 'recompute', .* got 'fused'"),
        *(("teacher", *other) for other in OTHER_STREAMS),
        ("teacher", {"past_weight": 0.5}, "past_weight of {} must be 1.0, .* got 0.5"),
        ("teacher", {"context_timestep": 9}, "context_timestep of {} must be 0.0, .* got 9.0"),
    ],
)
def test_streams_that_training_does_not_follow_are_refused_before_anything_is_loaded(
    runs, tmp_path, monkeypatch, name, index, error
):
    """By the run and by its dry run; streams are those of the student, who may be the teacher of another."""
    folder = changed(runs, tmp_path, student_index=index)
    places = {"teacher": str(runs / "student"), "initial": str(runs / "student")}
    settings = settings_for(runs, **{**places, name: str(folder / "student")})
    monkeypatch.setattr(self_forcing, "load_model", None)
    for start in (
        lambda: distill_student(settings, tmp_path / "run"),
        lambda: distillation_memory(settings, 1),
    ):
        with pytest.raises(ValueError, match=error.format(name)):
            start()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("initial", {"context": "recompute"}),
        ("initial", {"context_timestep": 9.0, "past_weight": 0.5, "positions": "absolute"}),
        ("initial", {"window_frames": None}),
        ("teacher", {"context": "recompute"}),
        ("teacher", FUSED),
    ],
)
def test_streams_that_training_follows(runs, tmp_path, name, index):
    folder = changed(runs, tmp_path, student_index=index)
    places = {"teacher": str(runs / "student"), "initial": str(runs / "student")}
    assert check_models(settings_for(runs, **{**places, name: str(folder / "student")}))


def test_statistics_that_one_folder_does_not_tell_may_be_the_same(runs, tmp_path):
    folder = changed(runs, tmp_path, teacher_vae={"latents_mean": [0.0] * 4, "latents_std": [2.0] * 4})
    settings = settings_for(runs, teacher=str(folder / "teacher"))
    assert check_models(settings).horizon_chunks == HORIZON


def test_a_student_is_made_from_the_models_that_its_record_tells(runs, tmp_path):
    """When it is cut off, and once it is finished."""
    folder = changed(runs, tmp_path)
    settings = settings_for(
        runs, teacher=str(folder / "teacher"), initial=str(folder / "student"), total_steps=1
    )
    run = tmp_path / "run"
    distill_student(settings, run)
    for result in ("model", "elsewhere"):
        for name, setting in (("teacher", "teacher"), ("student", "initial")):
            retrain(folder / name / "transformer")
            with pytest.raises(ValueError, match=f"{setting} must hold what the run in '{run}' is made"):
                distill_student(settings, run)
            retrain(folder / name / "transformer")
        if result == "model":
            (run / "model").rename(run / "elsewhere")
    (run / "elsewhere").rename(run / "model")
    shutil.rmtree(folder / "teacher")
    distill_student(settings, run)


@pytest.mark.parametrize("same", [False, True])
def test_a_text_encoder_that_both_models_have_is_loaded_once(runs, tmp_path, monkeypatch, same):
    folder = changed(runs, tmp_path)
    if same:
        shutil.rmtree(folder / "teacher" / "text_encoder")
        shutil.copytree(folder / "student" / "text_encoder", folder / "teacher" / "text_encoder")
    trainees = []
    monkeypatch.setattr(self_forcing, "run", lambda loop, trainee, output: trainees.append(trainee))
    monkeypatch.setattr(self_forcing, "export", lambda *given: None)
    settings = settings_for(runs, teacher=str(folder / "teacher"), initial=str(folder / "student"))
    distill_student(settings, tmp_path / "run")
    module, teacher = trainees[0].module, trainees[0].corrector.teacher
    assert (module.student.text_encoder is teacher.text_encoder) is same
    assert (module.student.tokenizer is teacher.tokenizer) is same
    assert module.critic.text_encoder is teacher.text_encoder
    assert not any(weight.requires_grad for weight in module.student.text_encoder.parameters())
    before = CausalVideoPipeline.from_pretrained(folder / "student", dtype=torch.float32).text_encoder
    for own, old in zip(module.student.text_encoder.parameters(), before.parameters(), strict=True):
        assert torch.equal(own, old)


@pytest.fixture
def videos(tmp_path):
    """A folder of three videos of two clips each."""
    for index in range(3):
        write_video(tmp_path / "videos" / f"{index}.mp4", 60 * index, 36, captions=f"a red circle {index}")
    return tmp_path / "videos"


def learnt_from_videos(runs, folder):
    """Copies of the models, of which the student's card tells of other clips than those of the toy world."""
    path = changed(runs, folder) / "student" / "model_card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"description": "Learnt from videos."}))
    return {"teacher": str(folder / "teacher"), "initial": str(folder / "student")}


def test_the_real_clips_of_a_discriminator_may_be_those_of_videos(runs, videos, tmp_path, monkeypatch):
    places = learnt_from_videos(runs, tmp_path)
    settings = settings_for(
        runs, objective="gan", videos=str(videos), evaluation_clips=2, clips=3, total_steps=3, **places
    )
    distill_student(settings, tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model_index.json").is_file()
    (videos / "0.txt").write_text("a red circle 0\n ")
    with pytest.raises(ValueError, match=r"videos must hold what the run in '.*run' is made from"):
        distill_student(settings, tmp_path / "run")
    trainees = []
    monkeypatch.setattr(self_forcing, "run", lambda loop, trainee, output: trainees.append(trainee))
    monkeypatch.setattr(self_forcing, "export", lambda *given: None)
    distill_student(settings, tmp_path / "other")
    told = []
    for source in (trainees[0].prompts, trainees[0].held_out):
        asked = source.draw(40, np.random.default_rng(0))
        assert asked.pieces.shape == (40, 4, HORIZON, 16, 16) and asked.pieces.isfinite().all()
        told.append(set(asked.captions))
    assert told[0] and told[1] and not told[0] & told[1]
    assert set.union(*told) == {f"a red circle {index}" for index in range(3)}


def test_what_learnt_from_videos_is_not_shown_the_toy_world(runs, tmp_path, monkeypatch):
    settings = settings_for(runs, objective="gan", **learnt_from_videos(runs, tmp_path))
    monkeypatch.setattr(self_forcing, "load_model", None)
    with pytest.raises(
        ValueError, match="videos must be given for 'gan' where initial has learnt from videos"
    ):
        distill_student(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "student" / "model_card.json").unlink()  # nothing tells
    assert check_models(settings)


def test_videos_that_are_no_use_are_refused_before_the_run_starts(runs, videos, tmp_path):
    own = {"objective": "gan", "videos": str(videos), "evaluation_clips": 2}
    for wrong, error in (
        ({"evaluation_clips": 8}, r"evaluation_clips = 8 clips of 17 frames, .* got 6 clips in 3 videos"),
        ({"videos": str(tmp_path / "nowhere")}, "nowhere"),
    ):
        with pytest.raises(ValueError, match=error):
            distill_student(settings_for(runs, **{**own, **wrong}), tmp_path / "run")
    (videos / "1.txt").write_text("a red circle " * 20)
    with pytest.raises(ValueError, match=r"caption file '.*1\.txt': prompt must have at most 32 tokens"):
        distill_student(settings_for(runs, **own), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompts_from_a_file(runs, tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n a blue elephant \na Zebra, an elephant")
    settings = settings_for(runs, prompts=str(tmp_path / "prompts.txt"), total_steps=1, shift=2.0)
    distill_student(settings, tmp_path / "run")
    pipe = CausalVideoPipeline.from_pretrained(tmp_path / "run" / "model")
    assert pipe.scheduler.config.shift == 2.0
    # Once, though the teacher does not know them either.
    said = "2 words of the prompts are unknown to the text encoder, which takes them all alike: "
    assert [text for text in caplog.messages if "unknown" in text] == [f"{said}elephant, zebra"]


@pytest.mark.parametrize("kind", [FewStepScheduler, FlowEulerScheduler])
def test_another_shift_keeps_sampler_and_steps(runs, tmp_path, kind):
    """Euler steps are those of students that `distill causal --objective multistep` makes."""
    folder = changed(runs, tmp_path)
    steps = {"steps": STREAM.steps} if kind is FewStepScheduler else {"num_steps": 3}
    pipe = CausalVideoPipeline.from_pretrained(folder / "student")
    pipe.scheduler = kind(**steps, shift=STREAM.shift)
    pipe.save_pretrained(folder / "student")
    settings = settings_for(runs, initial=str(folder / "student"), total_steps=1, shift=2.0)
    distill_student(settings, tmp_path / "run")
    distilled = CausalVideoPipeline.from_pretrained(tmp_path / "run" / "model")
    assert type(distilled.scheduler) is kind
    assert distilled.scheduler.schedule() == kind(**steps, shift=2.0).schedule()


def test_prompts_are_the_lines_of_a_file_as_an_editor_shows_them(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red circle\r\n\r\na blue\u2028square\r\na star".encode())
    assert TextPrompts(path).lines == ["a red circle", "a blue\u2028square", "a star"]


def test_a_run_goes_on_with_the_prompts_that_it_began_with(runs, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle")
    settings = settings_for(runs, prompts=str(tmp_path / "prompts.txt"), total_steps=1)

    def killed(*given):
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(self_forcing, "export", killed)
        with pytest.raises(Killed):
            distill_student(settings, tmp_path / "run")
    (tmp_path / "prompts.txt").write_text("a blue circle")
    with pytest.raises(
        ValueError, match=r"prompts must hold what the run in '.*' is made from, .* in '.*prompts\.txt'"
    ):
        distill_student(settings, tmp_path / "run")
    (tmp_path / "prompts.txt").write_text("a red circle")
    distill_student(settings, tmp_path / "run")
