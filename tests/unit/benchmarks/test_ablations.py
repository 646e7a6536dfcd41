"""Trials are streamed as they say, judged once, and their figures reach tables and plots."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ablations import page, scores
from ablations.page import Comparison, Row, write_comparison
from ablations.scores import ERROR, Scores, Trial, judged
from matplotlib.figure import Figure

import benchmarks.training as suite
from genstream.data.prompts import evaluation_prompts
from genstream.evaluation.judge import ClipScore, ObjectScore
from genstream.evaluation.observation import Observation
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler

NAN = float("nan")
TRIAL = Trial(name="a trial", run="student", prompts=(3, 9), seconds=8.0, window_s=4.0)
NOTHING = Observation(objects=(), count=0, background=np.zeros(3, np.float32))


def seen(colour, shape, direction, error):
    return ObjectScore(
        colour=colour,
        shape=shape,
        direction=direction,
        colour_error=error,
        brightness_error=0.0,
        saturation_error=0.0,
    )


def stream(*objects):
    """Windows of a stream, from those of each of its objects."""
    return [
        ClipScore(objects=together, count=True, observation=NOTHING)
        for together in zip(*objects, strict=True)
    ]


# Prompt 3 has one object and prompt 9 two; two windows.
STREAMS = [
    stream([seen(True, False, True, 3.0), seen(True, True, False, 5.0)]),
    stream(
        [seen(True, False, False, 7.0), seen(False, False, False, NAN)],
        [seen(False, True, True, 9.0), seen(True, False, True, 11.0)],
    ),
]


@pytest.fixture
def output(tmp_path, build_pipeline):
    """A folder of runs with one student of four steps, one sink chunk and a window of one."""
    four = FewStepScheduler(steps=(1000.0, 750.0, 500.0, 250.0))
    build_pipeline(scheduler=four).save_pretrained(tmp_path / "student" / "model")
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """What was streamed and judged, in place of doing it."""
    seen = []

    def judge(pipe, prompts, seconds, window_s, seed):
        settings = pipe.settings
        seen.append(
            {
                "captions": [prompt.caption for prompt in prompts],
                "steps": list(pipe.scheduler.config.steps),
                "timesteps": len(pipe.request("a red circle", seconds=1.0).schedule.timesteps),
                "chunks": (
                    settings.sink_frames / settings.chunk_frames,
                    settings.window_frames / settings.chunk_frames,
                ),
                "seconds": (seconds, window_s),
                "seed": seed,
            }
        )
        return STREAMS

    monkeypatch.setattr(scores, "judge_together", judge)
    return seen


@pytest.mark.parametrize(
    ("changes", "steps", "chunks"),
    [
        ({}, [1000, 750, 500, 250], (1, 1)),
        ({"steps": 1}, [1000], (1, 1)),
        ({"steps": 3}, [1000, 750, 500], (1, 1)),
        ({"sinks": 0, "window": 6}, [1000, 750, 500, 250], (0, 6)),
        ({"sinks": 0}, [1000, 750, 500, 250], (0, 1)),
        ({"window": 2}, [1000, 750, 500, 250], (1, 2)),
    ],
)
def test_a_trial_is_streamed_as_it_says(output, calls, changes, steps, chunks):
    judged(replace(TRIAL, **changes), output)
    known = evaluation_prompts(10)
    assert calls == [
        {
            "captions": [known[3].caption, known[9].caption],
            "steps": steps,
            "timesteps": len(steps),
            "chunks": chunks,
            "seconds": (8.0, 4.0),
            "seed": 0,
        }
    ]


def test_scores_are_of_objects_and_windows(output, calls):
    for result in (judged(TRIAL, output), judged(TRIAL, output)):  # judged, and read
        assert result.prompts.tolist() == [3, 9, 9]
        assert result.values["colour"].tolist() == [[1, 1], [1, 0], [0, 1]]
        assert result.values["shape"].tolist() == [[0, 1], [0, 0], [1, 0]]
        assert result.values["direction"].tolist() == [[1, 0], [0, 0], [1, 1]]
        assert result.values["seen"].tolist() == [[1, 1], [1, 0], [1, 1]]
        np.testing.assert_equal(result.values[ERROR], [[3, 5], [7, NAN], [9, 11]])
    assert len(calls) == 1


@pytest.mark.parametrize(("scale", "changes", "evaluations"), [(1, {}, 5), (1, {"steps": 3}, 4), (3, {}, 9)])
def test_scores_tell_what_a_chunk_cost(output, calls, scale, changes, evaluations):
    """A pass for each step, or two with guidance, and the one that makes the chunk part of the past."""
    pipe = CausalVideoPipeline.from_pretrained(output / "student" / "model")
    pipe.register_to_config(guidance_scale=scale)
    pipe.save_pretrained(output / "student" / "model")
    for _ in ("judged", "read"):
        assert judged(replace(TRIAL, **changes), output).evaluations == evaluations


def test_another_trial_of_the_same_name_is_judged(output, calls):
    for trial in (
        TRIAL,
        replace(TRIAL, window=2),
        replace(TRIAL, window_s=2.0),
        replace(TRIAL, prompts=(3, 19)),
    ):
        judged(trial, output)
    assert len(calls) == 4


def test_another_model_in_the_folder_is_judged(output, calls, build_pipeline):
    folder = output / "student" / "model"
    judged(TRIAL, output)
    (folder / "training").mkdir()
    (folder / "training" / "student.csv").write_text("the record does not decide what is drawn")
    judged(TRIAL, output)
    assert len(calls) == 1
    last = build_pipeline(scheduler=FewStepScheduler(steps=(1000.0, 750.0, 500.0, 250.0)))
    with torch.no_grad():
        next(reversed([*last.transformer.parameters()])).view(-1)[-1] += 1
    last.save_pretrained(folder)
    judged(TRIAL, output)
    last.register_to_config(window_frames=6)
    last.save_pretrained(folder)
    judged(TRIAL, output)
    assert len(calls) == 3


def test_what_another_judge_saw_is_judged_again(output, calls, monkeypatch):
    names = {path.name for folder in scores._JUDGING for path in folder.glob("*.py")}
    assert {"judge.py", "observation.py", "scene.py", "toyworld.py"} <= names
    code = output / "code"
    code.mkdir()
    monkeypatch.setattr(scores, "_JUDGING", (code,))
    for text in ("one", "one", "other"):
        (code / "judge.py").write_text(text)
        judged(TRIAL, output)
    assert len(calls) == 2


@pytest.mark.parametrize("older", [{}, {"trial": {"name": "a trial"}, "windows": [{"start_s": 0.0}]}])
def test_score_files_of_an_older_layout_are_judged_again(output, calls, older):
    path = output / "scores" / "a_trial.json"
    path.parent.mkdir()
    path.write_text(json.dumps(older))
    judged(TRIAL, output)
    assert len(calls) == 1
    assert [*path.parent.iterdir()] == [path]
    judged(TRIAL, output)
    assert len(calls) == 1


def made(colour, error):
    """Scores of two prompts with an object each; shape and direction as colour."""
    colour, error = np.array(colour, float), np.array(error, float)
    values = {"colour": colour, "shape": colour, "direction": 1 - colour, ERROR: error}
    values["seen"] = 1.0 - np.isnan(error)
    return Scores(evaluations=9, prompts=np.array([0, 1]), values=values)


FIRST = made([[1, 0, 0], [1, 1, 0]], [[2, 4, 6], [4, 6, NAN]])
SECOND = made([[1, 1, 1], [0, 0, 1]], [[5, 5, 9], [NAN, 5, 5]])
THIRD = made([[0, 1, 0], [0, 0, 1]], [[3, 7, 1], [5, 7, 3]])


def cells(text, label):
    """Means of a row of a table, without intervals, from the time on."""
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [[cell.partition(" (")[0].strip("| ") for cell in row[2:]] for row in rows]


def test_tables_hold_the_first_window_the_last_and_all():
    text = page.table({"one": Row.of([FIRST]), "two": Row.of([SECOND])}, window_s=4.0)
    assert cells(text, "one") == [
        ["0 to 4 s", "100.0", "100.0", "0.0", "100.0", "3.0"],
        ["8 to 12 s", "0.0", "0.0", "100.0", "50.0", "6.0"],
        ["0 to 12 s", "50.0", "50.0", "50.0", "83.3", "4.4"],
    ]
    assert cells(text, "two") == [
        ["0 to 4 s", "50.0", "50.0", "50.0", "50.0", "5.0"],
        ["8 to 12 s", "100.0", "100.0", "0.0", "100.0", "7.0"],
        ["0 to 12 s", "66.7", "66.7", "33.3", "83.3", "5.8"],
    ]


def test_tables_tell_what_a_chunk_costs():
    rows = {"one": Row.of([FIRST, FIRST]), "two": Row.of([replace(SECOND, evaluations=5)] * 2)}
    head, _, first, _, _, second, *_ = page.table(rows, window_s=4.0).splitlines()
    assert head.startswith("| | evaluations per chunk | | colour, % |")
    assert first.startswith("| one | 9 | 0 to 4 s |")
    assert second.startswith("| two | 5 | 0 to 4 s |")
    assert "\n| two | -4 | 0 to 4 s |" in page.differences(rows, window_s=4.0)


def test_seeds_are_averaged():
    text = page.table({"both": Row.of([SECOND, THIRD])}, window_s=4.0)
    assert cells(text, "both") == [
        ["0 to 4 s", "25.0", "25.0", "75.0", "75.0", "4.3"],
        ["8 to 12 s", "75.0", "75.0", "25.0", "100.0", "4.5"],
        ["0 to 12 s", "50.0", "50.0", "50.0", "91.7", "5.0"],
    ]


def test_differences_are_of_the_same_objects():
    rows = {"one": Row.of([FIRST]), "two": Row.of([SECOND]), "three": Row.of([THIRD])}
    text = page.differences(rows, window_s=4.0)
    assert text.startswith("Differences from one, ")
    assert cells(text, "one") == []
    assert cells(text, "two") == [
        ["0 to 4 s", "-50.0", "-50.0", "+50.0", "-50.0", "+3.0"],
        ["8 to 12 s", "+100.0", "+100.0", "-100.0", "+50.0", "+3.0"],
        ["0 to 12 s", "+16.7", "+16.7", "-16.7", "+0.0", "+1.5"],
    ]
    assert cells(text, "three")[1] == ["8 to 12 s", "+50.0", "+50.0", "-50.0", "+50.0", "-5.0"]


def test_an_error_of_nothing_seen_is_none():
    lost = Row.of([made([[0], [0]], [[NAN], [NAN]])])
    ((*_, seen, error),) = cells(page.table({"lost": lost}, window_s=4.0), "lost")  # of one window one row
    assert (seen, error) == ("0.0", "none")
    text = page.differences({"one": Row.of([FIRST]), "lost": lost}, window_s=4.0)
    assert cells(text, "lost")[0][-1] == "none"


def of_prompts(count, errors):
    """Scores of prompts with an object each; the first ones have these errors, the others are unseen."""
    error = np.full((count, 1), NAN)
    error[: len(errors), 0] = errors
    return replace(made(np.ones((count, 1)), error), prompts=np.arange(count))


def test_an_error_of_one_prompt_has_no_interval():
    rows = {"all": Row.of([of_prompts(12, np.arange(12.0))]), "one": Row.of([of_prompts(12, [12.0])])}
    assert page.table(rows, 4.0).endswith("| 12.0 (one prompt) |")
    assert page.differences(rows, 4.0).endswith("| +12.0 (one prompt) |")


def test_narrow_intervals_are_told_by_the_prompts_that_have_an_error():
    def said(*numbers):
        rows = {str(number): Row.of([of_prompts(12, np.arange(float(number)))]) for number in numbers}
        return page.notes(Comparison(title="Any", rows={"any": (TRIAL,)}), rows)

    assert said(12, 10).endswith(" direction.")
    assert said(12, 1).endswith(" direction.")  # which has no interval
    narrow = "The fewest prompts of an error are {}: of so few, intervals of the error are too narrow."
    assert said(12, 9).endswith(narrow.format(9))
    assert said(12, 3, 1, 4).endswith(narrow.format(3))


def test_intervals_of_tables_have_the_width_of_prompts():
    """Ten moments of two prompts are not twenty prompts, nor are ten objects."""
    ten = made(np.repeat([[1], [0]], 10, axis=1), np.repeat([[1.0], [9.0]], 10, axis=1))
    objects = made(np.repeat([[1], [0]], 10, axis=0), np.repeat([[1.0], [9.0]], 10, axis=0))
    objects = replace(objects, prompts=np.repeat([0, 1], 10))
    text = page.table({"ten": Row.of([ten])}, window_s=4.0)
    assert "| 50.0 (16.7 to 83.3) |" in text
    assert "| 5.0 (1.0 to 9.0) |" in text
    text = page.table({"ten": Row.of([objects])}, window_s=4.0)
    assert "| 50.0 (16.7 to 83.3) |" in text
    assert "| 5.0 (1.0 to 9.0) |" in text


def test_long_streams_are_summed_up():
    assert page.places(3) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert page.places(15) == [slice(place, place + 1) for place in range(15)]
    assert page.places(16) == [slice(start, start + 2) for start in range(0, 16, 2)]
    assert page.places(31)[-1] == slice(30, 31)
    windows = np.arange(32.0)
    row = Row.of([made(np.zeros((2, 32)), np.stack([windows, windows]))])
    text = page.table({"long": row}, window_s=4.0)
    assert [(time, error) for time, *_, error in cells(text, "long")] == [
        ("0 to 12 s", "1.0"),
        ("120 to 128 s", "30.5"),
        ("0 to 128 s", "15.5"),
    ]


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were written."""
    figures = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **_: figures.append((figure, Path(path).name))
    )
    return figures


