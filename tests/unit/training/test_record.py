import json
import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from retraining import retrain

from genstream.cli.settings import parse_settings
from genstream.training import processes, text_encoder
from genstream.training.adaptation import AdaptationSettings
from genstream.training.record import Origins, Training, claimed_run, is_finished, write_record
from genstream.training.self_forcing import SelfForcingSettings
from genstream.training.student import StudentTrainingSettings
from genstream.training.teacher import TeacherTrainingSettings
from genstream.training.text_encoder import TextTrainee, TextTrainingSettings, train_text_encoder
from genstream.training.vae import VAETrainingSettings

CHANGED = "{} must hold what the run in '{}' is made from, got something else in '{}': remove that run, and"
TINY = {"width": 16, "layers": 1, "total_steps": 2, "batch_size": 2}


def training_for(settings, log=None) -> Training:
    logs = {} if log is None else {"student_1": log}
    run = Path("runs/student")
    return Training(name="student_1", part="student", run=run, settings=settings, logs=logs, steps=7)


def claim(output, settings, origins=None) -> None:
    with claimed_run(output, settings, origins or Origins()):
        pass


def test_the_command_gives_the_settings_back():
    settings = StudentTrainingSettings(vae="my runs/vae", width=96, steps=(1000.0, 500.0), precision="fp32")
    words = shlex.split(training_for(settings).command)
    assert words[:3] == ["genstream", "train", "student"]
    assert words[words.index("--vae") + 1] == "my runs/vae"
    again, output = parse_settings("genstream train student", StudentTrainingSettings, words[3:])
    assert again == settings
    assert output == Path("runs/student")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("runs/rec/vae", "runs/rec/vae"),
        ("my runs/vae", "my runs/vae"),
        ("{here}/deep/vae", "deep/vae"),
        ("../vae", "../vae"),
        ("/elsewhere/of/mine/vae", "runs/vae"),
    ],
)
def test_the_command_tells_where_others_find_the_run(tmp_path, monkeypatch, given, told):
    monkeypatch.chdir(tmp_path)
    run = Path(given.format(here=tmp_path))
    command = replace(training_for(StudentTrainingSettings()), run=run).command
    assert shlex.split(command)[-2:] == ["--output", told]


def test_a_record_holds_settings_versions_and_logs(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss\n1,2\n")
    settings = StudentTrainingSettings()
    write_record(tmp_path, training_for(settings, tmp_path / "log.csv"))
    record = json.loads((tmp_path / "training" / "student_1.json").read_text())
    assert record["command"] == "genstream train student --output runs/student"
    assert record["steps"] == 7
    assert record["settings"]["seed"] == settings.seed
    assert set(record["versions"]) == {"torch", "diffusers", "transformers", "accelerate"}
    assert (tmp_path / "training" / "student_1.csv").read_text() == "step,loss\n1,2\n"


def test_a_run_is_continued_with_its_own_settings_only(tmp_path):
    claim(tmp_path / "run", StudentTrainingSettings())
    claim(tmp_path / "run", StudentTrainingSettings())
    claim(tmp_path / "run", StudentTrainingSettings(learning_rate=0.1))  # nothing was saved yet
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / "checkpoints" / "partial_0000200").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "partial_0000200" / "half").touch()
    claim(tmp_path / "run", StudentTrainingSettings())
    (tmp_path / "run" / "log.csv").write_text("step\n1\n")
    before = (tmp_path / "run" / "settings.json").read_text()
    with pytest.raises(ValueError, match=r"learning_rate must stay 0\.0018 in the run that .*, got 0\.5"):
        claim(tmp_path / "run", StudentTrainingSettings(learning_rate=0.5))
    assert (tmp_path / "run" / "settings.json").read_text() == before


def test_a_run_of_another_command_is_called_so(tmp_path):
    settings = (
        StudentTrainingSettings(),
        TeacherTrainingSettings(),
        SelfForcingSettings(),
        AdaptationSettings(),
        VAETrainingSettings(),
        TextTrainingSettings(),
    )
    for number, before in enumerate(settings):
        run = tmp_path / str(number)
        claim(run, before)
        (run / "log.csv").touch()
        claim(run, before)
        for other in settings:
            if other is not before:
                said = (
                    rf"a run of this command, got '{run}', a run of another command or version, with .*: \w+"
                )
                with pytest.raises(ValueError, match=f"output must be a new folder or {said}"):
                    claim(run, other)


@pytest.mark.parametrize("place", ["checkpoints", "joint/checkpoints"])
def test_checkpoints_whose_settings_nobody_knows_are_not_continued(tmp_path, place):
    checkpoint = tmp_path / place / "step_0000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").touch()
    with pytest.raises(ValueError, match=f"a run with its settings.json, got .* how '{checkpoint}' was made"):
        claim(tmp_path, StudentTrainingSettings())
    assert not (tmp_path / "settings.json").exists()


