import csv
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from genstream.streaming.engine import NonFiniteError
from genstream.training import loop
from genstream.training.loop import LoopSettings, learning_rate_at, newest_checkpoint, run, steps_taken

SETTINGS = {
    "total_steps": 12,
    "learning_rate": 0.05,
    "warmup_steps": 3,
    "checkpoint_steps": 4,
    "evaluate_steps": 6,
    "log_steps": 2,
}


class Line:
    """Fits a line; the data of a step follow from its number."""

    def __init__(self, fails_at: int = -1, value: float = float("nan")) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(2, 1)
        self.fails_at = fails_at
        self.value = value

    def loss(self, step: int):
        x = torch.randn((8, 2), generator=torch.Generator().manual_seed(step))
        noisy = self.module(x + 0.1 * torch.randn_like(x))
        loss = (noisy[:, 0] - x.sum(dim=1)).square().mean()
        if step == self.fails_at:
            loss = loss * self.value
        return loss, {"error": loss.item()}

    def evaluate(self) -> dict[str, float]:
        return {"weight": self.module.weight.mean().item()}


class Steep(Line):
    """Its loss is finite in all steps; the gradient is not in one."""

    def loss(self, step: int):
        loss, parts = super().loss(step + 100)
        if step == self.fails_at:
            self.module.weight.register_hook(lambda gradient: gradient * self.value)
        return loss, parts


class Blocks(Line):
    """A line behind two blocks of matrices."""

    def __init__(self, fails_at: int = -1) -> None:
        super().__init__(fails_at)
        blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2)) for _ in range(2)])
        self.module = nn.Sequential(
            OrderedDict(ends=nn.Linear(2, 2), blocks=_Chain(blocks), head=nn.Linear(2, 1))
        )

    def evaluate(self) -> dict[str, float]:
        return {"weight": self.module.head.weight.mean().item()}


class _Chain(nn.Module):
    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Killed(Exception):
    pass


def killed(kind: type[Line], at: int) -> Line:
    """A trainee that is killed at a step."""

    class KilledTrainee(kind):
        def loss(self, step: int):
            if step == at:
                raise Killed
            return super().loss(step)

    return KilledTrainee()


def trained(settings: LoopSettings, trainee: Line, output: Path) -> nn.Module:
    """The module with its averaged weights."""
    run(settings, trainee, output)
    return trainee.module


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("killed_at", [2, 5, 11])
@pytest.mark.parametrize(("kind", "optimizer"), [(Line, "adamw"), (Blocks, "muon")])
def test_killed_run_continues_as_if_unbroken(tmp_path, killed_at, kind, optimizer):
    settings = LoopSettings(**SETTINGS, optimizer=optimizer)
    unbroken = trained(settings, kind(), tmp_path / "unbroken")
    with pytest.raises(Killed):
        run(settings, killed(kind, killed_at), tmp_path / "killed")
    continued = trained(settings, kind(), tmp_path / "killed")
    assert all(map(torch.equal, continued.parameters(), unbroken.parameters()))
    for name in ("log.csv", "evaluation.csv"):
        assert rows(tmp_path / "killed" / name) == rows(tmp_path / "unbroken" / name)


