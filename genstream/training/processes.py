"""Training on several processes, as `accelerate launch` and `torchrun` start them.

By default every process holds all weights and gradients are averaged. With FSDP in accelerate's configuration
weights, gradients and optimiser states lie in shards (FSDP2, arXiv 2304.11277 and its successor in torch).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from genstream.transformer.attention import CrossAttention
from genstream.transformer.causal_dit import CausalDiT

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

_SHARDED = (CausalDiT, PreTrainedModel)
_BEYOND_STEPS = 2**40
_OUTSIDE_FORWARD = ("text", "image")
"""What cross-attention computes with its weights once for all passes."""


def process() -> PartialState:
    """This process among those that train together.

    Raises:
        ValueError: accelerate's configuration asks for DeepSpeed or the first version of FSDP.
    """
    _check_launch()
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # Without a GPU accelerate has to be told, else every process would think that it is alone.
    return PartialState(cpu=together and not torch.cuda.is_available())


def shared_rng(seed: int, step: int) -> np.random.Generator:
    """Random numbers of a step that are the same in every process: for what passes are made of."""
    return np.random.default_rng((seed, step))


def own_rng(seed: int, step: int) -> np.random.Generator:
    """Random numbers of a step that every process has for itself: for data and noise."""
    return np.random.default_rng((seed, step, 1 + process().process_index))


def evaluation_rng(seed: int, draw: int = 0) -> np.random.Generator:
    """Random numbers of an evaluation, which are the same every time and those of no step."""
    return np.random.default_rng((seed, _BEYOND_STEPS + draw))


def own_seed(seed: int, step: int) -> int:
    """Seed of torch's generator for a step, another one in every process.

    On CPUs that generator takes 32 bits of its seed alone, so they are mixed from all three numbers.
    """
    numbers = np.random.SeedSequence((seed, step, 1 + process().process_index))
    return int(numbers.generate_state(1)[0])


def own_share(items: Sequence[T]) -> Sequence[T]:
    """What of the work this process does; the others do the rest."""
    state = process()
    return items[state.process_index :: state.num_processes]


def once(work: Callable[[], None]) -> None:
    """Let the main process alone do what is done once, while all others wait."""
    state = process()
    if state.is_main_process:
        work()
    state.wait_for_everyone()


def _check_launch() -> None:
    """Refuse configurations of accelerate that are not followed."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError("distributed_type must be MULTI_GPU, MULTI_CPU, FSDP or NO, got DEEPSPEED: use FSDP")
    if _wants_shards() and (version := os.environ.get("FSDP_VERSION", "2")) != "2":
        raise ValueError(f"fsdp_version must be 2, got {version}")


def shard(modules: Iterable[nn.Module]) -> None:
    """Cut the weights of all models inside into shards, block by block, where FSDP is asked for."""
    state = process()
    if not (_wants_shards() and state.num_processes > 1):
        return
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    models = {id(model): model for module in modules for model in _outermost(module, _SHARDED)}
    for model in models.values():
        for block in [block for blocks in _outermost(model, nn.ModuleList) for block in blocks]:
            for part in block.modules():
                if isinstance(part, CrossAttention):
                    fully_shard(part, mesh=mesh)
                    for name in _OUTSIDE_FORWARD:
                        register_fsdp_forward_method(part, name)
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if isinstance(model, CausalDiT):
            register_fsdp_forward_method(model, "text_cache")


def reshard(module: nn.Module) -> None:
    """Give back what passes without gradient have gathered; weights in shards are such again."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def average_gradients(weights: Iterable[Tensor]) -> None:
    """Make whole weights' gradients their mean over all processes; those of shards are already."""
    if not dist.is_initialized():
        return
    for weight in weights:
        if weight.grad is not None and not isinstance(weight, DTensor):
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()


def clip_gradients(weights: Iterable[Tensor], largest: float) -> float:
    """Scale gradients down to a norm of at most `largest`, over shards and whole ones together.

    Returns:
        The norm before.
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    kinds = [
        [each for each in gradients if isinstance(each, DTensor) is sharded] for sharded in (True, False)
    ]
    groups = [kind for kind in kinds if kind]
    norm = math.hypot(*(float(whole(nn.utils.get_total_norm(group))) for group in groups))
    if norm > largest:
        for group in groups:
            torch._foreach_mul_(group, largest / norm)
    return norm


def mean(figures: dict[str, float]) -> dict[str, float]:
    """Means of figures over all processes, which have the same ones."""
    if not dist.is_initialized():
        return figures
    values = torch.tensor(list(figures.values()), device=process().device)
    dist.all_reduce(values)
    return dict(zip(figures, (values / dist.get_world_size()).tolist(), strict=True))


def whole(weight: Tensor) -> Tensor:
    """A weight with all its shards, on the host."""
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().cpu()


def _wants_shards() -> bool:
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def _outermost(module: nn.Module, kind: type[M] | tuple[type[M], ...]) -> Iterator[M]:
    """The parts of a kind that are in no other one."""
    if isinstance(module, kind):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child, kind)
