"""`genstream distill --recipe`: a chain of training runs, from nothing to a model."""

import errno
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from retraining import retrain

from genstream.cli import distill, report
from genstream.cli.__main__ import main
from genstream.cli.recipe import Stage, read_recipe
from genstream.cli.trainers import Trainer, known_recipes
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.training import processes, self_forcing
from genstream.training.record import Training, write_record
from genstream.training.vae import VAETrainingSettings

MODEL = {"width": 48, "layers": 1, "ffn_width": 48, "text_width": 16, "text_layers": 1, "patch_size": 1}
CLIPS = {
    "vae": "vae/vae",
    "clips": 4,
    "evaluation_clips": 4,
    "clip_chunks": 6,
    "size_px": 64,
    "chunk_frames": 1,
}
SHORT = {"total_steps": 2, "batch_size": 2}
CONFIGS = {
    "vae": {
        "joint_steps": 1,
        "decoder_steps": 1,
        "clips": 4,
        "size_px": 64,
        "latent_channels": 12,
        "encoder_width": 12,
        "decoder_widths": [12, 12, 12, 12],
    },
    "text": {**SHORT, "width": 16, "layers": 1},
    "student": {**MODEL, **CLIPS, **SHORT, "text_encoder": "text", "window_chunks": 1},
    "teacher": {**MODEL, **CLIPS, **SHORT, "initial": "student", "horizon_chunks": 3, "sampling_steps": 2},
    "causal": {
        **SHORT,
        "teacher": "teacher",
        "trajectories": 17,
        "num_steps": 2,
        "substeps": 1,
        "chunk_frames": 1,
        "window_chunks": 1,
    },
    "distilled": {**SHORT, "teacher": "teacher", "initial": "causal", "stream_chunks": 3, "critic_steps": 1},
}
COMMANDS = {
    "vae": "train vae",
    "text": "train text",
    "student": "train student",
    "teacher": "train teacher",
    "causal": "distill causal",
    "distilled": "distill student",
}


@pytest.fixture
def folder(tmp_path):
    """A recipe with all kinds of stages, in tiny."""
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "recipe.json").write_text(json.dumps({"description": "all stages", "stages": COMMANDS}))
    for name, config in CONFIGS.items():
        (path / f"{name}.json").write_text(json.dumps(config))
    return path


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_chain_that_was_cut_off_goes_on_to_a_model_and_a_report(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "_PROMPTS", 3)
    monkeypatch.setattr(report, "_SECONDS", 1.0)
    output = tmp_path / "runs"
    command = ["distill", "--recipe", str(folder), "--output", str(output)]

    def killed(trainee, step):
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(self_forcing.SelfForcingTrainee, "loss", killed)
        with pytest.raises(Killed):
            main(command)
    before = {path: path.read_text() for path in output.rglob("log.csv")}
    assert len(before) == 6
    assert main(command) == 0
    assert all(path.read_text() == text for path, text in before.items())
    printed = capsys.readouterr().out
    assert printed == f"model: {output / 'model'}\nreport: {output / 'report.md'}\n"
    pipe = CausalVideoPipeline.from_pretrained(output / "model")
    assert pipe.settings.window_frames == 1
    records = {path.stem for path in (output / "model" / "training").glob("*.json")}
    assert records == set(CONFIGS)
    text = (output / "report.md").read_text()
    for name in CONFIGS:
        assert f"| {name} | `genstream {COMMANDS[name]}` | 2 |" in text
    whole = "0.562"  # 9 frames, all that this teacher sees together
    for name, seconds in (("student", 1), ("teacher", whole), ("causal", 1), ("distilled", 1)):
        assert f"## {name}\n\n3 prompts, {seconds} s each: colour " in text
        assert (output / f"{name}.png").is_file()
    assert (output / "curves.png").is_file()
    retrain(output / "vae")
    assert main(command) == 2
    student, vae = output / "student", output / "vae" / "vae"
    error = f"vae must hold what the run in '{student}' is made from, got something else in '{vae}'"
    assert error in capsys.readouterr().err


