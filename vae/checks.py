"""What every VAE refuses: sizes that do not divide, tensors and states of another stream."""

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from genstream.shapes import check_count, check_divides
from genstream.vae.protocol import Direction, VAESpec, VAEState

_CLIP_DIMENSIONS = 5


def check_start(direction: Direction, batch_size: int, height: int, width: int, ratio: int) -> None:
    """What a state is made for; height and width in pixels must be whole latent pixels."""
    if direction not in get_args(Direction):
        raise ValueError(f"direction must be 'encode' or 'decode', got {direction!r}")
    check_count("batch_size", batch_size)
    check_divides("height", height, ratio)
    check_divides("width", width, ratio)


def check_clip(name: str, clip: Tensor) -> None:
    """A whole clip, from which a state of its size is made."""
    check_is_tensor(name, clip)
    if clip.ndim != _CLIP_DIMENSIONS:
        raise ValueError(f"{name} must be [B, C, T, h, w], got {list(clip.shape)}")
    if clip.shape[2] == 0:
        raise ValueError(f"{name} must be at least 1 along dimension 2, got 0")


def check_frames(frames: Tensor, spec: VAESpec) -> None:
    """A whole clip whose frames make whole latent frames."""
    check_clip("frames", frames)
    count = frames.shape[2] - spec.first_frames
    if count < 0 or count % spec.temporal_ratio:
        raise ValueError(
            f"frames must be {spec.first_frames} + {spec.temporal_ratio}n along dimension 2, "
            f"got {frames.shape[2]}"
        )


def check_chunk(
    name: str, chunk: Tensor, state: VAEState, expected: tuple[int | None, ...], like: Tensor
) -> None:
    """`check_tensor`, and a stream that is at its end takes nothing more."""
    check_tensor(name, chunk, expected, like)
    if state.ended and chunk.shape[2]:
        raise ValueError(f"{name} must not follow a flush, which ends a stream: start a new one (init_state)")


def check_tensor(name: str, tensor: Tensor, expected: tuple[int | None, ...], like: Tensor) -> None:
    """Compare with the shape that a state was made for, None being any length, and with weights `like`.

    Autocast converts, so that inside of it the dtype is free.
    """
    check_is_tensor(name, tensor)
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        want is None or got == want for got, want in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} must have the shape of its state [{wanted}], got {list(shape)}")
    kind = like.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        tensor = tensor.new_empty(0, dtype=like.dtype)
    check_like(name, tensor, like)


def check_is_tensor(name: str, value: object) -> None:
    """Refuse arrays, lists and None."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    """Compare dtype and device with those of the weights `like`."""
    if (tensor.dtype, tensor.device) != (like.dtype, like.device):
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device} like the VAE, "
            f"got {tensor.dtype} on {tensor.device}"
        )


def check_is_state(value: object) -> None:
    """Refuse all but states."""
    if not isinstance(value, VAEState):
        raise ValueError(f"state must be a VAEState, made by init_state, got {type(value).__name__}")


def check_owner(state: VAEState, direction: Direction, vae: str) -> None:
    """Refuse a state of the other direction or of another VAE than `vae`."""
    check_is_state(state)
    if state.direction != direction:
        raise ValueError(f"state must be for {direction!r}, got one for {state.direction!r}")
    if state.vae != vae:
        raise ValueError(f"state must come from {vae}, got one from {state.vae}")


def check_state(state: VAEState, direction: Direction, vae: str, like: Tensor) -> None:
    """`check_owner`, and what is remembered must be like the weights."""
    check_is_state(state)
    # First: a VAE that was moved or cast has other weights, too.
    for slot in state.slots.values():
        check_like("state", slot, like)
    check_owner(state, direction, vae)
    if not state.slots:
        raise ValueError("state must hold what its stream remembers, got no slots")
    for name, slot in state.slots.items():
        if slot.shape[0] != state.batch_size:
            raise ValueError(
                f"state must hold {state.batch_size} streams, as it says, got {slot.shape[0]} in {name!r}"
            )


def latent_statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of raw latents, a float32 number per channel each; None for 0 and for 1."""
    if channels < 1:
        raise ValueError(f"latent_channels must be at least 1, got {channels}")
    if std is not None and not all(0 < value < math.inf for value in std):
        raise ValueError(f"latents_std must be above 0 for every channel, got {list(std)}")
    if mean is not None and not all(map(math.isfinite, mean)):
        raise ValueError(f"latents_mean must be finite for every channel, got {list(mean)}")
    return (
        _channel_values("latents_mean", mean, channels, 0.0),
        _channel_values("latents_std", std, channels, 1.0),
    )


def _channel_values(name: str, values: Sequence[float] | None, channels: int, default: float) -> Tensor:
    if values is None:
        return torch.full((channels,), default)
    if len(values) != channels:
        raise ValueError(f"{name} must hold latent_channels = {channels} numbers, got {len(values)}")
    return torch.tensor(list(values), dtype=torch.float32)
