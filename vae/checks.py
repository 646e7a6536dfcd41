"""What every VAE refuses: sizes that do not divide, tensors and states of another stream."""

from collections.abc import Sequence

import torch
from torch import Tensor

from genstream.shapes import check_divides
from genstream.vae.protocol import Direction, VAEState


def check_size(height: int, width: int, ratio: int) -> None:
    """Height and width in pixels must be whole latent pixels."""
    check_divides("height", height, ratio)
    check_divides("width", width, ratio)


def check_tensor(name: str, tensor: Tensor, expected: tuple[int | None, ...], like: Tensor) -> None:
    """Compare with the shape that a state was made for, None being any length, and with the dtype of `like`.

    Autocast converts, so that inside of it the dtype is free.
    """
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        want is None or got == want for got, want in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} must have the shape of its state [{wanted}], got {list(shape)}")
    if tensor.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        raise ValueError(f"{name} must be {like.dtype} like the VAE, got {tensor.dtype}")


def check_state(state: VAEState, direction: Direction, vae: str, like: Tensor) -> None:
    """Refuse a state of the other direction, of another architecture than `vae`, or unlike the weights."""
    if state.direction != direction:
        raise ValueError(f"state must be for {direction!r}, got one for {state.direction!r}")
    if state.vae != vae:
        raise ValueError(f"state must come from {vae}, got one from {state.vae}")
    slot = next(iter(state.slots.values()))
    if (slot.dtype, slot.device) != (like.dtype, like.device):
        raise ValueError(
            f"state must be {like.dtype} on {like.device} like the VAE, got {slot.dtype} on {slot.device}"
        )


def channel_values(name: str, values: Sequence[float] | None, channels: int, default: float) -> Tensor:
    """One float32 number per latent channel; None stands for `default` everywhere."""
    if values is None:
        return torch.full((channels,), default)
    if len(values) != channels:
        raise ValueError(f"{name} must hold latent_channels = {channels} numbers, got {len(values)}")
    return torch.tensor(list(values), dtype=torch.float32)
