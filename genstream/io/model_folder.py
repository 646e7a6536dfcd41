"""What a model folder holds, read from its json files and safetensors headers alone."""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_HEADER_LENGTH_BYTES = 8
METADATA = "__metadata__"
SHARD_INDICES = "*.safetensors.index.json"
CARD_NAME = "model_card.json"
INDEX_NAME = "model_index.json"
RESULT_FOLDER = "model"
"""Of a training run: there lies the model that it made."""
_MODEL_FILES = ("config.json",)
_PIPELINE = "CausalVideoPipeline"
_NEEDED = ("transformer", "scheduler")
_VARIANT = re.compile(r"\.(\w+)(-\d+-of-\d+)?\.safetensors$")
_FILES_OF: Mapping[str, tuple[str, ...]] = {
    "Scheduler": ("scheduler_config.json",),
    "TokenizersBackend": ("tokenizer_config.json", "tokenizer.json"),
    "TokenizerFast": ("tokenizer_config.json", "tokenizer.json"),
    "Tokenizer": ("tokenizer_config.json",),
    "Processor": ("preprocessor_config.json",),
    "ProcessorFast": ("preprocessor_config.json",),
    "ProcessorPil": ("preprocessor_config.json",),
}
"""Files that a component must have, by what its class's name ends with; all others are models."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model was made for.

    Attributes:
        name: its name; the folder's where there is no card.
        description: what it is, in a sentence; may be empty.
        height: native, in pixels; None where the model does not say.
        width: native, in pixels; None where the model does not say.
        fps: native frames per second; None where the model does not say.
        vocabulary: the words that it knows, by group; empty where it knows language at large.
    """

    name: str
    description: str
    height: int | None
    width: int | None
    fps: int | None
    vocabulary: Mapping[str, tuple[str, ...]]

    @property
    def native_size(self) -> tuple[int, int] | None:
        """Width and height in pixels; None where the model does not say both."""
        return None if self.width is None or self.height is None else (self.width, self.height)


def installed_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.parent.name for path in _ASSETS.glob("*/model_index.json"))


def installed_folder(name: str) -> Path | None:
    """Folder of a model inside the package; None for any other name."""
    return _ASSETS / name if name in installed_models() else None


def model_place(given: str) -> Path | None:
    """Folder of an installed model, of a model, or of the model that a run made; None where there is none."""
    folder = installed_folder(given) or Path(given)
    places = (folder, folder / RESULT_FOLDER)
    return next((place for place in places if (place / INDEX_NAME).is_file()), None)


def find_model(name_or_folder: str) -> Path:
    """Folder of a model as `model_place` finds it, with all its files whole."""
    folder = model_place(name_or_folder) or Path(name_or_folder)
    if not name_or_folder or not folder.is_dir():
        raise ValueError(
            f"model must be one of {', '.join(installed_models()) or '(none installed)'}"
            f" or a folder in diffusers layout, got {name_or_folder!r}"
        )
    check_model_folder(folder)
    return folder


def read_card(folder: Path) -> ModelCard:
    """What `model_index.json` and, where there is one, `model_card.json` in `folder` say."""
    index = read_object(folder / INDEX_NAME)
    path = folder / CARD_NAME
    content: dict[str, Any] = {"name": folder.name, "description": "", "vocabulary": {}}
    if path.is_file():
        content = read_object(path)
    try:
        return ModelCard(
            name=content["name"],
            description=content["description"],
            height=index.get("default_height"),
            width=index.get("default_width"),
            fps=index.get("default_fps"),
            vocabulary={group: tuple(words) for group, words in content["vocabulary"].items()},
        )
    except KeyError as error:
        raise ValueError(f"model file {str(path)!r} lacks {error}") from error
    except AttributeError as error:
        raise ValueError(f"vocabulary in model file {str(path)!r} must be a json object") from error


def check_model_folder(folder: Path, replaced: Collection[str] = (), kind: str = _PIPELINE) -> None:
    """Raise ValueError that names the first file that is missing or cut off.

    Args:
        folder: in diffusers layout.
        replaced: components that will not be read from it.
        kind: class of the pipeline that it must hold.
    """
    if not (folder / INDEX_NAME).is_file():
        raise ValueError(f"model folder {str(folder)!r} has no {INDEX_NAME}")
    if (found := read_object(folder / INDEX_NAME).get("_class_name")) != kind:
        raise ValueError(
            f"model folder {str(folder)!r} must hold a {kind}, got a {found}: genstream convert {folder} "
            "-o NEW_FOLDER makes one of Wan's pipelines"
        )
    components = _components(folder)
    for name in _NEEDED:
        if name not in components and name not in replaced:
            raise ValueError(f"{str(folder / INDEX_NAME)!r} must name a {name}")
    for name, kind in components.items():
        if name in replaced:
            continue
        if not (folder / name).is_dir():
            raise ValueError(f"model folder {str(folder)!r} lacks the folder {name!r} named in {INDEX_NAME}")
        check_component(folder / name, kind)


