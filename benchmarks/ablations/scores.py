"""What the judge saw in the streams of a trial, kept in a file beside the runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import genstream.data
import genstream.evaluation
from genstream.cli.window_judge import judge_together
from genstream.data.prompts import EvaluationPrompt, evaluation_prompts
from genstream.evaluation.judge import ClipScore
from genstream.io.digest import folder_digest
from genstream.io.model_folder import RESULT_FOLDER
from genstream.io.partial import write_whole
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.training.record import RECORD_FOLDER

JUDGED = ("colour", "shape", "direction")
SEEN = "seen"
SHARES = (*JUDGED, SEEN)
ERROR = "colour error"
_SEED = 0
_JUDGING = tuple(Path(package.__file__).parent for package in (genstream.data, genstream.evaluation))
"""Folders of the code that draws the worlds and judges."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A student that is streamed and judged.

    Attributes:
        name: of the trial.
        run: that made it.
        prompts: numbers of the evaluation prompts.
        seconds: of each.
        window_s: seconds that are judged at a time.
        steps: denoising steps, the first ones of its schedule; None for all.
        sinks: chunks; None for the student's own.
        window: likewise.
    """

    name: str
    run: str
    prompts: tuple[int, ...]
    seconds: float
    window_s: float
    steps: int | None = None
    sinks: int | None = None
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was right about every object that was asked for, window by window.

    Attributes:
        evaluations: of the model, for each chunk of a stream.
        prompts: number of the prompt that each object is of, [objects].
        values: of each of SHARES 0 or 1; of ERROR of 255, NaN where the object was not seen; [objects, W].
    """

    evaluations: int
    prompts: NDArray[np.int64]
    values: Mapping[str, NDArray[np.float64]]


def judged(trial: Trial, output: Path) -> Scores:
    """Scores of a trial; judged once, and again where the model, the trial or the judge is another one."""
    path = output / "scores" / f"{trial.name.replace(' ', '_')}.json"
    folder = output / trial.run / RESULT_FOLDER
    known = evaluation_prompts(1 + max(trial.prompts))
    prompts = [known[number] for number in trial.prompts]
    made_from = _made_from(trial, folder, prompts)
    content = json.loads(path.read_text()) if path.is_file() else {}
    if content.get("made_from") != made_from:
        pipe = student(trial, folder)
        request = pipe.request(prompts[0].caption, seconds=trial.seconds)
        streams = judge_together(pipe, prompts, trial.seconds, trial.window_s, seed=_SEED)
        content = {
            "made_from": made_from,
            "evaluations": pipe.engine.evaluations_per_chunk(request),
            **_content(trial.prompts, streams),
        }
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(content) + "\n")
    values = {name: np.array(content[name], dtype=np.float64) for name in (*JUDGED, ERROR)}
    values[SEEN] = 1.0 - np.isnan(values[ERROR])
    return Scores(evaluations=content["evaluations"], prompts=np.array(content["prompts"]), values=values)


def student(trial: Trial, folder: Path) -> CausalVideoPipeline:
    """The trial's model, with the steps, sinks and window that it is tried with."""
    pipe = CausalVideoPipeline.from_pretrained(folder)
    if trial.steps is not None:
        steps = list(pipe.scheduler.config.steps[: trial.steps])
        pipe.scheduler = FewStepScheduler.from_config(pipe.scheduler.config, steps=steps)
    changes = {"sink_frames": trial.sinks, "window_frames": trial.window}
    pipe.register_to_config(
        **{name: chunks * pipe.config.chunk_frames for name, chunks in changes.items() if chunks is not None}
    )
    return pipe


def _made_from(trial: Trial, folder: Path, prompts: Sequence[EvaluationPrompt]) -> dict[str, Any]:
    """All that decides the scores, as json gives it back; of model and judge hashes of their files."""
    about = {
        "trial": asdict(trial),
        "captions": [prompt.caption for prompt in prompts],
        "seed": _SEED,
        "model": folder_digest(folder, without=RECORD_FOLDER),
        "judging": [folder_digest(code, without="__pycache__") for code in _JUDGING],
    }
    return dict(json.loads(json.dumps(about)))


def _content(numbers: Sequence[int], streams: Sequence[Sequence[ClipScore]]) -> dict[str, Any]:
    """Scores as they are written: objects that were not seen have None as their error."""
    objects = [
        (number, windows)
        for number, stream in zip(numbers, streams, strict=True)
        for windows in zip(*(score.objects for score in stream), strict=True)
    ]
    content: dict[str, Any] = {
        name: [[getattr(score, name) for score in windows] for _, windows in objects] for name in JUDGED
    }
    errors = [[score.colour_error for score in windows] for _, windows in objects]
    content[ERROR] = [[None if np.isnan(error) else error for error in row] for row in errors]
    content["prompts"] = [number for number, _ in objects]
    return content
