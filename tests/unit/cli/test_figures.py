"""Figures and progress lines from an injected clock."""

import json
from dataclasses import asdict

import pytest

from genstream.cli.clip import GeneratePlan
from genstream.cli.figures import RunClock, RunFigures
from genstream.cli.process import peak_memory_bytes, seconds_since_process_start
from genstream.cli.progress import PlainLines

PLAN = GeneratePlan(prompt="p", width=64, height=32, fps=16, seed=3, num_frames=None, seconds=2, switches=())


def clock_at(*times: float) -> RunClock:
    return RunClock(now=iter(times).__next__)


def test_figures():
    clock = clock_at(10.0, 10.5, 10.75, 11.0)
    clock.start()
    for frames in (9, 12, 11):
        clock.chunk_done(frames)
    figures = RunFigures.of(PLAN, clock, output="out.mp4", model="tiny", load_s=1.0)
    assert figures.frames == 32
    assert figures.seconds == 2
    assert figures.time_to_first_frame_s == 0.5
    assert figures.frame_rate == 32
    assert figures.real_time_factor == 2
    assert (figures.chunk_latency_p50_s, figures.chunk_latency_p95_s) == (0.25, 0.5)
    assert json.loads(json.dumps(asdict(figures)))["seed"] == 3


def test_figures_of_nothing():
    clock = clock_at(10.0)
    clock.start()
    figures = RunFigures.of(PLAN, clock, output="out.mp4", model="tiny", load_s=1.0)
    assert (figures.frames, figures.frame_rate, figures.time_to_first_frame_s) == (0, 0, None)


def test_plain_lines_come_seldom(capsys: pytest.CaptureFixture[str]):
    clock = clock_at(*range(30))
    clock.start()
    with PlainLines(total=24 * 12, fps=16) as progress:
        for _ in range(24):
            clock.chunk_done(12)
            progress.show(clock)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split()[0] for line in lines] == [
        "12/288",
        "72/288",
        "132/288",
        "192/288",
        "252/288",
        "288/288",
    ]
    assert lines[0].endswith("12.0 fps, 0.75x real time, first frame after 1.00 s")


def test_process():
    assert 0 < seconds_since_process_start() < 24 * 3600
    assert peak_memory_bytes() > 10_000_000
