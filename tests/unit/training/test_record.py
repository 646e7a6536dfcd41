import json

import pytest

from genstream.cli.settings import parse_settings
from genstream.training.record import claim_run, command, write_record
from genstream.training.student import StudentTrainingSettings


def test_the_command_gives_the_settings_back():
    settings = StudentTrainingSettings(
        vae="runs/other/vae", width=96, steps=(1000.0, 500.0), precision="fp32"
    )
    text = command("student", settings)
    assert text.startswith("genstream train student --vae runs/other/vae ")
    words = text.replace("'", "").replace("[1000.0, 500.0]", "[1000.0,500.0]").split()
    again, output = parse_settings("genstream train student", StudentTrainingSettings, words[3:])
    assert again == settings
    assert str(output) == "runs/student"


def test_a_record_holds_settings_versions_and_logs(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss\n1,2\n")
    settings = StudentTrainingSettings(vae="runs/vae/vae")
    write_record(tmp_path, "student", settings, {"student": tmp_path / "log.csv"})
    record = json.loads((tmp_path / "training" / "student.json").read_text())
    assert record["command"] == "genstream train student --output runs/student"
    assert record["settings"]["seed"] == settings.seed
    assert set(record["versions"]) == {"torch", "diffusers", "transformers", "accelerate"}
    assert (tmp_path / "training" / "student.csv").read_text() == "step,loss\n1,2\n"


def test_a_run_is_continued_with_its_own_settings_only(tmp_path):
    claim_run(tmp_path / "run", StudentTrainingSettings())
    claim_run(tmp_path / "run", StudentTrainingSettings())
    before = (tmp_path / "run" / "settings.json").read_text()
    with pytest.raises(ValueError, match=r"learning_rate must stay 0\.0015 in the run that .*, got 0\.5"):
        claim_run(tmp_path / "run", StudentTrainingSettings(learning_rate=0.5))
    assert (tmp_path / "run" / "settings.json").read_text() == before
