"""Training of the teacher, on random latents and end to end."""

import json

import numpy as np
import pytest
import torch
from retraining import retrain

from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.training.denoiser import Denoiser
from genstream.training.model_run import _origins
from genstream.training.student import StudentTrainingSettings, train_student
from genstream.training.teacher import TeacherTrainee, TeacherTrainingSettings, train_teacher

TINY = {
    "total_steps": 4,
    "batch_size": 2,
    "clips": 5,
    "evaluation_clips": 4,
    "clip_chunks": 5,
    "chunk_frames": 1,
    "horizon_chunks": 3,
    "width": 48,
    "layers": 1,
    "ffn_width": 48,
    "text_width": 16,
    "text_layers": 1,
    "checkpoint_steps": 2,
    "evaluate_steps": 2,
    "sampling_steps": 2,
    "precision": "fp32",
}


def settings_for(**changes) -> TeacherTrainingSettings:
    return TeacherTrainingSettings(**{"vae": "none", **TINY, **changes})


def trainee_for(latents=None, **changes) -> TeacherTrainee:
    settings = settings_for(**changes)
    if latents is None:
        latents = torch.randn(settings.clips + settings.evaluation_clips, 4, 5, 4, 4)
    module = Denoiser.new(settings, 4)
    return TeacherTrainee(settings, module, settings.clip_set(temporal_ratio=4), latents)


@pytest.fixture(scope="module")
def vae_folder(build_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    build_pipeline().vae.save_pretrained(folder)
    return folder


def test_loss_falls():
    torch.manual_seed(0)
    trainee = trainee_for(torch.randn(9, 4, 1, 1, 1).expand(9, 4, 5, 4, 4), batch_size=4)
    before = trainee.evaluate()["loss"]
    optimizer = torch.optim.AdamW(trainee.module.parameters(), lr=5e-3)
    for step in range(15):
        torch.manual_seed(step)
        optimizer.zero_grad()
        trainee.loss(step)[0].backward()
        optimizer.step()
    assert trainee.evaluate()["loss"] < 0.8 * before
    assert all(weight.grad is not None for weight in trainee.module.transformer.parameters())


def test_it_sees_the_future():
    trainee, sigma = trainee_for(), torch.full((1, 3), 0.5)
    x, embeds = torch.randn(1, 4, 3, 4, 4), trainee.module.embed(["a red circle"])
    with torch.no_grad():
        for weight in trainee.module.transformer.proj_out.parameters():
            weight.normal_()
        before = trainee.module.velocity(x, sigma, embeds)
        x[:, :, 2] += 1
        after = trainee.module.velocity(x, sigma, embeds)
    assert not torch.allclose(before[:, :, 0], after[:, :, 0])


def test_clips_are_cut_out_anywhere_and_show_one_scene():
    latents = torch.arange(45.0).view(9, 1, 5, 1, 1).expand(9, 4, 5, 4, 4)
    trainee = trainee_for(latents, starts=0.3)
    asked = trainee._pieces(range(9)).draw(400, np.random.default_rng(0))
    numbers, captions = asked.pieces[:, 0, :, 0, 0].long(), asked.captions
    assert torch.equal(numbers - numbers[:, :1], torch.arange(3).expand(400, 3))
    clips, starts = numbers[:, 0] // 5, numbers[:, 0] % 5
    assert set(clips.tolist()) == {0, 1, 2, 4, 5, 6, 8}
    assert set(starts.tolist()) == {0, 1, 2}
    assert 0.45 < (starts == 0).float().mean() < 0.62  # 0.3 and a third of the others
    expected = {trainee.clips.caption(int(clips[0]), variant) for variant in range(16)}
    assert captions[0] in expected


def test_evaluation_knows_no_clip_of_the_training():
    trainee = trainee_for()
    before = trainee.evaluate()["loss"]
    trainee.latents[:5] = torch.nan
    assert trainee.evaluate()["loss"] == before
    assert trainee.loss(0)[0].isnan()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_leaves_a_pipeline_of_its_horizon(vae_folder, tmp_path, precision):
    settings, folder = settings_for(vae=str(vae_folder), precision=precision), tmp_path / "runs" / "first"
    train_teacher(settings, folder)
    record = json.loads((folder / "model" / "training" / "first.json").read_text())
    assert record["command"].startswith("genstream train teacher ")
    pipe = CausalVideoPipeline.from_pretrained(folder / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("a red circle moves right", num_frames=9, output_type="pt").frames
    assert frames.shape == (1, 9, 3, 128, 128)
    assert (pipe.settings.chunk_frames, len(pipe.scheduler.schedule().timesteps)) == (3, 2)


def test_a_teacher_starts_from_a_student(vae_folder, tmp_path):
    small = {name: value for name, value in TINY.items() if name not in ("horizon_chunks", "sampling_steps")}
    small |= {"vae": str(vae_folder), "clip_chunks": 6, "window_chunks": 1}
    train_student(StudentTrainingSettings(**small), tmp_path / "student")
    again = settings_for(
        vae=str(vae_folder),
        initial=str(tmp_path / "student"),
        clip_chunks=6,
        total_steps=1,
        learning_rate=1e-9,
    )
    train_teacher(again, tmp_path / "teacher")
    pipes = [
        CausalVideoPipeline.from_pretrained(tmp_path / name / "model") for name in ("student", "teacher")
    ]
    weights, same = (pipe.transformer.state_dict() for pipe in pipes)
    assert all(torch.allclose(weights[name], same[name], atol=1e-3) for name in weights)
    records = (tmp_path / "teacher" / "model" / "training").glob("*.json")
    assert {path.stem for path in records} == {"student", "teacher"}
    assert len(list((tmp_path / "latents").iterdir())) == 1
    for name, folder in (("vae", vae_folder), ("initial", tmp_path / "student" / "model" / "transformer")):
        retrain(folder)
        with pytest.raises(ValueError, match=rf"{name} must hold what the run in '.*teacher' is made"):
            train_teacher(again, tmp_path / "teacher")
        retrain(folder)


def test_what_a_run_is_made_from():
    parts = {"initial": "runs/student", "text_encoder": "runs/text"}
    assert _origins(settings_for()).models.keys() == {"vae"}
    assert _origins(settings_for(**parts)).models.keys() == {"vae", "initial", "text_encoder"}
    videos = TeacherTrainingSettings(videos="clips", initial="runs/student", clip_chunks=6)
    assert (_origins(videos).models.keys(), _origins(videos).videos) == ({"initial"}, "clips")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"horizon_chunks": 6}, r"horizon_chunks must be in \[1, 5\], the chunks of a clip, got 6"),
        ({"horizon_chunks": 0}, r"horizon_chunks must be in \[1, 5\]"),
        ({"time_std": 0.0}, "time_std must be a positive number, got 0.0"),
        ({"time_std": float("inf")}, "time_std must be a positive number, got inf"),
        ({"time_mean": float("nan")}, "time_mean must be finite, got nan"),
        ({"shift": -1.0}, "shift must be a positive number, got -1.0"),
        ({"shift": float("nan")}, "shift must be a positive number, got nan"),
        ({"starts": 1.1}, r"starts must be in \[0, 1\], got 1.1"),
        ({"sampling_steps": 0}, "sampling_steps must be at least 1, got 0"),
        ({"without_text": -0.5}, r"without_text must be in \[0, 1\], got -0.5"),
    ],
)
def test_bad_settings(wrong, error):
    with pytest.raises(ValueError, match=error):
        settings_for(**wrong)