def check_component(component: Path, kind: str) -> None:
    """Check the files of one component, an object of class `kind`."""
    required = next((files for end, files in _FILES_OF.items() if kind.endswith(end)), _MODEL_FILES)
    for name in required:
        if not (component / name).is_file():
            raise ValueError(f"model file {str(component / name)!r} is missing")
        if name.endswith(".json"):
            read_object(component / name)
    for path in sorted(component.glob("*.json")):
        read_json(path)
    weights = weight_files(component)
    if required is _MODEL_FILES and not weights:
        raise ValueError(f"model folder {str(component)!r} has no .safetensors file")
    for path in weights:
        check_weights(path)


def only_variant(folder: Path) -> str | None:
    """The variant in whose name all weights of a model folder are saved, such as "fp16"; else None."""
    files = [path for name in _components(folder) for path in weight_files(folder / name)]
    found = {variant_of(path) for path in files}
    return found.pop() if len(found) == 1 else None


def parameter_counts(folder: Path) -> dict[str, int]:
    """Number of weights of each component that has any."""
    counts: dict[str, int] = {}
    for name in _components(folder):
        headers = [read_header(path)[0] for path in weight_files(folder / name)]
        entries = [entry for header in headers for key, entry in header.items() if key != METADATA]
        if entries:
            counts[name] = sum(math.prod(entry["shape"]) for entry in entries)
    return counts


def size_bytes(folder: Path) -> int:
    """Bytes of all files in `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _components(folder: Path) -> dict[str, str]:
    """Class by name, of the entries in the index whose value is [library, class], both given."""
    index = read_object(folder / INDEX_NAME)
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return {name: kind for name, (library, kind) in pairs.items() if library and kind}


def read_object(path: Path) -> dict[str, Any]:
    """Content of a file that holds a json object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"model file {str(path)!r} must hold a json object, got {type(content).__name__}")
    return content


def weight_files(component: Path) -> list[Path]:
    """Weight files of a component: those that its shard index names, or those that are there.

    Those of a variant count only where there are no others, as diffusers has it.
    """
    indices = sorted(component.glob(SHARD_INDICES))
    named = {component / name for index in indices for name in weight_map(index).values()}
    found = sorted(named | set(component.glob("*.safetensors")))
    return [path for path in found if variant_of(path) is None] or found


def variant_of(file: Path) -> str | None:
    """The variant in a weight file's name, such as "fp16"; None for plain weights."""
    match = _VARIANT.search(file.name)
    return None if match is None else match.group(1)


def weight_map(index: Path) -> dict[str, str]:
    """File of each tensor, as a shard index says."""
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"model file {str(index)!r} must hold a weight_map from tensors to files")
    return listed


def check_weights(path: Path) -> None:
    """Raise ValueError if a safetensors file is missing or cut off."""
    if not path.is_file():
        raise ValueError(f"model file {str(path)!r} is missing")
    header, data_start = read_header(path)
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != METADATA]
    expected, found = data_start + max(ends, default=0), path.stat().st_size
    if found != expected:
        raise ValueError(f"model file {str(path)!r} is cut off: {found} bytes, its header says {expected}")


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Header of a safetensors file, and where its data starts in bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
        text = file.read(min(length, path.stat().st_size))
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"model file {str(path)!r} is cut off or no safetensors file") from error
    if not isinstance(header, dict):
        raise ValueError(f"model file {str(path)!r} is no safetensors file: its header is no object")
    for name, entry in header.items():
        if name != METADATA and not _is_entry(entry):
            raise ValueError(f"model file {str(path)!r} has a damaged header: {name!r} is {entry!r}")
    return header, _HEADER_LENGTH_BYTES + length


def _is_entry(entry: object) -> bool:
    """Whether it says dtype, shape and place of a tensor."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    numbers = [entry.get("shape"), entry.get("data_offsets")]
    if not all(isinstance(row, list) and all(type(n) is int and n >= 0 for n in row) for row in numbers):
        return False
    return len(entry["data_offsets"]) == 2 and entry["data_offsets"][0] <= entry["data_offsets"][1]


def read_json(path: Path) -> Any:  # noqa: ANN401 - json
    """Content of a json file; ValueError names the file if it is cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"file {str(path)!r} is not valid json: {error}") from error
