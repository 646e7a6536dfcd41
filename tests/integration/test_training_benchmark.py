"""The suite of ablations, from nothing to its page, in tiny."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from ablations import jobs as jobs_module
from ablations.jobs import Job, do_all

import benchmarks.training as module
import genstream.training

TOYWORLD64 = Path(genstream.training.__file__).parent / "recipes" / "toyworld64"
SMALLER = {
    "vae": {"joint_steps": 1, "decoder_steps": 1, "size_px": 32},
    "text": {"total_steps": 1, "width": 16, "layers": 1},
    "student": {
        "total_steps": 1,
        "batch_size": 2,
        "clips": 4,
        "first_clips": 0,
        "size_px": 32,
        "width": 48,
        "layers": 1,
        "ffn_width": 48,
        "text_width": 16,
        "text_layers": 1,
        "chunk_frames": 1,
    },
}


@pytest.mark.slow
def test_the_suite_writes_its_page_and_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    monkeypatch.setattr(module, "PAGE", tmp_path / "training.md")
    recipe = tmp_path / "tiny"
    shutil.copytree(TOYWORLD64, recipe)
    for name, values in SMALLER.items():
        settings = recipe / f"{name}.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | values))
    scale = module.Scale(
        recipe=str(recipe),
        **dict.fromkeys(("teacher_steps", "forcing_steps", "distill_steps", "mask_steps"), 1),
        clip_chunks=8,
        horizon_chunks=4,
        prompts=2,
        long_prompts=2,
        longest_prompts=(1,),
        short_s=2.0,
        long_s=2.0,
        longest_s=3.0,
        window_s=1.0,
        seeds=(0,),
        horizons=(1, 2),
        windows=(1, 2),
        steps=(4, 1),
    )
    output = tmp_path / "runs"
    distill = module.distill_student
    monkeypatch.setattr(module, "distill_student", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        module.main(["--output", str(output)], scale)
    logs = {path: path.read_text() for path in output.rglob("log.csv")}
    assert len(logs) == 5  # both phases of the VAE, text, student, teacher
    monkeypatch.setattr(module, "distill_student", distill)
    module.main(["--output", str(output)], scale)
    assert all(path.read_text() == text for path, text in logs.items())
    made = output / "self_forcing_0" / "model" / "scheduler" / "scheduler_config.json"
    assert len(json.loads(made.read_text())["steps"]) == scale.steps[0]  # as its label says
    page = (tmp_path / "training.md").read_text()
    for title in ("Runs", "Forcing", "Rollout", "Sinks and window", "Ten minutes", "Steps"):
        assert f"## {title}\n" in page
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert len(pictures) == 5
    assert all(f"(pictures/{name})" in page for name in pictures)
    scores = {path: path.stat().st_mtime_ns for path in (output / "scores").iterdir()}
    assert len(scores) == 4 + 2 + 4 + 2 + 1
    module.main(["--output", str(output)], scale)  # all is there: nothing is judged again
    assert all(path.stat().st_mtime_ns == written for path, written in scores.items())


@pytest.mark.slow
def test_jobs_side_by_side_wait_for_what_they_start_from():
    second = Job(name="second", function=time.time_ns, arguments=(), after=("first",))
    first = Job(name="first", function=time.time_ns, arguments=())
    process = Job(name="process", function=os.getpid, arguments=())
    done = do_all([second, first, process], 2)
    assert done.keys() == {"first", "second", "process"}
    assert done["first"] < done["second"]
    assert done["process"] != os.getpid()


@pytest.mark.slow
def test_a_failure_is_told_at_once_and_all_else_is_done(tmp_path, caplog, monkeypatch):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    opener = os.open(gate, os.O_RDWR)  # alone O_WRONLY would wait for the reader

    class OpensTheGate(logging.Handler):
        def emit(self, record):
            os.write(opener, b"!")

    monkeypatch.setattr(jobs_module.logger, "handlers", [OpensTheGate()])
    waits = partial(subprocess.check_output, ["head", "-c1", str(gate)], timeout=60)
    jobs = [
        Job(name="wrong", function=int, arguments=("x",)),
        Job(name="first", function=waits, arguments=()),
        Job(name="second", function=Path.touch, arguments=(tmp_path / "second",), after=("first",)),
        Job(name="never", function=Path.touch, arguments=(tmp_path / "never",), after=("wrong",)),
        Job(name="nor this", function=Path.touch, arguments=(tmp_path / "never",), after=("never",)),
    ]
    message = "failed: wrong; not begun, as they wait for it: never, nor this"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        do_all(jobs, 2)
    os.close(opener)
    assert [record.getMessage() for record in caplog.records] == ["wrong failed"]
    assert "invalid literal for int() with base 10: 'x'" in caplog.text
    assert (tmp_path / "second").exists()
    assert not (tmp_path / "never").exists()


PARENT = """
import os, signal
from ablations.jobs import Job, do_all

def stay():
    print(os.getpid(), flush=True)
    signal.pause()

if __name__ == "__main__":
    do_all([Job(name="stays", function=stay, arguments=())], 2)
"""


@pytest.mark.slow
def test_jobs_end_with_the_process_that_began_them(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, script]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
        try:
            parent.communicate(timeout=60)  # until none of its processes has its output open any more
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGKILL)
            raise