@pytest.mark.parametrize("output", ["afile", "afile/run"])
def test_a_run_needs_a_folder(tmp_path, output):
    (tmp_path / "afile").touch()
    with pytest.raises(ValueError, match=f"output must be a folder, got '{tmp_path / output}': "):
        claim(tmp_path / output, StudentTrainingSettings())


def test_prompts_may_change_until_something_is_saved(tmp_path):
    prompts, run = tmp_path / "prompts.txt", tmp_path / "run"

    def claim_with(text: str) -> None:
        prompts.write_text(text)
        claim(run, SelfForcingSettings(prompts=str(prompts)), Origins(prompts=str(prompts)))

    for text in ("a", "b"):
        claim_with(text)
    (run / "log.csv").write_text("step\n1\n")
    claim_with("b")
    with pytest.raises(ValueError, match=CHANGED.format("prompts", run, prompts)):
        claim_with("a")
    digest = json.loads((run / "origins.json").read_text())["prompts"]
    (run / "origins.json").unlink()
    (run / "prompts.sha256").write_text(digest)  # as in runs of earlier versions
    with pytest.raises(ValueError, match=CHANGED.format("prompts", run, prompts)):
        claim_with("a")
    claim_with("b")
    assert json.loads((run / "origins.json").read_text()) == {"prompts": digest}
    for name in ("origins.json", "prompts.sha256"):
        (run / name).unlink()  # as in runs of still earlier ones
    claim_with("a")


@pytest.fixture
def model(tmp_path):
    """Folder of what counts as a model."""
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(8))
    return folder


def test_models_may_change_until_something_is_saved(tmp_path, model):
    run = tmp_path / "run"
    settings = StudentTrainingSettings(vae=str(model))
    origins = Origins(models={"vae": lambda: model})
    claim(run, settings, origins)
    retrain(model)
    claim(run, settings, origins)
    (run / "log.csv").write_text("step\n1\n")
    claim(run, settings, origins)
    retrain(model)
    with pytest.raises(ValueError, match=CHANGED.format("vae", run, model)):
        claim(run, settings, origins)
    retrain(model)
    claim(run, settings, origins)
    (run / "origins.json").rename(run / "models.json")  # as in runs of earlier versions
    retrain(model)
    with pytest.raises(ValueError, match=CHANGED.format("vae", run, model)):
        claim(run, settings, origins)
    (run / "models.json").unlink()  # as in runs of still earlier ones
    claim(run, settings, origins)


def test_videos_may_change_until_something_is_saved(tmp_path):
    run, clips = tmp_path / "run", tmp_path / "clips"
    settings = StudentTrainingSettings(videos=str(clips), initial="runs/student", clip_chunks=6)
    origins = Origins(videos=str(clips), beside_videos=(".txt",))
    (clips / "inner").mkdir(parents=True)
    for name in ("a.mp4", "inner/b.mp4", "inner/b.txt"):
        (clips / name).write_text(name)
        claim(run, settings, origins)
    (run / "log.csv").write_text("step\n1\n")
    for name in ("notes.json", "notes.txt", "inner.txt"):  # of no video
        (clips / name).touch()
    claim(run, settings, origins)
    for name in ("a.mp4", "inner/b.txt", "c.mp4", "d/frame_0.png"):
        path = clips / name
        path.parent.mkdir(exist_ok=True)
        before = path.read_text() if path.is_file() else None
        path.write_text("other")
        with pytest.raises(ValueError, match=CHANGED.format("videos", run, clips)):
            claim(run, settings, origins)
        path.unlink() if before is None else path.write_text(before)
        claim(run, settings, origins)
    (run / "origins.json").unlink()  # as in runs of earlier versions
    (clips / "a.mp4").unlink()
    claim(run, settings, origins)


@pytest.mark.parametrize("kind", ["prompts", "videos"])
def test_a_finished_run_is_not_taken_for_one_of_other_prompts_or_videos(tmp_path, kind):
    run, videos = tmp_path / "run", kind == "videos"
    place = tmp_path / "clips" if videos else tmp_path / "prompts.txt"
    file = place / "a.mp4" if videos else place
    file.parent.mkdir(exist_ok=True)
    file.write_text("a")
    settings = (
        StudentTrainingSettings(videos=str(place), initial="runs/student", clip_chunks=6)
        if videos
        else SelfForcingSettings(prompts=str(place))
    )
    origins = Origins(**{kind: str(place)})
    claim(run, settings, origins)
    (run / "model").mkdir()
    write_record(run / "model", replace(training_for(settings), run=run))
    finished = partial(is_finished, run / "model", "student_1", settings, 7, origins)
    assert finished()
    file.write_text("b")
    with pytest.raises(ValueError, match=CHANGED.format(kind, run, place)):
        finished()
    file.unlink()
    assert finished()
    if videos:
        place.rmdir()
        assert finished()


