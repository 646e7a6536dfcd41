"""What forcings, long rollouts, sinks, windows and steps do for a student: one suite, on the 64x64 toy world.

Run as `python benchmarks/training.py --jobs 2`; it goes on where it was cut off. Runs lie in runs/ablations,
figures in benchmarks/training.md, plots in benchmarks/pictures.
"""

import argparse
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from genstream.cli.pipeline import quiet_loading
from genstream.cli.process import hardware_name
from genstream.cli.report import read_figures
from genstream.cli.window_judge import judge_together
from genstream.data.prompts import evaluation_prompts
from genstream.evaluation.drift import drift
from genstream.evaluation.proportion import Proportion
from genstream.io.sections import write_section
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.training.self_forcing import SelfForcingSettings, distill_student
from genstream.training.student import StudentTrainingSettings, train_student
from genstream.training.teacher import TeacherTrainingSettings, train_teacher
from genstream.training.vae import VAETrainingSettings, train_vae

PAGE = Path(__file__).with_suffix(".md")
PICTURES = Path(__file__).parent / "pictures"
METRICS = ("colour", "shape", "direction")
WINDOW_S = 4.0
SEEDS = (0, 1, 2)
FORCINGS = ("teacher forcing", "diffusion forcing", "self forcing")
HORIZONS = (1, 4, 20)
SINKS, WINDOWS = (0, 1), (1, 2, 6)
STEPS = (1, 2, 3, 4)
PLACES = 15
"""Most places in time that a stream's windows are summed up to."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything; the tests have a smaller one."""

    size_px: int = 64
    vae_steps: tuple[int, int] = (1500, 700)
    base_steps: int = 3000
    teacher_steps: int = 1200
    forcing_steps: int = 400
    distill_steps: int = 200
    mask_steps: int = 1000
    batch_size: int = 16
    clips: int = 1024
    width: int = 144
    layers: int = 4
    ffn_width: int = 384
    chunk_frames: int = 3
    horizon_chunks: int = 6
    prompts: int = 64
    long_prompts: int = 24
    longest_prompts: tuple[int, ...] = (0, 8, 16, 24)  # one of each shape
    short_s: float = 20.0
    long_s: float = 60.0
    longest_s: float = 600.0


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


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A student that is streamed and judged.

    Attributes:
        name: of the trial.
        run: that made it.
        prompts: numbers of the evaluation prompts.
        seconds: of each.
        steps: denoising steps; None for all.
        sinks: chunks; None for the student's own.
        window: likewise.
    """

    name: str
    run: str
    prompts: tuple[int, ...]
    seconds: float
    steps: int | None = None
    sinks: int | None = None
    window: int | None = None


def runs(scale: Scale, output: Path) -> Iterator[Run]:
    """All runs, in an order in which each has what it starts from."""
    joint, decoder = scale.vae_steps
    vae = VAETrainingSettings(
        joint_steps=joint,
        decoder_steps=decoder,
        size_px=scale.size_px,
        patch_size=1,
        encoder_width=24,
        decoder_widths=(48, 40, 28, 20),
    )
    yield Run(name="vae", train=train_vae, settings=vae)
    model = {
        "vae": str(output / "vae" / "vae"),
        "size_px": scale.size_px,
        "width": scale.width,
        "layers": scale.layers,
        "ffn_width": scale.ffn_width,
        "chunk_frames": scale.chunk_frames,
        "clips": scale.clips,
        "batch_size": scale.batch_size,
        "clip_chunks": 2 * (max(WINDOWS) + 2),
        "optimizer": "muon",
    }
    base = StudentTrainingSettings(**model, total_steps=scale.base_steps)
    yield Run(name="base", train=train_student, settings=base, after=("vae",))
    later = {**model, "initial": str(output / "base"), "learning_rate": 1e-3}
    teacher = TeacherTrainingSettings(
        **later, total_steps=scale.teacher_steps, horizon_chunks=scale.horizon_chunks
    )
    yield Run(name="teacher", train=train_teacher, settings=teacher, after=("base",))
    distilled = SelfForcingSettings(
        teacher=str(output / "teacher"),
        initial=str(output / "base"),
        total_steps=scale.distill_steps,
        batch_size=scale.batch_size // 2,
        stream_chunks=scale.horizon_chunks,
        critic_steps=1,
    )
    for times in sorted(HORIZONS[1:], reverse=True):  # the longest first: jobs end together
        longer = replace(distilled, stream_chunks=times * scale.horizon_chunks)
        name = _slug("rollout", times)
        yield Run(name=name, train=distill_student, settings=longer, after=("teacher",))
    for seed in SEEDS:
        for name in FORCINGS[:2]:
            student = StudentTrainingSettings(
                **later,
                total_steps=scale.forcing_steps,
                forcing=name.split()[0],
                context_noise=0.0,  # the method as it is known: its context is the clean video
                redrawn=0.0,
                seed=seed,
            )
            yield Run(name=_slug(name, seed), train=train_student, settings=student, after=("base",))
        yield Run(
            name=_slug(FORCINGS[2], seed),
            train=distill_student,
            settings=replace(distilled, seed=seed),
            after=("teacher",),
        )
    masks = StudentTrainingSettings(
        **later, total_steps=scale.mask_steps, window_chunks=max(WINDOWS), random_masks=True
    )
    yield Run(name="masks", train=train_student, settings=masks, after=("base",))


def trials(scale: Scale) -> Iterator[Trial]:
    """All that is judged."""
    short = {"prompts": tuple(range(scale.prompts)), "seconds": scale.short_s}
    long = {"prompts": tuple(range(scale.long_prompts)), "seconds": scale.long_s}
    for forcing in FORCINGS:
        for seed in SEEDS:
            yield Trial(name=f"{forcing} {seed}", run=_slug(forcing, seed), **short)
    for times in HORIZONS:
        run = _slug(FORCINGS[2], 0) if times == 1 else _slug("rollout", times)
        yield Trial(name=f"rollout {times}", run=run, **long)
    for sinks in SINKS:
        for window in WINDOWS:
            yield Trial(
                name=f"sinks {sinks} window {window}", run="masks", sinks=sinks, window=window, **long
            )
    for sinks, window in ((SINKS[0], WINDOWS[0]), (SINKS[-1], WINDOWS[-1])):
        yield Trial(
            name=f"longest sinks {sinks} window {window}",
            run="masks",
            sinks=sinks,
            window=window,
            prompts=scale.longest_prompts,
            seconds=scale.longest_s,
        )
    for steps in STEPS:
        yield Trial(name=f"steps {steps}", run=_slug(FORCINGS[2], 0), steps=steps, **short)


def judged(trial: Trial, output: Path) -> list[dict[str, Any]]:
    """Scores of a trial by window of time; judged once, and kept beside the runs."""
    path = output / "scores" / f"{trial.name.replace(' ', '_')}.json"
    if path.is_file():
        content = json.loads(path.read_text())
        if content["trial"] == json.loads(json.dumps(asdict(trial))):
            return list(content["windows"])
    pipe = CausalVideoPipeline.from_pretrained(output / trial.run / "model")
    if trial.steps is not None:
        steps = pipe.scheduler.config.steps[: trial.steps]
        pipe.scheduler = FewStepScheduler(steps=list(steps), shift=pipe.scheduler.config.shift)
    chunk = pipe.config.chunk_frames
    if trial.sinks is not None and trial.window is not None:
        pipe.register_to_config(sink_frames=trial.sinks * chunk, window_frames=trial.window * chunk)
    known = evaluation_prompts(1 + max(trial.prompts))
    prompts = [known[number] for number in trial.prompts]
    streams = judge_together(pipe, prompts, trial.seconds, WINDOW_S, seed=0)
    windows = [
        {
            "start_s": window.start_s,
            "error": window.colour_error,
            **{name: asdict(getattr(window.adherence, name)) for name in METRICS},
        }
        for window in drift(streams, WINDOW_S)
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"trial": asdict(trial), "windows": windows}, indent=1) + "\n")
    return windows


def summed_up(windows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring windows as one, so that at most `PLACES` are left."""
    size = -(-len(windows) // PLACES)
    groups = [windows[start : start + size] for start in range(0, len(windows), size)]
    return [
        {
            "middle_s": (group[0]["start_s"] + group[-1]["start_s"] + WINDOW_S) / 2,
            "error": sum(window["error"] for window in group) / len(group),
            **{name: asdict(share(group, name)) for name in METRICS},
        }
        for group in groups
    ]


def share(windows: Sequence[dict[str, Any]], name: str) -> Proportion:
    """Successes over some windows."""
    return Proportion(
        successes=sum(window[name]["successes"] for window in windows),
        total=sum(window[name]["total"] for window in windows),
    )


def write_page(scores: dict[str, list[dict[str, Any]]], minutes: dict[str, float], scale: Scale) -> None:
    """Tables and plots of all trials."""
    where = f"{scale.size_px}x{scale.size_px}; {hardware_name(torch.device('cpu'))}"
    rows = [f"| {name} | {taken:.0f} |" for name, taken in minutes.items()]
    write_section(PAGE, "Runs", "\n".join([where, "", "| run | minutes |", "|---|---|", *rows]))
    groups = {
        "Forcing": {name: [scores[f"{name} {seed}"] for seed in SEEDS] for name in FORCINGS},
        "Rollout": {f"{times} x horizon": [scores[f"rollout {times}"]] for times in HORIZONS},
        "Sinks and window": {
            f"{sinks} sinks, window {window}": [scores[f"sinks {sinks} window {window}"]]
            for sinks in SINKS
            for window in WINDOWS
        },
        "Ten minutes": {
            name.removeprefix("longest ").replace(" window", ", window"): [windows]
            for name, windows in scores.items()
            if name.startswith("longest")
        },
        "Steps": {f"{steps} of {max(STEPS)}": [scores[f"steps {steps}"]] for steps in STEPS},
    }
    for title, trials_of in groups.items():
        group = {label: [summed_up(windows) for windows in streams] for label, streams in trials_of.items()}
        picture = f"training_{title.lower().replace(' ', '_')}.png"
        _plot(group, PICTURES / picture)
        write_section(PAGE, title, f"{_table(group)}\n\n![{title}](pictures/{picture})")


def _table(group: dict[str, list[list[dict[str, Any]]]]) -> str:
    lines = ["| | " + " | ".join(f"{name}, first | last" for name in METRICS) + " |"]
    lines.append("|---" * (2 * len(METRICS) + 1) + "|")
    for label, streams in group.items():
        cells = [
            str(share([windows[place] for windows in streams], name)) for name in METRICS for place in (0, -1)
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _plot(group: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Adherence over time with 95 % intervals, and the error of colours."""
    figure = Figure(figsize=(12, 3), layout="constrained")
    panels = figure.subplots(1, len(METRICS) + 1)
    for label, streams in group.items():
        times = [window["middle_s"] for window in streams[0]]
        for axes, name in zip(panels, METRICS, strict=False):
            shares = [share(at_once, name) for at_once in zip(*streams, strict=True)]
            _band(axes, times, shares, label)
        errors = [sum(w["error"] for w in at_once) / len(at_once) for at_once in zip(*streams, strict=True)]
        panels[-1].plot(times, errors, label=label)
    for axes, name in zip(panels, (*METRICS, "colour error, of 255"), strict=True):
        axes.set(title=name, xlabel="s")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def _band(axes: Axes, times: Sequence[float], shares: Sequence[Proportion], label: str) -> None:
    low, high = zip(*(each.interval for each in shares), strict=True)
    (line,) = axes.plot(times, [each.value for each in shares], label=label, marker=".")
    axes.fill_between(times, low, high, color=line.get_color(), alpha=0.15)
    axes.set_ylim(0, 1)


def _slug(name: str, number: int) -> str:
    return f"{name.replace(' ', '_')}_{number}"


def minutes_of(folder: Path) -> float:
    """What a run took so far."""
    logs = [read_figures(path) for path in folder.rglob("log.csv")]
    return sum(log[-1]["seconds"] for log in logs if log) / 60


@dataclass(frozen=True, kw_only=True)
class Job:
    """A call that waits for others: `function(*arguments)` once all of `after` are done."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    after: tuple[str, ...] = ()


def _quietly(job: Job, threads: int | None) -> object:
    """Do a job in this process, telling its name with all it says."""
    if threads is not None:
        torch.set_num_threads(threads)
    quiet_loading()
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s  {job.name}  %(message)s", datefmt="%H:%M:%S", force=True
    )
    logging.info("begins")
    return job.function(*job.arguments)


def do_all(jobs: Sequence[Job], at_once: int) -> dict[str, Any]:
    """Do all jobs, up to `at_once` of them side by side on as many processes; what each returned, by name.

    Models this small gain little from a second thread: two jobs on two cores get 1.4 times as much done as
    one after the other.
    """
    if at_once == 1:
        return {job.name: _quietly(job, None) for job in jobs}
    done: dict[str, Any] = {}
    waiting, running = list(jobs), dict[Future[Any], str]()
    # Processes of their own, started anew: one that was forked would share torch's threads.
    with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn")) as pool:
        while waiting or running:
            ready = [job for job in waiting if done.keys() >= set(job.after)][: at_once - len(running)]
            threads = (os.cpu_count() or 1) // max(1, len(ready) + len(running))
            for job in ready:
                waiting.remove(job)
                running[pool.submit(_quietly, job, max(1, threads))] = job.name
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                done[running.pop(future)] = future.result()
    return done


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
    judging = [Job(name=trial.name, function=judged, arguments=(trial, output)) for trial in trials(scale)]
    # The longest first, so that jobs end together; the page keeps the order of trials().
    judging.sort(key=lambda job: -job.arguments[0].seconds * len(job.arguments[0].prompts))
    scores = do_all(judging, given.jobs)
    by_name = {trial.name: scores[trial.name] for trial in trials(scale)}
    write_page(by_name, {run.name: minutes_of(output / run.name) for run in planned}, scale)


if __name__ == "__main__":
    main()