def test_rows_of_the_log_that_span_a_kill_are_the_same(tmp_path):
    """Their steps are on both sides of a checkpoint."""
    settings = LoopSettings(**{**SETTINGS, "log_steps": 3, "checkpoint_steps": 2})
    trained(settings, Line(), tmp_path / "unbroken")
    with pytest.raises(Killed):
        run(settings, killed(Line, 5), tmp_path / "killed")
    trained(settings, Line(), tmp_path / "killed")
    assert rows(tmp_path / "killed" / "log.csv") == rows(tmp_path / "unbroken" / "log.csv")


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (
            RuntimeError("unexpected pos"),
            (OSError, "checkpoint in .*run.* could not be written, is the disk full"),
        ),
        (KeyboardInterrupt(), (KeyboardInterrupt, None)),
        (MemoryError(), (MemoryError, None)),
    ],
)
def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch, cause, expected):
    """torch wraps whatever happens, Ctrl-C too, into an exception of its own that no handler expects."""

    def fail(tensors, checkpoint_id, **options):
        checkpoint_id.mkdir(parents=True)
        raise CheckpointException("save", {0: (cause, None)})

    monkeypatch.setattr(loop, "save", fail)
    kind, message = expected
    with pytest.raises(kind, match=message):
        trained(LoopSettings(**SETTINGS), Line(), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


@pytest.mark.parametrize("cause", [KeyboardInterrupt(), MemoryError()])
def test_what_ends_reading_a_checkpoint_is_not_taken_for_damage(tmp_path, monkeypatch, cause):
    trained(LoopSettings(**SETTINGS), Line(), tmp_path)

    def fail(tensors, checkpoint_id, **options):
        raise CheckpointException("load", {0: (cause, None)})

    monkeypatch.setattr(loop, "load", fail)
    with pytest.raises(type(cause)):
        trained(LoopSettings(**SETTINGS), Line(), tmp_path)


def test_half_written_checkpoint_is_ignored(tmp_path):
    run(LoopSettings(**SETTINGS), Line(), tmp_path)
    partial = tmp_path / "checkpoints" / "partial_0000099"
    partial.mkdir()
    assert newest_checkpoint(tmp_path).name == "step_0000012"
    run(LoopSettings(**SETTINGS), Line(), tmp_path)
    assert not partial.exists()


def test_finished_run_returns_its_weights_again(tmp_path):
    first = trained(LoopSettings(**SETTINGS), Line(), tmp_path)
    assert torch.equal(trained(LoopSettings(**SETTINGS), Line(), tmp_path).weight, first.weight)


def test_weights_are_averaged_over_the_steps(tmp_path):
    seen = []

    class Watched(Line):
        def loss(self, step: int):
            seen.append(self.module.weight.detach().clone())
            return super().loss(step)

    settings = LoopSettings(**{**SETTINGS, "ema_decay": 0.5})
    last = trained(LoopSettings(**{**SETTINGS, "ema_decay": 0.0}), Line(), tmp_path / "last")
    averaged = trained(settings, Watched(), tmp_path / "average")
    expected = seen[0]
    for step, value in enumerate([*seen[1:], last.weight.detach()]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(averaged.weight.detach(), expected)
    (evaluated,) = rows(tmp_path / "average" / "evaluation.csv")[-1:]
    assert float(evaluated["weight"]) == pytest.approx(expected.mean().item(), rel=1e-4)


def test_loss_that_is_not_finite_names_the_last_good_checkpoint(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"loss is nan at step 9; last good checkpoint: .*step_0000008"
    ):
        run(LoopSettings(**SETTINGS), Line(fails_at=9), tmp_path)
    assert newest_checkpoint(tmp_path).name == "step_0000008"


@pytest.mark.parametrize(("saved_every", "good"), [(1, "step_0000002"), (3, "none")])
@pytest.mark.parametrize("kind", [Line, Steep])
def test_weights_whose_loss_is_not_finite_are_no_good_checkpoint(tmp_path, kind, saved_every, good):
    settings = LoopSettings(**{**SETTINGS, "checkpoint_steps": saved_every})
    for _ in range(2):  # again when it goes on
        with pytest.raises(
            FloatingPointError,
            match=rf"at step 3; last good checkpoint: (.*/)?{good}\. The .* needs another output",
        ):
            run(settings, kind(fails_at=3), tmp_path)
        assert newest_checkpoint(tmp_path).name == "step_0000003"


def test_a_loss_that_begins_as_none_is_not_blamed_on_the_learning_rate(tmp_path):
    said = "loss is nan at step 0, before anything was learnt; no checkpoint is good"
    with pytest.raises(FloatingPointError, match=f"^{said}$"):
        run(LoopSettings(**SETTINGS), Line(fails_at=0), tmp_path)


def test_frozen_weights_stay(tmp_path):
    line = Line()
    line.module.bias.requires_grad_(requires_grad=False)
    before = line.module.bias.clone()
    run(LoopSettings(**SETTINGS), line, tmp_path)
    assert torch.equal(line.module.bias, before)


def test_muon_turns_the_matrices_of_blocks_and_leaves_the_rest_to_adamw(tmp_path):
    steps = {}
    for optimizer in ("adamw", "muon"):
        trainee = Blocks()
        before = {name: weight.detach().clone() for name, weight in trainee.module.named_parameters()}
        once = {**SETTINGS, "total_steps": 1, "warmup_steps": 1}
        # With some seeds the last matrix's gradient has one direction alone, and rounding is turned up to it.
        settings = LoopSettings(**once, weight_decay=0.0, ema_decay=0.0, optimizer=optimizer, seed=1)
        run(settings, trainee, tmp_path / optimizer)
        after = dict(trainee.module.named_parameters())
        steps[optimizer] = {name: after[name].detach() - before[name] for name in before}
    for name, step in steps["muon"].items():
        if name.startswith("blocks.") and name.endswith("weight"):
            large, small = torch.linalg.svdvals(step)
            assert 1 <= large / small < 2  # nearly a rotation: that is what Muon makes of a gradient
            assert 0 < large < 0.05 * 6
        else:
            torch.testing.assert_close(step, steps["adamw"][name])


def test_learning_rate_rises_then_falls_to_zero():
    settings = LoopSettings(total_steps=100, learning_rate=1.0, warmup_steps=10)
    rates = [learning_rate_at(step, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert rates[50] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)


def test_short_runs_reach_their_learning_rate():
    settings = LoopSettings(total_steps=50, learning_rate=1.0, warmup_steps=100)
    assert max(learning_rate_at(step, settings) for step in range(50)) > 0.97


def test_settings_are_checked():
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        LoopSettings(total_steps=0, learning_rate=1.0)
    with pytest.raises(ValueError, match="precision must be 'fp32' or 'bf16', got 'int8'"):
        LoopSettings(total_steps=1, learning_rate=1.0, precision="int8")
    with pytest.raises(ValueError, match="optimizer must be 'adamw' or 'muon', got 'sgd'"):
        LoopSettings(total_steps=1, learning_rate=1.0, optimizer="sgd")


def test_runs_of_one_process_may_differ_in_precision(tmp_path):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        line, seen = Line(), []
        line.module.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.dtype))
        settings = LoopSettings(**{**SETTINGS, "total_steps": 1}, precision=precision)
        run(settings, line, tmp_path / str(len(list(tmp_path.iterdir()))))
        assert seen == [dtype]


class Pair(Line):
    """Two lines that are trained in turn, with figures and learning rates of their own."""

    rate_factors: ClassVar = {"two.": 0.25, "still.": 0.0}

    def __init__(self) -> None:
        super().__init__()
        names = ("one", "two", "still")
        self.module = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in names})
        for weight in self.module.parameters():
            nn.init.zeros_(weight)

    def loss(self, step: int):
        name = ("one", "two")[step % 2]
        loss = (self.module[name].weight - 1).sum() + 0 * self.module["still"].weight.sum()
        return loss, {name: loss.item()}

    def evaluate(self) -> dict[str, float]:
        return {}