def test_plots_show_means_and_bands(drawn):
    rows = {"one": Row.of([FIRST]), "two": Row.of([SECOND])}
    page.draw(rows, 4.0, Path("somewhere.png"))
    ((figure, name),) = drawn
    assert name == "somewhere.png"
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert [*panels] == ["colour", "shape", "direction", "seen", "colour error, of 255", ""]
    lines = panels["colour error, of 255"].get_lines()
    assert [line.get_xdata().tolist() for line in lines] == [[2, 6, 10]] * 2
    assert [line.get_ydata().tolist() for line in lines] == [[3, 5, 6], [5, 5, 7]]
    assert [line.get_ydata().tolist() for line in panels["colour"].get_lines()] == [
        [1, 0.5, 0],
        [0.5, 0.5, 1],
    ]
    for axes in [*panels.values()][:5]:
        assert [line.get_label() for line in axes.get_lines()] == ["one", "two"]
        assert len(axes.collections) == 2
    band = panels["colour error, of 255"].collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == (2, 6)
    assert [text.get_text() for text in panels[""].get_legend().get_texts()] == ["one", "two"]


def test_the_band_of_one_prompt_is_left_out(drawn):
    wide = made([[1, 1], [1, 1]], [[2, 4], [4, NAN]])
    page.draw({"one": Row.of([wide])}, 4.0, Path("somewhere.png"))
    ((figure, _),) = drawn
    axes = next(axes for axes in figure.axes if axes.get_title() == "colour error, of 255")
    assert axes.get_lines()[0].get_ydata().tolist() == [3, 4]
    (band,) = axes.collections[0].get_paths()
    assert band.get_extents().xmax == 2  # the second place, at 6 s, has none