ROWS = "step,loss,learning_rate,seconds\n10,0.5,0.001,60\n20,{last},0.001,120\n"


def stage(name, command):
    return Stage(name=name, command=command, settings=None, train=lambda settings, output: None)


def logs_of(run, *phases, last="0.25"):
    """Logs of a run, one in each folder of a phase."""
    paths = [run / phase / "log.csv" for phase in phases]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROWS.format(last=last))
    return paths


def keep_only_the_result(run, result, name, part, logs):
    """What is left of a finished run when all but its result has been removed."""
    (run / result).mkdir(exist_ok=True)
    settings = VAETrainingSettings()
    training = Training(name=name, part=part, run=run, settings=settings, logs=logs, steps=20)
    write_record(run / result, training)
    for log in logs.values():
        log.unlink()


@pytest.fixture
def curves(monkeypatch):
    """Plots that were drawn, by title."""
    drawn = {}
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: drawn.update({a.get_title(): a for a in figure.axes})
    )
    return drawn


def test_a_report_reads_the_logs_of_finished_runs_in_their_records(tmp_path, curves):
    joint, decoder = logs_of(tmp_path / "pixels", "joint", "decoder", last="0.125")
    keep_only_the_result(
        tmp_path / "pixels", "vae", "vae", "vae", {"vae_joint": joint, "vae_decoder": decoder}
    )
    (log,) = logs_of(tmp_path / "student", "")
    shutil.copytree(tmp_path / "pixels" / "vae" / "training", tmp_path / "student" / "model" / "training")
    keep_only_the_result(tmp_path / "student", "model", "student", "student", {"student": log})
    logs_of(tmp_path / "text", "")
    stages = [stage("pixels", "train vae"), stage("text", "train text"), stage("student", "train student")]
    text = report.write_report(stages, tmp_path).read_text()
    assert "| pixels | `genstream train vae` | 40 | 4 |" in text
    for name in ("text", "student"):
        assert f"| {name} | `genstream train {name}` | 20 | 2 |" in text
    assert text.endswith("\n\n![Curves](curves.png)\n\n")
    ends = {title: axes.get_lines()[0].get_ydata()[-1] for title, axes in curves.items()}
    assert ends == {"pixels decoder": 0.125, "pixels joint": 0.125, "text": 0.25, "student": 0.25}


def test_a_report_without_logs_says_so(tmp_path, curves):
    (tmp_path / "vae" / "vae").mkdir(parents=True)
    stages = [stage("vae", "train vae"), stage("text", "train text")]
    text = report.write_report(stages, tmp_path).read_text()
    assert "| vae | `genstream train vae` | unknown | unknown |" in text
    assert text.endswith("\n\nCurves are left out of what has no log any more: vae, text.\n\n")
    assert not curves
    logs_of(tmp_path / "text", "")
    text = report.write_report(stages, tmp_path).read_text()
    assert "| text | `genstream train text` | 20 | 2 |" in text
    assert "![Curves](curves.png)\n\nCurves are left out of what has no log any more: vae.\n" in text
    assert [*curves] == ["text"]


@pytest.mark.parametrize(("last", "scale"), [("0.25", "log"), ("-0.25", "symlog"), ("0", "symlog")])
def test_curves_show_all_losses(tmp_path, curves, last, scale):
    logs_of(tmp_path / "distilled", "", last=last)
    report.write_report([stage("distilled", "distill student")], tmp_path)
    assert curves["distilled"].get_yscale() == scale


@pytest.mark.parametrize(("rows", "marker"), [(2, "None"), (1, ".")])
def test_a_log_of_one_row_can_be_seen(tmp_path, curves, rows, marker):
    (log,) = logs_of(tmp_path / "text", "")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[: 1 + rows]))
    report.write_report([stage("text", "train text")], tmp_path)
    assert {line.get_marker() for line in curves["text"].get_lines()} == {marker}