@pytest.mark.parametrize("log_steps", [2, 3])
def test_parts_that_take_turns_have_their_own_rates_and_columns(tmp_path, log_steps):
    settings = LoopSettings(
        **{**SETTINGS, "log_steps": log_steps, "learning_rate": 1e-3, "gradient_clip": 1e9},
        weight_decay=0.0,
        ema_decay=0.0,
    )
    pair = Pair()
    run(settings, pair, tmp_path)
    one, two, still = (pair.module[name].weight.mean().item() for name in ("one", "two", "still"))
    rates = [learning_rate_at(step, settings) for step in range(settings.total_steps)]
    # AdamW's steps along a constant gradient are as long as the learning rate.
    assert one == pytest.approx(-sum(rates[0::2]), rel=1e-3)
    assert two == pytest.approx(-sum(rates[1::2]) / 4, rel=1e-3)
    assert still == 0
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == settings.total_steps // log_steps
    for row in rows:
        assert float(row["one"]) <= -1.99
        assert -2.01 <= float(row["two"]) <= -1.99
    assert float(rows[-1]["one"]) < float(rows[0]["one"]) <= -2


@pytest.mark.parametrize("killed_at", [1, 7])
def test_parts_that_take_turns_may_be_logged_in_each_step(tmp_path, killed_at):
    """A killed run goes on as if unbroken, though a part has not learnt yet: no optimiser knows it."""
    settings = LoopSettings(**{**SETTINGS, "log_steps": 1, "checkpoint_steps": 1})
    whole = trained(settings, Pair(), tmp_path / "whole")
    with pytest.raises(Killed):
        run(settings, killed(Pair, killed_at), tmp_path / "killed")
    continued = trained(settings, Pair(), tmp_path / "killed")
    assert all(map(torch.equal, continued.parameters(), whole.parameters()))
    logs = [rows(tmp_path / name / "log.csv") for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert [(row["one"] == "", row["two"] == "") for row in logs[0]] == 6 * [(False, True), (True, False)]


def test_a_kill_while_a_log_is_cut_back_costs_none_of_it(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        run(LoopSettings(**SETTINGS), killed(Line, 7), tmp_path)
    before = (tmp_path / "log.csv").read_text()
    opened = Path.open

    def killing(path, mode="r", **options):
        file = opened(path, mode, **options)
        if "w" in mode:
            file.close()
            raise Killed
        return file

    monkeypatch.setattr(Path, "open", killing)
    with pytest.raises(Killed):
        run(LoopSettings(**SETTINGS), Line(), tmp_path)
    assert (tmp_path / "log.csv").read_text() == before


def cut_off(checkpoint: Path) -> None:
    (data,) = checkpoint.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:100])


