"""What a stream remembers, while a network reads and writes it."""

import math
from collections.abc import Callable, Mapping

from torch import Tensor, nn


class Memory:
    """What a stream remembers by name, while pieces of it are worked off.

    Attributes:
        steps: latent frames of the stream before the current piece.
        piece: latent frames of the current piece.
        past: what the pieces before left behind.
        future: what the current piece leaves behind.
    """

    def __init__(self, steps: int, past: Mapping[str, Tensor]) -> None:
        self.steps = steps
        self.piece = 0
        self.past = dict(past)
        self.future: dict[str, Tensor] = {}

    @property
    def started(self) -> bool:
        """Whether the stream has a past."""
        return self.steps > 0

    def recall(self, name: str) -> Tensor | None:
        """What was remembered as `name`; None at a stream's start."""
        return self.past.get(name)

    def remember(self, name: str, value: Tensor) -> None:
        """Keep `value` for the next piece."""
        # Detached: the memory of an endless stream must not hold an endless graph. Cloned: nor whole chunks.
        self.future[name] = value.detach().clone()

    def advance(self, steps: int) -> None:
        """The current piece of `steps` latent frames is done."""
        self.steps += steps
        self.past, self.future = self.future, {}


def reach(decoder: nn.Module, growth: Callable[[nn.Module], int]) -> int:
    """Latent frames back that a frame depends on: what each convolution looks back at, at its own rate.

    Args:
        decoder: causal, its modules in the order in which they work.
        growth: frames that a module makes of one.
    """
    total, rate = 0.0, 1

    def visit(module: nn.Module) -> None:
        nonlocal total, rate
        for child in module.children():
            visit(child)
        if isinstance(module, nn.Conv3d):
            total += (module.kernel_size[0] - 1) / rate
        rate *= growth(module)

    visit(decoder)
    return math.ceil(total)
