"""Students and teachers that learn from folders of videos."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_vaes import own_vae
from small_videos import write_video

from genstream.io.model_folder import read_card
from genstream.io.reader import VideoFile
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.training.denoiser import Denoiser
from genstream.training.student import StudentTrainee, StudentTrainingSettings, train_student
from genstream.training.teacher import TeacherTrainingSettings, train_teacher
from genstream.training.video_clips import CaptionedVideo, ClipGeometry, VideoClip, VideoClips
from genstream.vae.wrapping import module_of

TINY = {
    "total_steps": 4,
    "batch_size": 2,
    "evaluation_clips": 2,
    "clip_chunks": 4,
    "chunk_frames": 1,
    "learning_rate": 1e-2,
    "checkpoint_steps": 2,
    "evaluate_steps": 2,
    "guidance_scale": 2.0,
    "precision": "fp32",
}
KINDS = {
    "student": (StudentTrainingSettings, train_student, {"window_chunks": 1}),
    "teacher": (TeacherTrainingSettings, train_teacher, {"horizon_chunks": 3, "sampling_steps": 2}),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for index in range(3):
        write_video(
            root / f"{index}.mp4", 50 * index, 28, captions="a red circle\na blue square moving right"
        )
    return root


@pytest.fixture(scope="module", params=["tiny", "wan2.1"])
def initial(request, build_pipeline, tmp_path_factory) -> Path:
    """A model that is run unlike what will be trained, at a size that is not square."""
    vae = None
    if request.param != "tiny":
        vae = own_vae(request.param, [0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1.0, 1.5])
        module_of(vae).float()
    pipe = build_pipeline(vae=vae, context="fused", independent_first_frame=True)
    pipe.register_to_config(default_width=48, default_fps=20)
    with torch.no_grad():
        pipe.transformer.proj_out.weight.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("initial")
    pipe.save_pretrained(folder)
    return folder


def settings_for(kind: str, folder: Path, model: Path, **changes):
    settings, _, own = KINDS[kind]
    return settings(**{"videos": str(folder), "initial": str(model)} | TINY | own | changes)


def weights_of(folder: Path, part: str) -> dict[str, torch.Tensor]:
    pipe = CausalVideoPipeline.from_pretrained(folder, dtype=torch.float32)
    return getattr(pipe, part).state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_learns_from_videos(kind, videos, initial, tmp_path, caplog):
    settings, train = settings_for(kind, videos, initial), KINDS[kind][1]
    train(settings, tmp_path / "run")
    model = tmp_path / "run" / "model"
    pipe = CausalVideoPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("a red circle", num_frames=9, output_type="pt").frames
    assert frames.shape == (1, 9, 3, 32, 48) and frames.isfinite().all()
    for part, changes in (("vae", False), ("text_encoder", False), ("transformer", True)):
        before, after = weights_of(initial, part), weights_of(model, part)
        same = [torch.equal(after[name], before[name].half().float()) for name in before]
        assert all(same) != changes
    assert (str(pipe.settings.context), pipe.settings.independent_first_frame) == ("clean", False)
    assert pipe.settings.guidance_scale == 2.0
    assert (pipe.settings.window_frames, pipe.settings.chunk_frames) == (
        (1, 1) if kind == "student" else (0, 3)
    )
    assert "videos of 16 frames per second are learnt as they are; the model shows 20" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_killed_goes_on(kind, videos, initial, tmp_path):
    settings, train = settings_for(kind, videos, initial), KINDS[kind][1]
    train(settings, tmp_path / "run")
    model = tmp_path / "run" / "model"
    expected = weights_of(model, "transformer")
    shutil.rmtree(model)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_0000004")
    (shard,) = (tmp_path / "latents").rglob("*.safetensors")
    written = shard.stat().st_mtime_ns
    train(settings, tmp_path / "run")
    for name, weight in weights_of(model, "transformer").items():
        assert torch.equal(weight, expected[name])
    assert shard.stat().st_mtime_ns == written


def test_a_run_goes_on_with_the_videos_that_it_began_with(videos, initial, tmp_path):
    """Cut off or finished: others might be trained on that were held out before."""
    clips, run = tmp_path / "clips", tmp_path / "run"
    shutil.copytree(videos, clips)
    settings = settings_for("student", clips, initial, total_steps=1)
    train_student(settings, run)
    shutil.copytree(run / "model", tmp_path / "kept")
    for is_finished in (True, False):
        for text in ("a blue square", (videos / "1.txt").read_text()):
            (clips / "1.txt").write_text(text)
            write_video(clips / "3.mp4", 150, 28, captions="a red circle")
            with pytest.raises(ValueError, match=r"videos must hold what the run in '.*' is made from"):
                train_student(settings, run)
            for added in clips.glob("3.*"):
                added.unlink()
        if is_finished:
            train_student(settings, run)
            shutil.rmtree(run / "model")
    shutil.rmtree(clips)
    (tmp_path / "kept").rename(run / "model")
    train_student(settings, run)


def test_the_model_says_that_it_is_another_one(videos, initial, tmp_path):
    card = {"name": "shapes", "description": "Shapes.", "vocabulary": {"colours": ["red"]}}
    shutil.copytree(initial, tmp_path / "initial")
    (tmp_path / "initial" / "model_card.json").write_text(json.dumps(card))
    for place, words in ((initial, {}), (tmp_path / "initial", {"colours": ("red",)})):
        run = tmp_path / f"from_{len(words)}"
        train_student(settings_for("student", videos, place, total_steps=1), run)
        found = read_card(run / "model")
        assert (found.name, found.vocabulary) == (run.name, words)
        assert (found.width, found.height, found.fps) == (48, 32, 20)
        record = (run / "model" / "training" / f"{run.name}.json").read_text()
        assert "toyworld" not in record + (run / "model" / "model_card.json").read_text()
        assert "--videos" in json.loads(record)["command"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    kind, videos, initial, tmp_path, build_pipeline
):
    silent = build_pipeline()
    silent.register_modules(text_encoder=None, tokenizer=None)
    silent.save_pretrained(tmp_path / "silent")
    decoding = own_vae("turbo", [0.0] * 4, [1.0] * 4)
    build_pipeline(vae=module_of(decoding).float()).save_pretrained(tmp_path / "decoding")
    shutil.copytree(videos, tmp_path / "videos")
    (tmp_path / "videos" / "1.txt").write_text("a red circle " * 5)
    train = KINDS[kind][1]
    for wrong, error in (
        (
            {"videos": str(tmp_path / "videos")},
            r"caption file '.*1\.txt': prompt must have at most 12 tokens",
        ),
        ({"videos": str(tmp_path / "silent")}, r"videos must hold \.mp4"),
        ({"initial": "nowhere"}, "initial must be an installed model or the folder"),
        ({"initial": str(tmp_path / "silent")}, "initial must have a tokenizer and a text encoder"),
        ({"initial": str(tmp_path / "decoding")}, "initial must have a VAE that encodes frames: .*'decode'"),
        ({"evaluation_clips": 8}, r"evaluation_clips = 8 clips of 13 frames, .* got 6 clips in 3 videos"),
    ):
        with pytest.raises(ValueError, match=error):
            train(settings_for(kind, videos, initial, **wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"initial": None}, "initial must be the model to start from where videos are given, got None"),
        ({"vae": "runs/a"}, "vae must be left at 'runs/vae/vae' where videos are given"),
        ({"text_encoder": "a"}, "text_encoder must be left at None"),
        (
            {"size_px": 64},
            "size_px must be left at 128 where videos are given, since initial decides it, got 64",
        ),
        ({"width": 96}, "width must be left at 192"),
        ({"layers": 2}, "layers must be left at 6"),
        ({"patch_size": 1}, "patch_size must be left at 2"),
        ({"text_tokens": 64}, "text_tokens must be left at 32"),
        ({"clips": 0}, "clips must be at least 1, got 0"),
        ({"evaluation_clips": 0}, "evaluation_clips must be at least 1, got 0"),
    ],
)
def test_settings_that_videos_exclude(kind, wrong, error):
    with pytest.raises(ValueError, match=error):
        settings_for(kind, Path("videos"), Path("model"), **wrong)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"switched": 0.2}, "switched must be left at 0.1 where videos are given, got 0.2"),
        ({"first_clips": 4}, "first_clips must be left at 0 where videos are given, got 4"),
        ({"hard_weight": 2.0}, "hard_weight must be left at 1.0 where videos are given, got 2.0"),
        ({"clip_chunks": 3}, "clip_chunks must be at least 4, got 3"),
    ],
)
def test_students_cannot_ask_what_videos_do_not_tell(wrong, error):
    with pytest.raises(ValueError, match=error):
        settings_for("student", Path("videos"), Path("model"), **wrong)


def video_clips(count: int, evaluation: int) -> VideoClips:
    """Clips of which nobody reads the frames."""
    clips = []
    for index in range(count):
        file = VideoFile(path=Path(f"{index}.mp4"), frames=13, fps=16.0)
        captions = tuple(f"a red circle {index} {line}" for line in range(20))
        video = CaptionedVideo(file=file, name=file.path.name, captions=captions, stamp=(0, 0))
        clips.append(VideoClip(video=video, start=0))
    geometry = ClipGeometry(chunks=4, frames=13, height=32, width=32)
    return VideoClips(clips=tuple(clips), evaluation=evaluation, geometry=geometry)


def test_every_step_finds_clips_although_nothing_switches(build_pipeline):
    """The share of switches falls to the others, however many those are together."""
    changes = {"first": 0.5, "middle": 0.4, "image_start": 0.1, "without_text": 0.0}
    for extra in ({}, {"switched": 0.0}, {"first": 0.2, "random_masks": True}):
        settings = settings_for("student", Path("videos"), Path("model"), **changes | extra)
        clips = video_clips(20, 2)
        trainee = StudentTrainee(settings, Denoiser.of(build_pipeline()), clips, torch.randn(20, 4, 4, 4, 4))
        for step in range(80):
            assert trainee.loss(step)[0].isfinite()
            _, chosen, caption = trainee._draw(*(np.random.default_rng(step) for _ in range(2)), range(18))
            assert set(chosen) <= set(range(18)) and caption != clips.caption_after_switch


def test_all_captions_are_learnt(build_pipeline, monkeypatch):
    settings = settings_for("student", Path("videos"), Path("model"), without_text=0.0)
    clips, told = video_clips(20, 2), set()
    trainee = StudentTrainee(settings, Denoiser.of(build_pipeline()), clips, torch.randn(20, 4, 4, 4, 4))

    def embed(denoiser, texts):
        told.update(text.split()[-1] for text in texts)
        return torch.zeros(len(texts), 12, 16)

    monkeypatch.setattr(Denoiser, "embed", embed)
    for step in range(80):
        trainee.loss(step)
    assert len(told) == 20
