"""Training on two processes: the same as one with their data together, whole or in shards."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes_worker import Velocities, settings_for
from small_videos import write_video

from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.training import processes
from genstream.training.loop import run

ROOT = Path(__file__).resolve().parents[3]
WORKER = ROOT / "tests" / "processes_worker.py"
MODEL = "--width 48 --layers 1 --ffn-width 48 --text-width 16 --text-layers 1 --patch-size 1".split()
CLIPS = "--clips 4 --evaluation-clips 4 --clip-chunks 6 --chunk-frames 1 --size-px 64".split()
SHORT = "--total-steps 2 --batch-size 2 --precision fp32".split()


def launch(*words: str, shards: bool) -> str:
    """Run a python command line in two processes; gives what it tells."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "ACCELERATE_USE_FSDP": str(shards).lower(),
        "FSDP_VERSION": "2",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests")),
    }
    options = ["--nproc-per-node", "2", "--master-port", str(port)]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "shards"])
def two(request, tmp_path_factory):
    """Folder of a run of two processes."""
    output = tmp_path_factory.mktemp("two")
    launch(str(WORKER), str(output), shards=request.param)
    # Shards are put together where the result is written, and nowhere else.
    whole = [(output / f"weights_{process}.pt").is_file() for process in range(2)]
    assert whole == [True, not request.param]
    return output


@pytest.mark.slow
def test_two_processes_are_one_with_their_data_together(two, tmp_path):
    together = Velocities(ranks=2)
    run(settings_for(), together, tmp_path)
    expected = together.module.state_dict()
    states = [json.loads((two / f"state_{process}.json").read_text()) for process in range(2)]
    noise = [number for state in states for number in state["noise"]]
    assert len(set(noise)) == len(noise) == 8  # by step and by process
    assert all(state["processes"] == 2 for state in states)
    for path in two.glob("weights_*.pt"):
        weights = torch.load(path, weights_only=True)
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=2e-5)
    losses = [
        [float(row.split(",")[1]) for row in (folder / name).read_text().splitlines()[1:]]
        for folder in (two, tmp_path)
        for name in ("log.csv", "evaluation.csv")
    ]
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)
    assert losses[1] == pytest.approx(losses[3], rel=1e-4)
    assert len(losses[0]) == 4


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(two):
    weights = torch.load(two / "weights_0.pt", weights_only=True)
    alone = Velocities()
    run(settings_for(), alone, two)  # finished: nothing is left but to read its checkpoint
    for name, weight in alone.module.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=0)
    rows = (two / "log.csv").read_text().splitlines()
    run(settings_for(total_steps=6), Velocities(), two)
    assert len((two / "log.csv").read_text().splitlines()) == len(rows) + 2


@pytest.mark.slow
def test_a_student_is_distilled_in_shards(build_pipeline, tmp_path):
    build_pipeline().vae.save_pretrained(tmp_path / "vae")
    common = [*MODEL, *CLIPS, *SHORT, "--vae", str(tmp_path / "vae")]
    for part, options in (("student", ["--window-chunks", "1"]), ("teacher", ["--horizon-chunks", "3"])):
        words = ["-m", "genstream.cli", "train", part, *common, *options, "--output", str(tmp_path / part)]
        told = launch(*words, shards=True)
        assert told.count(f"trained model in {tmp_path / part}") == 1
    places = ["--teacher", str(tmp_path / "teacher"), "--initial", str(tmp_path / "student")]
    before = CausalVideoPipeline.from_pretrained(tmp_path / "student" / "model", dtype=torch.float32)
    for objective, more in (("dmd", []), ("gan", ["--clips", "4"])):
        options = ["--stream-chunks", "4", "--critic-steps", "1", "--objective", objective, *more]
        options += ["--output", str(tmp_path / objective)]
        told = launch("-m", "genstream.cli", "distill", "student", *SHORT, *places, *options, shards=True)
        assert told.count("distilled student in") == 1
        pipe = CausalVideoPipeline.from_pretrained(tmp_path / objective / "model", dtype=torch.float32)
        own, old = pipe.transformer.state_dict(), before.transformer.state_dict()
        assert all(weight.isfinite().all() for weight in own.values())
        assert not all(torch.equal(own[name], old[name]) for name in own)
        pipe.set_progress_bar_config(disable=True)
        assert pipe("a red circle", num_frames=9, output_type="pt").frames.isfinite().all()


@pytest.mark.slow
def test_two_processes_learn_from_videos(build_pipeline, tmp_path):
    build_pipeline().save_pretrained(tmp_path / "initial")
    for index in range(3):
        write_video(tmp_path / "videos" / f"{index}.mp4", 40 * index, frames=28, captions="a red elephant")
    words = ["--videos", str(tmp_path / "videos"), "--initial", str(tmp_path / "initial"), *SHORT]
    words += "--evaluation-clips 2 --clip-chunks 4 --chunk-frames 1 --window-chunks 1".split()
    words += ["--output", str(tmp_path / "run")]
    (tmp_path / "videos" / "broken.mp4").touch()
    told = launch("-m", "genstream.cli", "train", "student", *words, shards=True)
    for text in ("clips of 2 videos to train on", "are unknown to the text encoder", "1 of 4 videos skipped"):
        assert told.count(text) == 1
    assert [path.suffix for path in (tmp_path / "latents").rglob("*.*")] == [".safetensors"]
    pipe = CausalVideoPipeline.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_frames=9, output_type="pt").frames.isfinite().all()
    (tmp_path / "run" / "model").rename(tmp_path / "made")
    told = launch("-m", "genstream.cli", "train", "student", *words, shards=True)
    assert told.count("continuing after step 2") == 1
    told = launch("-m", "genstream.cli", "train", "student", *words, shards=True)
    assert told.count("finished before") == 1


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "distributed_type must be .*, got DEEPSPEED: use FSDP"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version must be 2, got 1"),
    ],
)
def test_what_is_not_followed_is_refused(monkeypatch, variables, error):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=error):
        processes.process()


@pytest.mark.parametrize("largest", [0.5, 1e6])
def test_gradients_are_clipped_like_torch_does(largest):
    weights, others = ([torch.nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
    for weight, other in zip(weights, others, strict=True):
        weight.grad = torch.randn(3)
        other.grad = weight.grad.clone()
    processes.clip_gradients(weights, largest)
    torch.nn.utils.clip_grad_norm_(others, largest)
    for weight, other in zip(weights, others, strict=True):
        torch.testing.assert_close(weight.grad, other.grad, rtol=1e-4, atol=1e-6)