@pytest.mark.parametrize(("window", "chunks", "frames"), [(0, 2, 21), (0, 40, 64), (3, 2, 64), (None, 2, 64)])
def test_a_model_of_whole_clips_is_judged_on_one(
    build_pipeline, monkeypatch, tmp_path, window, chunks, frames
):
    pipe = build_pipeline(chunk_frames=3 * chunks, window_frames=window, sink_frames=0)
    judged = []
    monkeypatch.setattr(report, "_PROMPTS", 1)
    monkeypatch.setattr(
        report, "judge_together", lambda pipe, prompts, seconds, *_, seed: judged.append(seconds) or []
    )
    monkeypatch.setattr(report, "_frames", lambda *_: np.zeros((2, 8, 8, 3), np.uint8))
    text = "\n".join(report._section("teacher", pipe, tmp_path))
    assert [round(seconds * pipe.config.default_fps) for seconds in judged] == [frames]
    assert f"1 prompts, {judged[0]:.3g} s each" in text


def test_a_full_disk_costs_no_report(tmp_path, monkeypatch):
    path = report.write_report([stage("text", "train text")], tmp_path)
    before = path.read_text()

    def write_half(self, text, **how):
        with self.open("w") as file:
            file.write(text[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", write_half)
    with pytest.raises(OSError, match="No space left"):
        report.write_report([stage("text", "train text"), stage("vae", "train vae")], tmp_path)
    assert path.read_text() == before


@pytest.fixture
def chain(folder, monkeypatch):
    """A recipe of one stage that is known to make a model, and has nothing to report."""
    (folder / "recipe.json").write_text(json.dumps({"stages": {"vae": "train vae"}}))

    def train(settings, output):
        (output / "model").mkdir(parents=True, exist_ok=True)
        (output / "model" / "model_index.json").touch()

    monkeypatch.setattr(Trainer, "load", lambda trainer: (VAETrainingSettings, train))
    monkeypatch.setattr(report, "write_report", lambda stages, output: output / "report.md")
    return folder


@pytest.mark.parametrize("is_main_process", [True, False])
def test_one_process_copies_the_model_and_writes_the_report(
    chain, tmp_path, monkeypatch, capsys, is_main_process
):
    state = SimpleNamespace(is_main_process=is_main_process, wait_for_everyone=lambda: None)
    monkeypatch.setattr(processes, "process", lambda: state)
    assert main(["distill", "--recipe", str(chain), "--output", str(tmp_path / "runs")]) == 0
    assert (tmp_path / "runs" / "model").is_dir() is is_main_process
    printed = f"model: {tmp_path / 'runs' / 'model'}\nreport: {tmp_path / 'runs' / 'report.md'}\n"
    assert capsys.readouterr().out == (printed if is_main_process else "")


@pytest.mark.parametrize("killed_while", ["copytree", "rmtree"])
def test_a_kill_never_leaves_half_of_a_model(chain, tmp_path, monkeypatch, killed_while):
    output = tmp_path / "runs"
    command = ["distill", "--recipe", str(chain), "--output", str(output)]
    made, model = output / "vae" / "model", output / "model"
    for folder in (made, model):
        folder.mkdir(parents=True)
        for name in ("model_index.json", "weights"):
            (folder / name).write_text(f"{name} of {folder}")

    def copy_half(source, target):
        target.mkdir()
        (target / "model_index.json").touch()
        raise Killed

    def remove_half(folder, **how):
        if folder.is_dir():
            (folder / "weights").unlink()
            raise Killed

    with monkeypatch.context() as context:
        context.setattr(shutil, killed_while, {"copytree": copy_half, "rmtree": remove_half}[killed_while])
        with pytest.raises(Killed):
            main(command)
    assert (model / "weights").is_file() or not (model / "model_index.json").exists()
    assert main(command) == 0
    assert (model / "weights").read_text() == f"weights of {made}"
    assert [*output.glob("*partial*")] == []


def test_a_recipe_in_this_folder_has_the_name_of_it(chain, monkeypatch, capsys):
    monkeypatch.chdir(chain)
    assert main(["distill", "--recipe", "."]) == 0
    assert capsys.readouterr().out.startswith("model: runs/tiny/model\n")


def test_commands_of_a_chain_find_what_the_ones_before_wrote(folder):
    made: list[str] = []
    for stage in read_recipe(str(folder), Path("runs/tiny")):
        verb, part = stage.command.split()
        run = Path("runs/tiny") / stage.name
        training = Training(name="", part=part, verb=verb, run=run, settings=stage.settings, logs={}, steps=1)
        words = shlex.split(training.command)
        options = dict(zip(words[3::2], words[4::2], strict=True))
        made.append(options["--output"])
        for option in ("--vae", "--text-encoder", "--initial", "--teacher"):
            assert option not in options or options[option].startswith(tuple(made[:-1]))
    assert made == [f"runs/tiny/{name}" for name in COMMANDS]


def test_all_recipes_inside_the_package_fit_their_commands(tmp_path):
    assert {"toyworld"} <= set(known_recipes())
    for name in known_recipes():
        stages = read_recipe(name, tmp_path)
        assert stages[-1].command == "distill student"
        for stage in stages:
            for place in ("vae", "initial", "text_encoder", "teacher"):
                if (value := getattr(stage.settings, place, None)) is not None:
                    earlier = value.removeprefix(f"{tmp_path}/").split("/")[0]
                    assert earlier in [other.name for other in stages[: stages.index(stage)]]


def test_help_names_all_recipes(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"--recipe RECIPE {', '.join(known_recipes())}, or a folder with a recipe.json" in text


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"stages": {}}, "must name at least one, got {}"),
        ({"stages": {"vae": "train it"}}, "command of stage 'vae' must be one of train vae, train text"),
        ({"stages": {"other": "train vae"}}, "other.json' is missing"),
        (
            {"stages": {"model": "train vae"}},
            "must have names like a_b_1, but not model or latents, got 'model'",
        ),
        ({"stages": {"../vae": "train vae"}}, "must have names like a_b_1, but not model or latents"),
        (
            {"stages": {"student": "train student"}},
            "vae of stage 'student' must be in the folder of an earlier",
        ),
        (
            {"stages": {"vae": "train vae", "teacher": "train teacher"}},
            "initial of stage 'teacher' must be in the folder of an earlier stage (vae) or an installed "
            "model, got 'student'",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(folder, tmp_path, capsys, change, error):
    (folder / "recipe.json").write_text(json.dumps(change))
    assert main(["distill", "--recipe", str(folder), "--output", str(tmp_path / "runs")]) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--recipe", "nothing"], "recipe must be one of"),
        ([], "distill needs a part or --recipe"),
        (["--recipe", "toyworld", "vae"], "--recipe runs a whole chain, without a part, got distill vae"),
    ],
)
def test_wrong_usage(arguments, error, capsys):
    assert main(["distill", *arguments]) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("distilled", {"stream_chunks": 2}, "stage 'distilled': stream_chunks must be at least 3, what the"),
        ("causal", {"chunk_frames": 2}, "stage 'causal': chunk_frames must divide 3, the teacher's frames"),
        (
            "causal",
            {"window_chunks": 2},
            "stage 'causal': the teacher's chunks of 1 frames must be",
        ),
        (
            "teacher",
            {"horizon_chunks": 2},
            "stage 'causal': the teacher's chunks of 1 frames must be",
        ),
        ("distilled", {"teacher": "toyworld"}, "stage 'distilled': initial must have chunks of 3 like the"),
        ("distilled", {"teacher": "student", "stream_chunks": 2}, "stage 'distilled': stream_chunks must be"),
    ],
)
def test_stages_that_do_not_fit_each_other_are_refused_before_anything_runs(
    folder, tmp_path, name, change, error
):
    assert len(read_recipe(str(folder), tmp_path / "runs")) == len(COMMANDS)
    (folder / f"{name}.json").write_text(json.dumps({**CONFIGS[name], **change}))
    with pytest.raises(ValueError, match=f"^{error}"):
        read_recipe(str(folder), tmp_path / "runs")


