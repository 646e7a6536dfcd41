import json

import pytest

from genstream.cli.__main__ import main
from genstream.cli.bench import EnduranceFigures
from genstream.cli.figures import RunClock


def test_first_and_last_minute_are_told_apart():
    clock = RunClock(
        now=iter([0.0, *(float(i) for i in range(1, 241)), *(240 + 2.0 * i for i in range(1, 241))]).__next__
    )
    clock.start()
    for _ in range(480):
        clock.chunk_done(4)
    memory = [*range(880, 1120), *range(890, 1130)]
    turns = RunClock(chunk_s=[3.0, 3.0, 9.0]), RunClock(chunk_s=[9.0, 2.0, 2.0])
    figures = EnduranceFigures.of(clock, memory, turns, "a machine", fps=16)
    assert figures.minutes == 2
    assert figures.chunk_latency_first_minute_s == 1
    assert figures.chunk_latency_last_minute_s == figures.chunk_latency_p95_s == 2
    assert figures.frame_rate == pytest.approx(1920 / 720)
    assert "3000.0 against 2000.0 ms (+50.0 %)" in figures.table()
    assert "(+1.0 %)" in figures.table()


def test_a_stream_is_measured(build_pipeline, tmp_path, capsys):
    pipe = build_pipeline(sink_frames=3, window_frames=3)
    pipe.register_to_config(default_fps=1)
    pipe.save_pretrained(tmp_path / "model")
    arguments = ["bench", "--model", str(tmp_path / "model"), "--minutes", "2", "--json"]
    assert main([*arguments, "--output", str(tmp_path / "table.md")]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert 120 <= figures["frames"] < 132  # whole chunks
    assert figures["chunk_latency_old_s"] > 0 and figures["chunk_latency_new_s"] > 0
    assert figures["memory_last_minute_bytes"] > 2**20
    assert 0 < figures["time_to_first_frame_s"] < figures["start_to_first_frame_s"]
    assert "process memory, median of the last minute" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (["--minutes", "1"], "minutes (--minutes) must be at least 2, got 1.0"),
        (["--minutes", "inf"], "minutes (--minutes) must be at least 2, got inf"),
        (["--output", "no/such/folder.md"], "output must be a markdown file in a folder that"),
        (["--model", "nothing"], "nothing"),
    ],
)
def test_bad_input(wrong, error, capsys):
    assert main(["bench", *wrong]) == 2
    assert error in capsys.readouterr().err
