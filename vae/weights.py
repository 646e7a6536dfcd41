"""Published checkpoints: reading them and putting them into a module, with nothing left over."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from genstream.io.checkpoint import SeveralModelsError, open_checkpoint

Weights = str | Path | Mapping[str, Tensor]
"""A checkpoint file, or the tensors by name."""


def read_weights(source: Weights) -> dict[str, Tensor]:
    """Tensors by name, on CPU, from a .safetensors file, a torch file or a mapping.

    A torch file is read as data, in a process of its own, and never runs code. It may hold its tensors under
    "state_dict".
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"source must be a checkpoint file, got {str(path)!r}")
    try:
        checkpoint = open_checkpoint(path, None, usual=("state_dict",))
        return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    except SeveralModelsError as error:
        raise ValueError(f"source must be a checkpoint file of one VAE, {str(path)!r} holds more") from error
    except ValueError as error:
        raise ValueError(f"source must be a checkpoint file of tensors by name: {error}") from error


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Shape of a convolution's weights that every checkpoint of an architecture has."""
    if name not in tensors:
        raise ValueError(f"source must hold {name!r}, got {len(tensors)} tensors without it")
    shape = tuple(tensors[name].shape)
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"{name} must be the weights of a convolution, got shape {list(shape)}")
    return shape


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into `module`; names and shapes must be the same on both sides."""
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"source must hold the weights of {type(module).__name__}: "
            f"{len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"{name} must be {list(tensor.shape)} in {type(module).__name__}, "
                f"got {list(tensors[name].shape)}"
            )
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    module.load_state_dict(dict(tensors))
