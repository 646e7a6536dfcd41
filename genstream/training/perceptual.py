"""A perceptual distance from any vision model on disk."""

import inspect
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel

from genstream.io.model_folder import read_json
from genstream.vae.protocol import RGB

_PREPROCESSOR_NAME = "preprocessor_config.json"
_INTERPOLATE = "interpolate_pos_encoding"


class FeatureDistance:
    """Distance of two batches of images in the features of a vision model.

    LPIPS (1801.03924) with all channels weighing the same: features of all layers, of length 1 everywhere.

    Args:
        model: frozen; gives hidden states [N, D, h, w] or [N, L, D].
        mean: per colour, of images in [0, 1], that the model expects to be subtracted.
        std: per colour, that it expects them to be divided by.
    """

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        self._model = model
        # Models with position embeddings fit them to images of another size than they were trained on.
        known = inspect.signature(model.forward).parameters
        self._options = {_INTERPOLATE: True} if _INTERPOLATE in known else {}
        self._mean = mean.view(-1, 1, 1)
        self._std = std.view(-1, 1, 1)

    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """[N] of images [N, 3, H, W] in [-1, 1]; gradient flows to both."""
        total = images.new_zeros(len(images))
        for ours, theirs in zip(self._features(images), self._features(others), strict=True):
            total = total + (ours - theirs).square().sum(dim=1).flatten(1).mean(dim=1)
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        pixels = ((images + 1) / 2 - self._mean) / self._std
        states = self._model(pixels, output_hidden_states=True, **self._options).hidden_states
        by_channel = [state if state.dim() == 4 else state.transpose(1, 2) for state in states]
        return [F.normalize(state, dim=1) for state in by_channel]


def load_perceptual(folder: str | Path, device: str | torch.device = "cpu") -> FeatureDistance:
    """The distance of a vision model saved by transformers, such as ResNet, ConvNeXt, DINOv2 or CLIP.

    Args:
        folder: with the model, or one of which it is a part, and the preprocessor_config.json that says what
            it expects.
        device: that the images will be on.

    Raises:
        ValueError: there is no such model in the folder.
    """
    folder = Path(folder)
    if not (folder / _PREPROCESSOR_NAME).is_file():
        raise ValueError(
            f"perceptual_model must be the folder of a vision model with {_PREPROCESSOR_NAME}, "
            f"got {str(folder)!r}"
        )
    path = folder / _PREPROCESSOR_NAME
    described = read_json(path)
    mean, std = (_statistic(described, name, path).to(device) for name in ("image_mean", "image_std"))
    try:
        loaded = AutoModel.from_pretrained(str(folder))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"perceptual_model in {str(folder)!r} cannot be loaded: {error}") from error
    model = getattr(loaded, "vision_model", loaded).eval().requires_grad_(requires_grad=False)
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise ValueError(
            f"perceptual_model must be a model that sees images, got a {type(loaded).__name__} in "
            f"{str(folder)!r}"
        )
    return FeatureDistance(model.to(device), mean, std)


def _statistic(described: object, name: str, path: Path) -> Tensor:
    """What a model's description, read from `path`, says of the three colours."""
    values = described.get(name) if isinstance(described, dict) else None
    numbers = (
        [value for value in values if isinstance(value, int | float)] if isinstance(values, list) else []
    )
    if len(numbers) != RGB:
        raise ValueError(f"{name} in {str(path)!r} must be {RGB} numbers, got {values!r}")
    return torch.tensor(numbers, dtype=torch.float32)
