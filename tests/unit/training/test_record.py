import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from retraining import retrain

from genstream.cli.settings import parse_settings
from genstream.training import processes, text_encoder
from genstream.training.record import Training, claimed_run, is_finished, write_record
from genstream.training.student import StudentTrainingSettings
from genstream.training.text_encoder import TextTrainee, TextTrainingSettings, train_text_encoder

TINY = {"width": 16, "layers": 1, "total_steps": 2, "batch_size": 2}


def training_for(settings, log=None) -> Training:
    logs = {} if log is None else {"student_1": log}
    run = Path("runs/student")
    return Training(name="student_1", part="student", run=run, settings=settings, logs=logs, steps=7)


def claim(output, settings, origins=None) -> None:
    with claimed_run(output, settings, origins or {}):
        pass


def test_the_command_gives_the_settings_back():
    settings = StudentTrainingSettings(vae="my runs/vae", width=96, steps=(1000.0, 500.0), precision="fp32")
    words = shlex.split(training_for(settings).command)
    assert words[:3] == ["genstream", "train", "student"]
    assert words[words.index("--vae") + 1] == "my runs/vae"
    again, output = parse_settings("genstream train student", StudentTrainingSettings, words[3:])
    assert again == settings
    assert output == Path("runs/student")


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


def test_prompts_may_change_until_something_is_saved(tmp_path):
    prompts, run = tmp_path / "prompts.txt", tmp_path / "run"

    def claim_with(text: str) -> None:
        prompts.write_text(text)
        with claimed_run(run, StudentTrainingSettings(), {}, str(prompts)):
            pass

    for text in ("a", "b"):
        claim_with(text)
    (run / "log.csv").write_text("step\n1\n")
    claim_with("b")
    with pytest.raises(ValueError, match=r"prompts '.*prompts\.txt' must stay as they were"):
        claim_with("a")
    (run / "prompts.sha256").unlink()  # as in runs of earlier versions
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
    settings, origins = StudentTrainingSettings(vae=str(model)), {"vae": lambda: model}
    claim(run, settings, origins)
    retrain(model)
    claim(run, settings, origins)
    (run / "log.csv").write_text("step\n1\n")
    claim(run, settings, origins)
    retrain(model)
    error = (
        rf"vae must hold the model that the run in '{run}' is made from, got another one in '{model}': remove"
    )
    with pytest.raises(ValueError, match=error):
        claim(run, settings, origins)
    retrain(model)
    claim(run, settings, origins)
    (run / "models.json").unlink()  # as in runs of earlier versions
    retrain(model)
    claim(run, settings, origins)


def finished_run(tmp_path, model):
    """A run with its result; gives what tells whether it is finished."""
    run, settings = tmp_path / "run", StudentTrainingSettings(vae=str(model))

    def find():
        if not model.is_dir():
            raise ValueError("vae must be there")
        return model

    origins = {"vae": find}
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
    assert record.pop("models").keys() == {"vae"}
    path.write_text(json.dumps(record))
    retrain(model)
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
