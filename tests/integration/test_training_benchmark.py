"""The suite of ablations, from nothing to its page, in tiny."""

import os
import time

import pytest

import benchmarks.training as module


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """The module, with fewer runs, that writes into a temporary folder."""
    (tmp_path / "pictures").mkdir()
    changes = {
        "PAGE": tmp_path / "training.md",
        "PICTURES": tmp_path / "pictures",
        "WINDOW_S": 1.0,
        "SEEDS": (0,),
        "HORIZONS": (1, 2),
        "WINDOWS": (1, 2),
        "STEPS": (1, 4),
    }
    for name, value in changes.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.slow
def test_the_suite_writes_its_page_and_goes_on_where_it_was_cut_off(suite, tmp_path, monkeypatch):
    scale = suite.Scale(
        size_px=32,
        vae_steps=(1, 1),
        **dict.fromkeys(("base_steps", "teacher_steps", "forcing_steps", "distill_steps", "mask_steps"), 1),
        batch_size=2,
        clips=4,
        width=48,
        layers=1,
        ffn_width=48,
        chunk_frames=1,
        horizon_chunks=2,
        prompts=2,
        long_prompts=2,
        longest_prompts=(1,),
        short_s=2.0,
        long_s=2.0,
        longest_s=3.0,
    )
    output = tmp_path / "runs"
    distill = suite.distill_student
    monkeypatch.setattr(suite, "distill_student", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        suite.main(["--output", str(output)], scale)
    logs = {path: path.read_text() for path in output.rglob("log.csv")}
    assert len(logs) == 4  # both phases of the VAE, base, teacher
    monkeypatch.setattr(suite, "distill_student", distill)
    suite.main(["--output", str(output)], scale)
    assert all(path.read_text() == text for path, text in logs.items())
    page = (tmp_path / "training.md").read_text()
    for title in ("Runs", "Forcing", "Rollout", "Sinks and window", "Ten minutes", "Steps"):
        assert f"## {title}\n" in page
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert len(pictures) == 5
    assert all(f"(pictures/{name})" in page for name in pictures)
    scores = {path: path.stat().st_mtime_ns for path in (output / "scores").iterdir()}
    assert len(scores) == 3 + 2 + 4 + 2 + 2
    suite.main(["--output", str(output)], scale)  # all is there: nothing is judged again
    assert all(path.stat().st_mtime_ns == written for path, written in scores.items())


@pytest.mark.slow
def test_jobs_side_by_side_wait_for_what_they_start_from():
    second = module.Job(name="second", function=time.time_ns, arguments=(), after=("first",))
    first = module.Job(name="first", function=time.time_ns, arguments=())
    process = module.Job(name="process", function=os.getpid, arguments=())
    done = module.do_all([second, first, process], 2)
    assert done.keys() == {"first", "second", "process"}
    assert done["first"] < done["second"]
    assert done["process"] != os.getpid()