def without_metadata(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()


def nonsense(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(b"nonsense")


def other_progress(checkpoint: Path) -> None:
    (checkpoint / "progress.json").write_text("[]")


@pytest.mark.parametrize("damage", [cut_off, without_metadata, nonsense, other_progress])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    trained(LoopSettings(**SETTINGS), Line(), tmp_path)
    newest = newest_checkpoint(tmp_path)
    damage(newest)
    with pytest.raises(ValueError, match=rf"checkpoint '{newest}' cannot be read, remove it to go on"):
        run(LoopSettings(**SETTINGS), Line(), tmp_path)
    shutil.rmtree(newest)
    run(LoopSettings(**SETTINGS), Line(), tmp_path)
    assert newest_checkpoint(tmp_path) == newest


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    run(LoopSettings(**SETTINGS), Line(), tmp_path)
    (tmp_path / "checkpoints" / "step_of_mine").mkdir()
    assert newest_checkpoint(tmp_path).name == "step_0000012"


@pytest.mark.parametrize("left", ["", "step,lo", "step,loss,learning_rate,seconds\n1", "no,log\nof,mine\n"])
def test_a_log_that_was_cut_off_does_not_stop_the_run(tmp_path, left):
    with pytest.raises(Killed):
        run(LoopSettings(**SETTINGS), killed(Line, 7), tmp_path)
    (tmp_path / "log.csv").write_text(left)
    run(LoopSettings(**SETTINGS), Line(), tmp_path)
    assert steps_taken(tmp_path) == 12


def test_a_row_that_was_cut_off_is_dropped(tmp_path):
    run(LoopSettings(**SETTINGS), Line(), tmp_path / "unbroken")
    with pytest.raises(Killed):
        run(LoopSettings(**SETTINGS), killed(Line, 7), tmp_path / "killed")
    with (tmp_path / "killed" / "log.csv").open("a") as file:
        file.write("1,0.")
    run(LoopSettings(**SETTINGS), Line(), tmp_path / "killed")
    assert rows(tmp_path / "killed" / "log.csv") == rows(tmp_path / "unbroken" / "log.csv")


def test_figures_that_are_not_finite_end_the_run(tmp_path):
    class Evaluated(Line):
        def evaluate(self):
            return {"error": float("nan")}

    with pytest.raises(
        FloatingPointError, match=r"error is nan at step 6; last good checkpoint: .*step_0000004"
    ):
        run(LoopSettings(**SETTINGS), Evaluated(), tmp_path)


class Streaming(Line):
    """Streams what it learns, in its loss and to evaluate it."""

    def __init__(self, *, evaluates: bool) -> None:
        super().__init__()
        self.evaluates = evaluates

    def stream(self):
        raise NonFiniteError("latents of chunk 0 are not finite")

    def loss(self, step: int):
        if step == 5 and not self.evaluates:
            self.stream()
        return super().loss(step)

    def evaluate(self):
        self.stream()


@pytest.mark.parametrize(("evaluates", "step"), [(False, 5), (True, 6)])
def test_a_stream_that_breaks_ends_the_run_like_a_loss(tmp_path, evaluates, step):
    said = rf"latents of chunk 0 are not finite at step {step}; last good checkpoint: .*step_0000004"
    with pytest.raises(FloatingPointError, match=said):
        run(LoopSettings(**SETTINGS), Streaming(evaluates=evaluates), tmp_path)


class Noisy(Line):
    """Keeps what torch draws in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def loss(self, step: int):
        self.drawn.append(torch.rand(()).item())
        return super().loss(step)


def test_every_step_of_every_seed_draws_its_own_noise(tmp_path):
    trainees = [Noisy() for _ in range(3)]
    for seed, trainee in zip((0, 1, 0), trainees, strict=True):
        run(LoopSettings(**SETTINGS, seed=seed), trainee, tmp_path / str(id(trainee)))
    assert trainees[0].drawn == trainees[2].drawn
    assert len({*trainees[0].drawn, *trainees[1].drawn}) == 2 * SETTINGS["total_steps"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_reaches_neither_weights_nor_checkpoints(tmp_path, value):
    with pytest.raises(FloatingPointError, match=r"norm of the gradient is \w+ at step 7; .*step_0000004"):
        run(LoopSettings(**SETTINGS), Steep(fails_at=7, value=value), tmp_path / "stopped")
    continued, whole = Steep(), Steep()
    run(LoopSettings(**SETTINGS), continued, tmp_path / "stopped")
    run(LoopSettings(**SETTINGS), whole, tmp_path / "whole")
    assert torch.equal(continued.module.weight, whole.module.weight)


class Turns(Line):
    """Two lines that learn in turns, the second from a steeper loss."""

    rate_factors: ClassVar = {"second.": 1.0}

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.ModuleDict({"first": nn.Linear(2, 1), "second": nn.Linear(2, 1)})

    def loss(self, step: int):
        x = torch.randn((8, 2), generator=torch.Generator().manual_seed(step))
        if step % 2:
            return self.module["first"](x).square().mean(), {}
        return 1000 * self.module["second"](x).square().mean() + self.module["first"](x).square().mean(), {}

    def evaluate(self) -> dict[str, float]:
        return {}


def test_only_what_a_step_changed_is_averaged(tmp_path):
    class Alone(Turns):
        def loss(self, step: int):
            x = torch.randn((8, 2), generator=torch.Generator().manual_seed(step // 2))
            return self.module["first" if step % 2 else "second"](x).square().mean(), {}

    trainee, seen = Alone(), {}
    training = loop._Training(LoopSettings(**SETTINGS), trainee, tmp_path)
    for step in range(6):
        training.advance()
        now = {name: value.clone() for name, value in training.average.items()}
        changed = {
            name.partition(".")[0] for name in now if not torch.equal(now[name], seen.get(name, now[name]))
        }
        assert step == 0 or changed == {"first" if step % 2 else "second"}
        seen = now


def test_parts_with_rates_of_their_own_are_clipped_apart(tmp_path):
    trainee = Turns()
    training = loop._Training(LoopSettings(**SETTINGS, gradient_clip=1.0), trainee, tmp_path)
    expected = torch.autograd.grad(trainee.loss(0)[0], list(trainee.module["first"].parameters()))
    training.advance()
    norms = [
        torch.nn.utils.get_total_norm([weight.grad for weight in trainee.module[part].parameters()]).item()
        for part in ("first", "second")
    ]
    alone = torch.nn.utils.get_total_norm(expected).item()
    assert norms == pytest.approx([min(alone, 1.0), 1.0], rel=1e-4)


def test_rates_and_seeds_without_measure_are_refused():
    for name, value, error in (
        ("learning_rate", float("inf"), "learning_rate must be above 0 and at most 1, got inf"),
        ("learning_rate", 1e38, r"learning_rate must be above 0 and at most 1, got 1e\+38"),
        ("weight_decay", float("nan"), "weight_decay must be at least 0 and finite, got nan"),
        ("gradient_clip", 0.0, r"gradient_clip must be a positive number, got 0\.0"),
    ):
        with pytest.raises(ValueError, match=error):
            LoopSettings(**{**SETTINGS, name: value})
    with pytest.raises(ValueError, match="seed must be at most 2147483647, got 2147483648"):
        LoopSettings(**SETTINGS, seed=2**31)


@pytest.mark.parametrize("name", ["seed", "warmup_steps"])
def test_negative_numbers_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        LoopSettings(**{**SETTINGS, name: -1})
