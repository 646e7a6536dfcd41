import json
import shlex
from pathlib import Path

import pytest

from genstream.cli.settings import parse_settings
from genstream.training.record import Training, claim_run, write_record
from genstream.training.student import StudentTrainingSettings


def training_for(settings, log=None) -> Training:
    logs = {} if log is None else {"student_1": log}
    run = Path("runs/student")
    return Training(name="student_1", part="student", run=run, settings=settings, logs=logs, steps=7)


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
    claim_run(tmp_path / "run", StudentTrainingSettings())
    claim_run(tmp_path / "run", StudentTrainingSettings())
    claim_run(tmp_path / "run", StudentTrainingSettings(learning_rate=0.1))  # nothing was saved yet
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / "checkpoints" / "partial_0000200").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "partial_0000200" / "half").touch()
    claim_run(tmp_path / "run", StudentTrainingSettings())
    (tmp_path / "run" / "log.csv").write_text("step\n1\n")
    before = (tmp_path / "run" / "settings.json").read_text()
    with pytest.raises(ValueError, match=r"learning_rate must stay 0\.0018 in the run that .*, got 0\.5"):
        claim_run(tmp_path / "run", StudentTrainingSettings(learning_rate=0.5))
    assert (tmp_path / "run" / "settings.json").read_text() == before


def test_damaged_settings_are_named(tmp_path):
    (tmp_path / "settings.json").write_text("{")
    (tmp_path / "log.csv").write_text("step\n1\n")
    with pytest.raises(ValueError, match=r"settings\.json' is not valid json"):
        claim_run(tmp_path, StudentTrainingSettings())