def test_each_row_has_the_scores_of_its_trials(tmp_path, drawn):
    trials = {name: replace(TRIAL, name=name) for name in ("a 0", "a 1", "b 0", "b 1")}
    comparison = Comparison(
        title="Of two", rows={"a": (trials["a 0"], trials["a 1"]), "b": (trials["b 0"], trials["b 1"])}
    )
    of = {"a 0": FIRST, "a 1": FIRST, "b 0": SECOND, "b 1": THIRD}
    write_comparison(tmp_path / "page.md", comparison, of)
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("## Of two\n\n2 prompts with 2 objects, 8 s each; 2 runs of each kind, ")
    assert "The VAE, the base and the teacher are one each: seeds cover the short runs alone." in text
    assert "intervals of the error are too narrow" in text
    assert [row[1] for row in cells(text, "a")] == ["100.0", "0.0", "50.0"]
    assert [row[1] for row in cells(text, "b")] == ["25.0", "75.0", "50.0", "-75.0", "+75.0", "+0.0"]
    assert text.endswith("![Of two](pictures/training_of_two.png)\n")
    assert drawn[0][1] == "training_of_two.png"


def test_a_single_run_tells_nothing_of_other_trainings():
    rows = {"one": Row.of([FIRST])}
    text = page.notes(Comparison(title="One", rows={"one": (TRIAL,)}), rows)
    assert (
        "one training of each student, and of VAE, base and teacher: intervals tell of other prompts, "
        in text
    )


