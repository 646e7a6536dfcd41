"""The model inside the package is small, whole, and tells how it was made."""

import json

import pytest

from genstream.io.model_folder import find_model, installed_models

MEGABYTE = 10**6


@pytest.mark.parametrize("name", installed_models())
def test_it_is_small(name):
    sizes = [path.stat().st_size for path in find_model(name).rglob("*") if path.is_file()]
    assert sum(sizes) <= 24 * MEGABYTE
    assert max(sizes) <= 12 * MEGABYTE


def test_it_carries_the_commands_settings_and_logs_that_made_it():
    folder = find_model("toyworld") / "training"
    records = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert {"vae", "student_1"} <= records.keys()
    for name, record in records.items():
        assert record["command"].startswith(("genstream train ", "genstream distill "))
        assert isinstance(record["settings"]["seed"], int)
        logs = list(folder.glob(f"{name}*.csv"))
        assert logs
        for log in logs:
            header, *rows = log.read_text().splitlines()
            assert header.startswith("step,loss")
            assert rows
