"""What forcings, long rollouts, sinks, windows and steps do for a student: one suite, on the 64x64 toy world.

It starts from the student of the recipe `toyworld64`. Run as `python benchmarks/training.py --jobs 2`; it
goes on where it was cut off. Runs lie in runs/ablations, figures in benchmarks/training.md, plots in
benchmarks/pictures.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from ablations.jobs import Job, do_all
from ablations.page import Comparison, write_comparison
from ablations.scores import Scores, Trial, judged

from genstream.cli.process import hardware_name
from genstream.cli.recipe import read_recipe
from genstream.cli.report import read_figures
from genstream.io.sections import write_section
from genstream.training.model_settings import ModelRunSettings
from genstream.training.self_forcing import SelfForcingSettings, distill_student
from genstream.training.student import StudentTrainingSettings, train_student
from genstream.training.teacher import TeacherTrainingSettings, train_teacher

PAGE = Path(__file__).with_suffix(".md")
FORCINGS = ("teacher forcing", "diffusion forcing", "self forcing", "self forcing, streaming teacher")
TEACHER_FORCING, DIFFUSION_FORCING, SELF_FORCING, SELF_FORCING_STREAMING = FORCINGS


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything; the tests have a smaller one."""

    recipe: str = "toyworld64"
    teacher_steps: int = 1200
    forcing_steps: int = 400
    distill_steps: int = 200
    mask_steps: int = 1000
    clip_chunks: int = 16
    horizon_chunks: int = 6
    prompts: int = 64
    long_prompts: int = 24
    longest_prompts: tuple[int, ...] = (0, 1, 8, 9, 16, 17, 24, 25)  # two of each shape
    short_s: float = 20.0
    long_s: float = 60.0
    longest_s: float = 600.0
    window_s: float = 4.0
    seeds: tuple[int, ...] = (0, 1, 2)
    horizons: tuple[int, ...] = (1, 4, 20)
    sinks: tuple[int, ...] = (0, 1)
    windows: tuple[int, ...] = (1, 2, 6)
    steps: tuple[int, ...] = (4, 3, 2, 1)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        name: of the run and its folder.
        train: trains with `settings` into a folder.
        settings: of the trainer.
        after: the runs it starts from.
    """

    name: str
    train: Callable[[Any, Path], None]
    settings: Any
    after: tuple[str, ...] = ()


def runs(scale: Scale, output: Path) -> Iterator[Run]:
    """All runs, in an order in which each has what it starts from."""
    stages = {stage.name: stage for stage in read_recipe(scale.recipe, output)}
    for name, after in (("vae", ()), ("text", ()), ("student", ("vae", "text"))):
        yield Run(name=name, train=stages[name].train, settings=stages[name].settings, after=after)
    base: StudentTrainingSettings = stages["student"].settings
    of_models = {field.name: getattr(base, field.name) for field in fields(ModelRunSettings)}
    later = {
        **of_models,
        "initial": str(output / "student"),
        "learning_rate": 1e-3,
        "clip_chunks": scale.clip_chunks,
    }
    teacher = TeacherTrainingSettings(
        **{**later, "total_steps": scale.teacher_steps, "horizon_chunks": scale.horizon_chunks}
    )
    yield Run(name="teacher", train=train_teacher, settings=teacher, after=("student",))
    distilled = SelfForcingSettings(
        teacher=str(output / "teacher"),
        initial=str(output / "student"),
        total_steps=scale.distill_steps,
        batch_size=base.batch_size // 2,
        stream_chunks=scale.horizon_chunks,
        critic_steps=1,
    )
    for times in sorted(scale.horizons[1:], reverse=True):  # the longest first: jobs end together
        longer = replace(distilled, stream_chunks=times * scale.horizon_chunks)
        name = _slug("rollout", times)
        yield Run(name=name, train=distill_student, settings=longer, after=("teacher",))
    for seed in scale.seeds:
        for name in (TEACHER_FORCING, DIFFUSION_FORCING):
            # The method as it is known: its context is the clean video.
            plain = {"forcing": name.split()[0], "context_noise": 0.0, "redrawn": 0.0}
            student = StudentTrainingSettings(
                **{**later, **plain, "total_steps": scale.forcing_steps, "seed": seed}
            )
            yield Run(name=_slug(name, seed), train=train_student, settings=student, after=("student",))
        for name, teacher_run in ((SELF_FORCING, "teacher"), (SELF_FORCING_STREAMING, "student")):
            corrected = replace(distilled, teacher=str(output / teacher_run), seed=seed)
            yield Run(name=_slug(name, seed), train=distill_student, settings=corrected, after=(teacher_run,))
    masks = StudentTrainingSettings(
        **{
            **later,
            "total_steps": scale.mask_steps,
            "window_chunks": max(scale.windows),
            "random_masks": True,
        }
    )
    yield Run(name="masks", train=train_student, settings=masks, after=("student",))


def comparisons(scale: Scale) -> Iterator[Comparison]:
    """All that is judged; a trial that two of them have is judged once."""
    short = _streams(scale, range(scale.prompts), scale.short_s)
    long = _streams(scale, range(scale.long_prompts), scale.long_s)
    longest = _streams(scale, scale.longest_prompts, scale.longest_s)
    forced = {
        name: tuple(Trial(name=f"{name} {seed}", run=_slug(name, seed), **short) for seed in scale.seeds)
        for name in FORCINGS
    }
    yield Comparison(title="Forcing", rows=forced)
    whole = forced[SELF_FORCING][0]
    made_by = {times: whole.run if times == 1 else _slug("rollout", times) for times in scale.horizons}
    rollouts = {
        f"{times} x horizon": (Trial(name=f"rollout {times}", run=run, **long),)
        for times, run in made_by.items()
    }
    yield Comparison(title="Rollout", rows=rollouts)
    masked = {
        f"{sinks} sinks, window {window}": Trial(
            name=f"sinks {sinks} window {window}", run="masks", sinks=sinks, window=window, **long
        )
        for sinks in scale.sinks
        for window in scale.windows
    }
    yield Comparison(title="Sinks and window", rows={label: (trial,) for label, trial in masked.items()})
    extremes = {
        label: (replace(trial, name=f"longest {trial.name}", **longest),)
        for label, trial in [*masked.items()][:: len(masked) - 1]
    }
    yield Comparison(title="Ten minutes", rows=extremes)
    most, *fewer = scale.steps
    steps = {number: replace(whole, name=f"steps {number}", steps=number) for number in fewer}
    rows = {f"{number} of {most}": (trial,) for number, trial in {most: whole, **steps}.items()}
    yield Comparison(title="Steps", rows=rows)


def _streams(scale: Scale, prompts: Sequence[int], seconds: float) -> dict[str, Any]:
    """What trials of the same prompts and length have alike."""
    return {"prompts": tuple(prompts), "seconds": seconds, "window_s": scale.window_s}


def _slug(name: str, number: int) -> str:
    return f"{name.replace(',', '').replace(' ', '_')}_{number}"


def minutes_of(folder: Path) -> float:
    """What a run took so far."""
    logs = [read_figures(path) for path in folder.rglob("log.csv")]
    return sum(log[-1]["seconds"] for log in logs if log) / 60


def write_page(scores: Mapping[str, Scores], minutes: Mapping[str, float], scale: Scale) -> None:
    """Tables and plots of all trials, by name, and what each run took."""
    where = f"Recipe {Path(scale.recipe).name}; {hardware_name(torch.device('cpu'))}"
    rows = [f"| {name} | {taken:.0f} |" for name, taken in minutes.items()]
    write_section(PAGE, "Runs", "\n".join([where, "", "| run | minutes |", "|---|---|", *rows]))
    for comparison in comparisons(scale):
        write_comparison(PAGE, comparison, scores)


def main(arguments: Sequence[str] | None = None, scale: Scale | None = None) -> None:
    """Train, judge, and write the page."""
    scale = scale or Scale()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--jobs", type=int, default=1, help="runs and trials side by side")
    given = parser.parse_args(arguments)
    output = given.output
    planned = list(runs(scale, output))
    training = [
        Job(name=run.name, function=run.train, arguments=(run.settings, output / run.name), after=run.after)
        for run in planned
    ]
    do_all(training, given.jobs)
    trials = {trial.name: trial for each in comparisons(scale) for row in each.rows.values() for trial in row}
    # The longest first, so that jobs end together.
    longest = sorted(trials.values(), key=lambda trial: -trial.seconds * len(trial.prompts))
    judging = [Job(name=trial.name, function=judged, arguments=(trial, output)) for trial in longest]
    minutes = {run.name: minutes_of(output / run.name) for run in planned}
    write_page(do_all(judging, given.jobs), minutes, scale)


if __name__ == "__main__":
    main()