def test_prompts_and_videos_lie_in_the_folder_of_the_recipe(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (folder / "videos").mkdir()
    for name, data in (
        ("distilled", {"prompts": "asked.txt"}),
        ("student", {"videos": "videos", "initial": "toyworld"}),
    ):
        config = folder / f"{name}.json"
        kept = {key: value for key, value in CONFIGS[name].items() if "videos" not in data or key in SHORT}
        config.write_text(json.dumps({**kept, **data}))
    command = ["distill", "--recipe", "tiny", "--output", "runs"]
    assert main(command) == 2
    assert "prompts must be a text file, got 'tiny/asked.txt'" in capsys.readouterr().err
    (folder / "asked.txt").write_text("a red circle moving right\n")
    settings = {stage.name: stage.settings for stage in read_recipe("tiny", tmp_path / "runs")}
    assert settings["distilled"].prompts == "tiny/asked.txt"
    assert settings["student"].videos == "tiny/videos"
    assert read_recipe(str(folder), tmp_path / "runs")[-1].settings == settings["distilled"]
    (folder / "videos").rmdir()
    assert main(command) == 2
    assert "videos of stage 'student' must be a folder, got 'tiny/videos'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    (folder / "asked.txt").unlink()
    for name in CONFIGS:  # what has begun may be finished, which is kept without them
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert {stage.name: stage.settings for stage in read_recipe("tiny", tmp_path / "runs")} == settings


def test_a_chain_that_ends_in_another_part_names_no_model(chain, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Trainer, "load", lambda trainer: (VAETrainingSettings, lambda settings, output: None))
    assert main(["distill", "--recipe", str(chain), "--output", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'runs' / 'report.md'}\n"


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (KeyboardInterrupt, "interrupted; the same command goes on from the last checkpoint\n"),
        (MemoryError("no more"), "out of memory: use smaller batches (no more)\n"),
    ],
)
def test_what_to_do_after_a_broken_training(chain, monkeypatch, tmp_path, capsys, failure, error):
    def train(settings, output):
        raise failure

    monkeypatch.setattr(Trainer, "load", lambda trainer: (VAETrainingSettings, train))
    command = ["distill", "--recipe", str(chain), "--output", str(tmp_path / "runs")]
    assert main(command) != 0
    assert capsys.readouterr().err.endswith(error)
    if failure is KeyboardInterrupt:  # which --debug leaves as it is
        assert main(["--debug", *command]) != 0
        assert capsys.readouterr().err.endswith(error)


def test_nothing_goes_on_after_a_dry_run(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "dry_run", interrupted)
    assert main(["distill", "student", "--teacher", "a", "--initial", "b", "--dry-run"]) != 0
    assert capsys.readouterr().err == "genstream: interrupted\n"


def test_a_wrong_setting_is_refused_before_anything_runs(folder, tmp_path, capsys):
    (folder / "distilled.json").write_text('{"teachers": "teacher"}')
    assert main(["distill", "--recipe", str(folder), "--output", str(tmp_path / "runs")]) == 2
    assert "has no setting 'teachers'" in capsys.readouterr().err
    (folder / "distilled.json").write_text('{"initial": "student"}')
    assert main(["distill", "--recipe", str(folder), "--output", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err  # not what some other chain left in runs/teacher
    assert "teacher of stage 'distilled' must be in the folder of an earlier stage" in error
    assert not (tmp_path / "runs").exists()