def finished_run(tmp_path, model):
    """A run with its result; gives what tells whether it is finished."""
    run, settings = tmp_path / "run", StudentTrainingSettings(vae=str(model))

    def find():
        if not model.is_dir():
            raise ValueError("vae must be there")
        return model

    origins = Origins(models={"vae": find})
    claim(run, settings, origins)
    (run / "model").mkdir()
    write_record(run / "model", replace(training_for(settings), run=run))
    return lambda: is_finished(run / "model", "student_1", settings, 7, origins)


def test_a_finished_run_is_not_taken_for_one_of_other_models(tmp_path, model):
    finished = finished_run(tmp_path, model)
    (model / "training").mkdir()
    (model / "training" / "vae.json").write_text("{}")
    assert finished()
    retrain(model)
    with pytest.raises(ValueError, match=r"remove that run, and what was made from it, .* another output"):
        finished()
    retrain(model)
    assert finished()


@pytest.mark.parametrize("left", [None, "checkpoints"])
def test_a_finished_run_outlives_the_models_that_it_was_made_from(tmp_path, model, left):
    finished = finished_run(tmp_path, model)
    shutil.rmtree(model)
    if left is not None:
        (model / left).mkdir(parents=True)  # of the run that is to make it anew
    assert finished()


def test_finished_runs_of_earlier_versions_stay_so(tmp_path, model):
    finished = finished_run(tmp_path, model)
    path = tmp_path / "run" / "model" / "training" / "student_1.json"
    record = json.loads(path.read_text())
    digests = record.pop("origins")
    assert digests.keys() == {"vae"}
    path.write_text(json.dumps(record | {"models": digests}))
    assert finished()
    retrain(model)
    with pytest.raises(ValueError, match="vae must hold what the run in"):
        finished()
    path.write_text(json.dumps(record))
    assert finished()


def test_of_several_processes_one_reads_the_models(tmp_path, model, monkeypatch):
    finished = finished_run(tmp_path, model)
    state = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None)
    monkeypatch.setattr(processes, "process", lambda: state)
    retrain(model)
    assert finished()  # the main process tells that it is not


def test_damaged_settings_are_named(tmp_path):
    (tmp_path / "settings.json").write_text("{")
    (tmp_path / "log.csv").write_text("step\n1\n")
    with pytest.raises(ValueError, match=r"settings\.json' is not valid json"):
        claim(tmp_path, StudentTrainingSettings())


def test_a_run_is_kept_for_one_command_until_its_result_is_written(tmp_path, monkeypatch):
    """Even before it has saved anything, when its settings could be changed."""
    settings, others = (TextTrainingSettings(**TINY, learning_rate=rate) for rate in (1e-3, 1e-4))
    refused = []

    def refusing(work):
        def wrapped(*given):
            with pytest.raises(
                ValueError, match=r"output must be a run at which no other process is, got '.*"
            ):
                train_text_encoder(others, tmp_path / "run")
            refused.append(work)
            return work(*given)

        return wrapped

    with monkeypatch.context() as context:
        context.setattr(TextTrainee, "loss", refusing(TextTrainee.loss))
        context.setattr(text_encoder, "_save", refusing(text_encoder._save))
        train_text_encoder(settings, tmp_path / "run")
    assert len(refused) == 3
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["learning_rate"] == 1e-3
    assert not (tmp_path / "run" / ".lock").exists()
    with pytest.raises(ValueError, match=r"learning_rate must stay 0\.001 in the run"):
        train_text_encoder(others, tmp_path / "run")


def test_a_finished_run_is_left_as_it_is(tmp_path, caplog):
    settings = TextTrainingSettings(**TINY)
    train_text_encoder(settings, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    caplog.clear()
    with caplog.at_level("INFO"):
        train_text_encoder(settings, tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert caplog.messages == [f"finished before: {tmp_path / 'run' / 'text_encoder'}"]


@pytest.mark.parametrize("change", [{"steps": 1}, {"settings": {}}])
def test_a_result_that_its_record_does_not_tell_finished_is_written_again(tmp_path, change):
    settings = TextTrainingSettings(**TINY)
    train_text_encoder(settings, tmp_path / "run")
    path = tmp_path / "run" / "text_encoder" / "training" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | change))
    train_text_encoder(settings, tmp_path / "run")
    assert json.loads(path.read_text()) == record
