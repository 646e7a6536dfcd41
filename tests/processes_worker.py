"""What a process of test_processes.py does: trains a small model and writes down what came out."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from genstream.training import processes
from genstream.training.denoiser import Denoiser, DenoiserSettings
from genstream.training.loop import LoopSettings, run

MODEL = DenoiserSettings(width=48, layers=2, ffn_width=48, text_width=16, text_layers=1)
STEPS = 4


class Velocities:
    """Predicts random velocities with a denoiser and a plain head; both are trained."""

    def __init__(self, ranks: int | None = None) -> None:
        torch.manual_seed(0)
        self.module = nn.ModuleDict({"denoiser": Denoiser.new(MODEL, 4), "head": nn.Linear(4, 4)})
        nn.init.normal_(self.module["denoiser"].transformer.proj_out.weight, std=0.1)
        self.ranks = ranks
        self.noise: list[float] = []

    def loss(self, step: int):
        """The loss of this process, or the mean over `ranks` processes in one."""
        self.noise.append(torch.rand(()).item())
        if self.ranks is None:
            return self._loss(processes.own_rng(0, step).integers(2**31)), {}
        seeds = [
            processes.np.random.default_rng((0, step, 1 + rank)).integers(2**31) for rank in range(self.ranks)
        ]
        return sum(self._loss(seed) for seed in seeds) / self.ranks, {}

    def evaluate(self) -> dict[str, float]:
        """On fixed data."""
        with torch.no_grad():
            return {"loss": self._loss(0).item()}

    def _loss(self, seed: int):
        generator = torch.Generator().manual_seed(int(seed))
        x, target = (torch.randn(2, 4, 3, 4, 4, generator=generator) for _ in range(2))
        denoiser = self.module["denoiser"]
        velocity = denoiser.velocity(x, torch.full((2, 3), 0.5), denoiser.embed(["a red circle"] * 2))
        return (self.module["head"](velocity.movedim(1, -1)) - target.movedim(1, -1)).square().mean()


def settings_for(total_steps: int = STEPS) -> LoopSettings:
    return LoopSettings(
        total_steps=total_steps,
        learning_rate=1e-2,
        warmup_steps=1,
        checkpoint_steps=2,
        evaluate_steps=2,
        log_steps=1,
    )


def main(output: Path) -> None:
    trainee = Velocities()
    run(settings_for(), trainee, output)
    weights = {name: value.detach().clone() for name, value in trainee.module.state_dict().items()}
    if not any(isinstance(weight, DTensor) for weight in weights.values()):
        torch.save(weights, output / f"weights_{processes.process().process_index}.pt")
    (output / f"state_{processes.process().process_index}.json").write_text(
        json.dumps({"processes": processes.process().num_processes, "noise": trainee.noise})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