def test_what_the_suite_compares():
    compared = {each.title: each for each in suite.comparisons(suite.Scale())}
    trials = [trial for each in compared.values() for row in each.rows.values() for trial in row]
    by_name = {trial.name: trial for trial in trials}
    assert all(by_name[trial.name] == trial for trial in trials)
    for each in compared.values():
        (alike,) = {
            (trial.prompts, trial.seconds, trial.window_s) for row in each.rows.values() for trial in row
        }
        assert alike == (each.first.prompts, each.first.seconds, 4.0)
    made_by = {run.name for run in suite.runs(suite.Scale(), Path("runs"))}
    assert {trial.run for trial in trials} == made_by - {"vae", "text", "student", "teacher"}
    assert [len(row) for row in compared["Forcing"].rows.values()] == 4 * [3]
    assert {label: row[0].run for label, row in compared["Rollout"].rows.items()} == {
        "1 x horizon": "self_forcing_0",
        "4 x horizon": "rollout_4",
        "20 x horizon": "rollout_20",
    }
    assert [(row[0].sinks, row[0].window) for row in compared["Sinks and window"].rows.values()] == [
        (0, 1),
        (0, 2),
        (0, 6),
        (1, 1),
        (1, 2),
        (1, 6),
    ]
    assert [(row[0].sinks, row[0].window) for row in compared["Ten minutes"].rows.values()] == [
        (0, 1),
        (1, 6),
    ]
    assert compared["Ten minutes"].first.seconds == 600
    assert {label: row[0].steps for label, row in compared["Steps"].rows.items()} == {
        "4 of 4": None,
        "3 of 4": 3,
        "2 of 4": 2,
        "1 of 4": 1,
    }
    assert compared["Steps"].first is compared["Forcing"].rows["self forcing"][0]  # judged once
    known = evaluation_prompts(1 + max(compared["Ten minutes"].first.prompts))
    shapes = [known[number].scene.objects[0].shape for number in compared["Ten minutes"].first.prompts]
    assert sorted(shapes) == sorted(2 * ["circle", "square", "triangle", "star"])
