"""Whether the weights of a model folder's parts are those of their configurations, before they are loaded."""

import importlib
import re
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import ModelMixin
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from genstream.io.checkpoint import naming, open_checkpoint
from genstream.io.model_folder import read_object
from genstream.transformer.matching import Shapes, check_tensors

_CONFIG_NAME = "config.json"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check_part(folder: Path, library: str, kind: str) -> None:
    """Raise ValueError that names tensors which a part's folder lacks, or has in another shape.

    Parts of this library may not hold others either; those of diffusers and transformers may, as published
    weights do, but not further layers of the kinds that they have. What is quantized keeps its tensors under
    names and in shapes of its own and is not checked.

    Args:
        folder: of the part.
        library: that has its class.
        kind: its class.
    """
    try:
        part = getattr(importlib.import_module(library), kind, None)
    except ImportError as error:
        raise ValueError(f"{str(folder)!r} must be of a library that is installed: {error}") from error
    if not (isinstance(part, type) and issubclass(part, nn.Module)):
        return
    if "quantization_config" in read_object(folder / _CONFIG_NAME):
        return
    try:
        expected, tied = _expected(part, folder)
    except (StrictDataclassError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise ValueError(f"{str(folder / _CONFIG_NAME)!r} must describe a {kind}: {error}") from error
    with naming(folder):
        given = _named_like(expected, open_checkpoint(folder, None).shapes)
        wanted = {name: shape for name, shape in expected.items() if name in given or name not in tied}
        # Further layers of a kind differ from those that the part has in their numbers only.
        kinds = {_NUMBER.sub("N", name) for name in wanted}
        ours = library == "genstream"
        held = {name: given[name] for name in given if ours or _NUMBER.sub("N", name) in kinds}
        check_tensors(held, wanted)


def _named_like(expected: Shapes, given: Shapes) -> Shapes:
    """`given` without a prefix that published weights have before all names, which transformers drops too."""
    last = max(expected)
    prefixes = {name.removesuffix(last) for name in given if name.endswith(f".{last}")}
    if len(prefixes) != 1 or last in given:
        return given
    (prefix,) = prefixes
    return {name.removeprefix(prefix): shape for name, shape in given.items()}


def _expected(part: type[nn.Module], folder: Path) -> tuple[Shapes, set[str]]:
    """Shape of each tensor that the part has, and which of them are another one under a second name."""
    with torch.device("meta"):
        if issubclass(part, PreTrainedModel):
            config = cast("Any", part).config_class.from_pretrained(folder)
            model: nn.Module = part(config)
        elif issubclass(part, ModelMixin):
            model = cast("Any", part).from_config(read_object(folder / _CONFIG_NAME))
        else:
            return {}, set()
    first = dict(model.named_parameters()).keys()
    every = dict(model.named_parameters(remove_duplicate=False)).keys()
    # Parameters on no device are not tied yet; transformers says which will be.
    later = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}, (every - first) | later.keys()
