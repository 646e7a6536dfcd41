"""The training loop all trainers share: resumable, with EMA weights, a CSV log and a progress line.

The data of a step follow from the seed and the step's number alone, so a run that was killed and continued
takes the same steps as one that was not. On several processes each draws data of its own, gradients are
averaged, and a run may go on with another number of them.
"""

import csv
import io
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from genstream.io.partial import write_whole
from genstream.shapes import check_not_negative, check_positive
from genstream.streaming.engine import NonFiniteError
from genstream.training import processes
from genstream.training.precision import Precision, computing_in

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

_CHECKPOINTS_KEPT = 2
_CHECKPOINT_PATTERN = f"step_{7 * '[0-9]'}"
_PROGRESS_NAME = "progress.json"
_PROGRESS_INTERVAL_S = 10.0
_NO_FAILURES = (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError)
"""What ends a command whatever it is doing, and says nothing about a checkpoint."""
_LARGEST_SEED = 2**31 - 1
"""Generators take larger ones, but not all alike."""
MOST_LEARNING_RATE = 1.0
"""Steps of AdamW are about as long as its rate, and weights are mostly below 1."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long and how to optimise.

    Attributes:
        total_steps: optimiser steps of the whole run.
        learning_rate: peak, reached after `warmup_steps`; falls to zero along a half cosine.
        warmup_steps: linear warm-up, of a tenth of the steps at most.
        weight_decay: of both optimisers.
        betas: of AdamW.
        optimizer: "adamw"; or "muon" (Jordan et al., 2024) for the matrices of repeated blocks, and AdamW for
            all else.
        gradient_clip: largest norm of the gradient.
        ema_decay: of the averaged weights, in each step that changes them; builds up over the first steps.
        checkpoint_steps: steps between checkpoints.
        evaluate_steps: steps between evaluations of the averaged weights.
        log_steps: steps averaged into one row of log.csv.
        seed: of everything random.
        precision: "bf16" runs convolutions and matrix products in bfloat16.
    """

    total_steps: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    optimizer: Literal["adamw", "muon"] = "adamw"
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    checkpoint_steps: int = 500
    evaluate_steps: int = 500
    log_steps: int = 20
    seed: int = 0
    precision: Precision = "fp32"

    @classmethod
    def of(cls, settings: "DataclassInstance", **others: object) -> Self:
        """Those of its fields that a trainer's settings have, and `others`."""
        own = {field.name for field in fields(cls)}
        shared = {
            field.name: getattr(settings, field.name) for field in fields(settings) if field.name in own
        }
        return cls(**{**shared, **others})

    def __post_init__(self) -> None:
        for name in ("total_steps", "checkpoint_steps", "evaluate_steps", "log_steps"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("warmup_steps", "seed"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        check_learning_rate("learning_rate", self.learning_rate)
        check_not_negative(weight_decay=self.weight_decay)
        check_positive("gradient_clip", self.gradient_clip)
        if self.seed > _LARGEST_SEED:
            raise ValueError(f"seed must be at most {_LARGEST_SEED}, got {self.seed}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be 'adamw' or 'muon', got {self.optimizer!r}")


def check_learning_rate(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a learning rate."""
    if not 0 < value <= MOST_LEARNING_RATE:
        raise ValueError(f"{name} must be above 0 and at most {MOST_LEARNING_RATE:g}, got {value}")


class Trainee(Protocol):
    """What is trained, and on what.

    It may have `rate_factors`: for names that parameters start with, factors on their learning rate, and
    their gradients are clipped apart from the others'; `frozen`, models besides `module` that it only asks;
    and `result`, the part of `module` that is wanted in the end.
    """

    @property
    def module(self) -> nn.Module:
        """Holds the weights; those that require no gradient stay as they are."""
        ...

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Scalar loss of a step, and its parts for the log. Data follow from the step's number."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Figures of the module, whose weights are the averaged ones meanwhile, for evaluation.csv."""
        ...


def run(settings: LoopSettings, trainee: Trainee, output: Path) -> None:
    """Train to the end, from the newest checkpoint in `output` if there is one.

    Afterwards the module's weights are the averaged ones. With shards, those of the trainee's `result` are
    whole then, in the main process alone.

    Raises:
        FloatingPointError: the loss or its gradient is not finite; names the last checkpoint of weights
            whose loss was.
        ValueError: the newest checkpoint is damaged.
    """
    training = _Training(settings, trainee, output)
    training.resume()
    while training.step < settings.total_steps:
        training.advance()
    training.finish()


def learning_rate_at(step: int, settings: LoopSettings) -> float:
    """Linear warm-up, then a half cosine to zero at `total_steps`."""
    warmup_steps = max(1, min(settings.warmup_steps, settings.total_steps // 10))
    warmup = min(1.0, (step + 1) / warmup_steps)
    return settings.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / settings.total_steps))


def newest_checkpoint(output: Path) -> Path | None:
    """Folder of the newest whole checkpoint of a run."""
    return max((output / "checkpoints").glob(_CHECKPOINT_PATTERN), default=None)


def steps_taken(output: Path) -> int:
    """Steps behind a run's newest checkpoint."""
    return _steps_behind(_checkpoint(output))


def _steps_behind(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _checkpoint(output: Path) -> Path:
    newest = newest_checkpoint(output)
    if newest is None:
        raise ValueError(f"output must be a run with a checkpoint, got {str(output)!r}")
    return newest


class _Training:
    """One run in progress."""

    def __init__(self, settings: LoopSettings, trainee: Trainee, output: Path) -> None:
        self.settings = settings
        self.trainee = trainee
        self.output = output
        self.state = processes.process()
        models = [trainee.module, *getattr(trainee, "frozen", ())]
        processes.shard(models)  # from the host, block by block: a GPU need not hold any of them whole
        for model in models:
            model.to(self.state.device)
        self.average = {name: value.detach().clone() for name, value in _trained(trainee.module).items()}
        factors: Mapping[str, float] = getattr(trainee, "rate_factors", {})
        self.parts = _parts(trainee.module, factors)
        self.optimizers = _optimizers(trainee.module, settings, factors)
        self.step = 0
        self.seconds = 0.0
        self.window: list[dict[str, float]] = []
        self.last_report = (time.monotonic(), 0)

    def advance(self) -> None:
        """Take one step, and log, evaluate and save when they are due."""
        settings, started = self.settings, time.monotonic()
        self.window.append(self._optimise())
        self._update_average()
        self.step += 1
        self.seconds += time.monotonic() - started
        if self._due(settings.log_steps):
            self._log()
        if self._due(settings.evaluate_steps):
            with self._averaged(), self._naming_checkpoint():
                figures = self.trainee.evaluate()
            self._check_finite(figures)
            if self.state.is_main_process:
                _append_row(self.output / "evaluation.csv", {"step": self.step, **figures})
                logger.info("step %d: %s", self.step, _text(figures))
        if self._due(settings.checkpoint_steps):
            self._save()

    def resume(self) -> None:
        """Continue after the newest checkpoint; rows logged after it are dropped."""
        folder = self.output / "checkpoints"
        newest = newest_checkpoint(self.output)
        if newest is not None:
            try:
                self._load(newest)
            except (CheckpointException, OSError, ValueError) as error:
                failure = ValueError(
                    f"checkpoint {str(newest)!r} cannot be read, remove it to go on from the one before it: "
                    f"{_first_line(error)}"
                )
                raise _cause(error, failure) from error
        if self.state.is_main_process:
            if newest is not None:
                logger.info("continuing after step %d from %s", self.step, newest)
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in folder.glob("partial_*"):
                shutil.rmtree(unfinished)
            for name in ("log.csv", "evaluation.csv"):
                _drop_rows_after(self.output / name, self.step)
        self.state.wait_for_everyone()
        self.last_report = (time.monotonic(), self.step)

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the averaged weights in the module; those of the result whole, in the main process."""
        self._swap()
        result: nn.Module = getattr(self.trainee, "result", self.trainee.module)
        for name, weight in list(result.named_parameters()):
            if isinstance(weight, DTensor):
                whole = processes.whole(weight)  # all processes give their shards
                if self.state.is_main_process:
                    _replace(result, name, whole)

    def _optimise(self) -> dict[str, float]:
        settings, module = self.settings, self.trainee.module
        learning_rate = learning_rate_at(self.step, settings)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["rate_factor"]
        torch.manual_seed(processes.own_seed(settings.seed, self.step))
        with computing_in(settings.precision, self.state.device.type), self._naming_checkpoint():
            loss, parts = self.trainee.loss(self.step)
        figures = processes.mean({"loss": loss.item(), **parts})
        self._check_finite({"loss": figures["loss"]})
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        processes.reshard(module)
        processes.average_gradients(module.parameters())
        for part in self.parts:
            norm = processes.clip_gradients(part, settings.gradient_clip)
            self._check_finite({"norm of the gradient": norm})
        for optimizer in self.optimizers:
            optimizer.step()
        return {**figures, "learning_rate": learning_rate}

    def _check_finite(self, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            if not math.isfinite(value):
                raise self._not_finite(f"{name} is {value}")

    @contextmanager
    def _naming_checkpoint(self) -> Iterator[None]:
        """Streams end on their own when a weight has gone wrong, before there is a loss."""
        try:
            yield
        except NonFiniteError as error:
            raise self._not_finite(str(error)) from error

    def _not_finite(self, what: str) -> FloatingPointError:
        if self.step == 0:
            return FloatingPointError(f"{what} at step 0, before anything was learnt; no checkpoint is good")
        # Nothing finite has come of weights that were saved after this many steps.
        saved = (self.output / "checkpoints").glob(_CHECKPOINT_PATTERN)
        good = max((path for path in saved if _steps_behind(path) < self.step), default="none")
        return FloatingPointError(
            f"{what} at step {self.step}; last good checkpoint: {good}. The same command most likely ends so "
            "again: a smaller learning rate needs another output, since a run keeps its settings"
        )

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        processes.reshard(self.trainee.module)
        values = _values(self.trainee.module)
        for name, average in self.average.items():
            if not isinstance(value := values[name], nn.Parameter) or value.grad is not None:
                average.lerp_(value, 1 - decay)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The module has the averaged weights meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        processes.reshard(self.trainee.module)
        values = _values(self.trainee.module)
        for name, average in self.average.items():
            kept = values[name].clone()
            values[name].copy_(average)
            average.copy_(kept)

    def _due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.settings.total_steps

    def _log(self) -> None:
        means = _means(self.window)
        self.window = []
        if not self.state.is_main_process:
            return
        _append_row(self.output / "log.csv", {"step": self.step, **means, "seconds": round(self.seconds, 1)})
        now = time.monotonic()
        reported_at, reported_step = self.last_report
        if now - reported_at < _PROGRESS_INTERVAL_S and self.step < self.settings.total_steps:
            return
        rate = (self.step - reported_step) / (now - reported_at)
        remaining_s = (self.settings.total_steps - self.step) / rate
        total = self.settings.total_steps
        message = "step %d/%d  %s  %.2f steps/s  ETA %d:%02d"
        logger.info(message, self.step, total, _text(means), rate, *divmod(int(remaining_s), 60))
        self.last_report = (now, self.step)

    def _save(self) -> None:
        """Write a checkpoint under another name and rename it, so that a kill never leaves half of one."""
        folder = self.output / "checkpoints"
        partial, final = folder / f"partial_{self.step:07d}", folder / f"step_{self.step:07d}"
        try:
            with self._checkpointing() as options:
                save(self._tensors(), checkpoint_id=partial, **options)
        except CheckpointException as error:
            if self.state.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            failure = OSError(
                f"checkpoint in {str(self.output)!r} could not be written, is the disk full? "
                f"{_first_line(error)}"
            )
            raise _cause(error, failure) from error
        if self.state.is_main_process:
            progress = {"step": self.step, "seconds": self.seconds, "window": self.window}
            (partial / _PROGRESS_NAME).write_text(json.dumps(progress))
            partial.rename(final)
            for old in sorted(folder.glob(_CHECKPOINT_PATTERN))[:-_CHECKPOINTS_KEPT]:
                shutil.rmtree(old)
        self.state.wait_for_everyone()

    def _load(self, folder: Path) -> None:
        tensors = self._tensors()
        optimizers = {"optimizers": tensors.pop("optimizers")}
        for state in optimizers["optimizers"]["state"].values():
            for value in state.values():
                value.zero_()  # torch has taken a step to have any; what has had no gradient counts none
        with self._checkpointing() as options:
            load(tensors, checkpoint_id=folder, **options)
            # What has had no gradient yet has no state either.
            planner = DefaultLoadPlanner(allow_partial_load=True)
            load(optimizers, checkpoint_id=folder, planner=planner, **options)
        set_state_dict(
            self.trainee.module,
            self.optimizers,
            model_state_dict=tensors["module"],
            optim_state_dict=optimizers["optimizers"],
        )
        progress = json.loads((folder / _PROGRESS_NAME).read_text())
        try:
            self.step, self.seconds = int(progress["step"]), float(progress["seconds"])
            self.window = progress.get("window", [])  # earlier versions did not keep it
        except (KeyError, TypeError) as error:
            raise ValueError(f"{_PROGRESS_NAME} must hold step and seconds, got {progress!r}") from error

    @contextmanager
    def _checkpointing(self) -> Iterator[dict[str, bool]]:
        """Options for reading and writing; a process that is alone has no group, and need not be told so."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield {"no_dist": self.state.num_processes == 1}

    def _tensors(self) -> dict[str, Any]:
        """What a checkpoint holds; shards know of which whole they are, so that any number of them fits."""
        module, optimizers = get_state_dict(self.trainee.module, self.optimizers)
        return {"module": module, "optimizers": optimizers, "average": self.average}


def _cause(error: BaseException, failure: Exception) -> BaseException:
    """Why a checkpoint was not read or written: `failure`, unless torch has wrapped Ctrl-C or the like."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    return next((cause for cause, _ in failures if isinstance(cause, _NO_FAILURES)), failure)


def _values(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """Those that training changes."""
    return {
        name: value
        for name, value in _values(module).items()
        if value.requires_grad or not isinstance(value, nn.Parameter)
    }


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a whole weight in the place of a sharded one, wherever it is used."""
    sharded = module.get_parameter(name)
    for part in module.modules():
        for own, weight in list(part.named_parameters(recurse=False)):
            if weight is sharded:
                setattr(part, own, nn.Parameter(value, requires_grad=weight.requires_grad))


def _optimizers(
    module: nn.Module, settings: LoopSettings, factors: Mapping[str, float]
) -> list[torch.optim.Optimizer]:
    trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    matrices = _block_matrices(module) if settings.optimizer == "muon" else set()
    chosen = {name: weight for name, weight in trained.items() if id(weight) in matrices}
    rest = {name: weight for name, weight in trained.items() if name not in chosen}
    rate, decay = settings.learning_rate, settings.weight_decay
    optimizers: list[torch.optim.Optimizer] = []
    if chosen:
        # Updates as large as AdamW's, so that both share one learning rate.
        groups = _groups(chosen, factors)
        optimizers.append(
            torch.optim.Muon(groups, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    if rest:
        groups = _groups(rest, factors)
        optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=settings.betas, weight_decay=decay))
    return optimizers


def _parts(module: nn.Module, factors: Mapping[str, float]) -> list[list[nn.Parameter]]:
    """Parameters whose names start alike, as `factors` has it, and behind them all others."""
    parts: dict[str, list[nn.Parameter]] = {start: [] for start in (*factors, "")}
    for name, weight in module.named_parameters():
        parts[next(start for start in parts if name.startswith(start))].append(weight)
    return list(parts.values())


def _groups(weights: Mapping[str, Tensor], factors: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameter groups of an optimiser, one for each factor on the learning rate; shards are kept apart."""
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, weight in weights.items():
        factor = next((factor for start, factor in factors.items() if name.startswith(start)), 1.0)
        groups.setdefault((factor, isinstance(weight, DTensor)), []).append(weight)
    return [{"params": group, "rate_factor": factor} for (factor, _), group in groups.items()]


def _block_matrices(module: nn.Module) -> set[int]:
    """Identities of the weights of linear layers inside of repeated blocks: neither embeddings nor heads."""
    blocks = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return {id(part.weight) for block in blocks for part in block.modules() if isinstance(part, nn.Linear)}


def _first_line(error: BaseException) -> str:
    """What went wrong; torch's own report is a page, with the cause at its end."""
    if isinstance(error, CheckpointException) and error.failures:
        cause, _ = next(iter(error.failures.values()))
        return repr(cause)
    return str(error).partition("\n")[0]


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every figure over the steps that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(each) / len(each) for name, each in values.items()}


def _append_row(path: Path, row: dict[str, float]) -> None:
    """Columns that no row before had are empty in those."""
    with path.open("a+", newline="") as file:
        file.seek(0)
        header = next(csv.reader(file), [])
        names = list(dict.fromkeys([*header, *row]))
        cells = [f"{row[name]:.6g}" if name in row else "" for name in names]
        if names == header:
            csv.writer(file, lineterminator="\n").writerow(cells)
            return
    _, *before = _read_rows(path)
    added = [""] * (len(names) - len(header))
    _write_rows(path, [names, *(each + added for each in before), cells])


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    header, *rows = _read_rows(path)
    # A row may have been cut off with the run that wrote it.
    kept = [row for row in rows if len(row) == len(header) and _is_step_until(row[0], step)]
    if not kept:
        path.unlink()  # its header may be no more whole than its rows
        return
    _write_rows(path, [header, *kept])


def _read_rows(path: Path) -> list[list[str]]:
    """The header, empty where there is none, and the rows."""
    if not path.is_file():
        return [[]]
    with path.open(newline="") as file:
        return list(csv.reader(file)) or [[]]


def _write_rows(path: Path, rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_whole(path, text.getvalue())


def _is_step_until(cell: str, last: int) -> bool:
    try:
        return float(cell) <= last
    except ValueError:
        return False


def _text(figures: dict[str, float]) -> str:
    pairs: Iterable[str] = (f"{name} {value:.4g}" for name, value in figures.items())
    return "  ".join(pairs)
