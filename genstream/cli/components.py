"""The parts of a model folder besides the transformer: taken over from other folders, or made of files."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from transformers import (
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    UMT5Config,
)

from genstream.conditioning.wan_image import WanImageProcessor
from genstream.io.checkpoint import SAFETENSORS, TORCH_SUFFIXES, StoredTensor, naming, open_checkpoint
from genstream.io.model_folder import INDEX_NAME, check_component, read_object, variant_of, weight_files
from genstream.io.shards import PlannedTensor, write_shards
from genstream.pipelines.tensors import check_part
from genstream.transformer.clip import clip_places, infer_clip_config
from genstream.transformer.umt5 import infer_umt5_config, umt5_places
from genstream.vae.loading import component_folder
from genstream.vae.taehv import load_taehv
from genstream.vae.wan_weights import load_wan_vae
from genstream.vae.weights import read_weights

_CONFIG_NAME = "config.json"
_OWN_VAES = ("CausalVideoVAE", "TinyVideoVAE", "TurboVAED", "WanVideoVAE")
_TEXT_ENCODER = "UMT5EncoderModel"
_WAN_TEXT_ENCODER = "models_t5*"
_WAN_TOKENIZER = Path("google") / "umt5-xxl"
_WAN_VAE = "*VAE*"
_WAN_IMAGE_ENCODER = "models_clip*"
_KNOWN_PARTS = ("transformer", "scheduler", "tokenizer", "text_encoder", "vae")
_IMAGE_ENCODERS = ("CLIPVisionModel", "CLIPVisionModelWithProjection")
_PROCESSOR_NAME = "preprocessor_config.json"
_WEIGHT_SUFFIXES = (SAFETENSORS, *TORCH_SUFFIXES)
_LATENT_CHANNELS = ("latent_channels", "z_dim")


@dataclass(frozen=True, kw_only=True)
class Component:
    """A part of a model folder.

    Attributes:
        name: of its folder and of its entry in the index.
        library: that loads it.
        kind: its class.
        config: what its configuration says.
        files: weights that it is made of.
        write: fills its folder.
    """

    name: str
    library: str
    kind: str
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    write: Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class PartSources:
    """Where the parts come from; None takes what the source of the transformer holds.

    Attributes:
        source: file or folder of the transformer.
        text_encoder: folder or file.
        tokenizer: folder.
        vae: folder or file.
        image_encoder: folder of CLIP's vision model, with its image processor inside or beside it, or of a
            pipeline that has both, or the file that Wan 2.1 publishes.
        takes_image: whether the transformer takes image tokens.
        accepted: parts that the pipeline takes; those of a model folder that it does not take are left out.
        max_shard_bytes: of a weight file that is written.
    """

    source: Path
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    vae: Path | None = None
    image_encoder: Path | None = None
    takes_image: bool = False
    accepted: frozenset[str] = frozenset()
    max_shard_bytes: int = 5 * 10**9


@dataclass(kw_only=True)
class Parts:
    """The parts that were found, and what there is to say about them."""

    components: list[Component] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, component: Component, source: Path) -> None:
        """Take a part."""
        self.components.append(component)
        self.notes.append(f"took {component.name} ({component.kind}) from {source.name}")

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError if a part does not fit the transformer with that configuration."""
        for component in self.components:
            for name in _LATENT_CHANNELS if component.name == "vae" else ():
                _check_equal(component, name, "out_channels", config)
            if component.name == "text_encoder":
                _check_equal(component, "d_model", "text_dim", config)
            if component.name == "image_encoder":
                _check_equal(component, "hidden_size", "image_dim", config)


def find_parts(sources: PartSources) -> Parts:
    """Text encoder, tokenizer, VAE and image encoder, as far as there are any.

    Raises:
        ValueError: what was named holds none, or is not whole.
    """
    parts = Parts()
    held = sources.source if sources.source.is_dir() else None
    if (place := sources.text_encoder or held) is not None:
        _find_text_encoder(parts, place, sources)
    if (place := sources.vae or held) is not None and (vae := _find_vae(place, sources)) is not None:
        parts.add(vae, place)
    _find_image_encoder(parts, sources)
    _find_others(parts, sources)
    found = {component.name for component in parts.components}
    if sources.tokenizer is not None and "text_encoder" not in found:
        raise ValueError(
            f"tokenizer (--tokenizer) needs a text encoder (--text-encoder), got {str(sources.tokenizer)!r}"
        )
    wanted = {"text_encoder": "--text-encoder", "vae": "--vae"}
    if sources.takes_image:
        wanted["image_encoder"] = "--image-encoder"
    for name, option in wanted.items():
        if name not in found:
            parts.notes.append(f"there is no {name}: convert the folder again with {option} to add one")
    return parts


def copied(name: str, library: str, kind: str, folder: Path) -> Component:
    """A part that is taken over as it is, without weights in pickles."""
    if not folder.is_dir():
        raise ValueError(f"{name} must be in the folder {str(folder)!r}, which does not exist")
    check_component(folder, kind)
    if (folder / _CONFIG_NAME).is_file():
        check_part(folder, library, kind)
    config = folder / _CONFIG_NAME
    return Component(
        name=name,
        library=library,
        kind=kind,
        config=read_object(config) if config.is_file() else {},
        files=tuple(weight_files(folder)),
        write=lambda target: _copy(folder, target),
    )


def _copy(folder: Path, target: Path) -> None:
    """Copy a part, its weights under the names that are looked for where no variant is asked for."""
    files = weight_files(folder)
    variants = {variant_of(path) for path in files} - {None}
    if variants and len(files) > 1:
        raise ValueError(
            f"{str(folder)!r} must have its weights in one file, or not as a variant: {variants}"
        )

    def skipped(_: object, names: list[str]) -> set[str]:
        kept = {path.name for path in files}
        return {name for name in names if Path(name).suffix in _WEIGHT_SUFFIXES and name not in kept}

    shutil.copytree(folder, target, ignore=skipped)
    for path in files:
        for variant in variants:
            (target / path.name).rename(target / path.name.replace(f".{variant}.", "."))


def _index(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class of the parts of a model folder; empty for any other."""
    path = folder / INDEX_NAME
    entries = read_object(path) if path.is_file() else {}
    return {
        name: (entry[0], entry[1])
        for name, entry in entries.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[0]
    }


def indexed(name: str, folder: Path) -> Component | None:
    """A part of a model folder, as its index says."""
    index = _index(folder)
    return copied(name, *index[name], folder / name) if name in index else None


def _find_others(parts: Parts, sources: PartSources) -> None:
    """All else that a model folder holds."""
    source, found = sources.source, {component.name for component in parts.components}
    for name, (library, kind) in sorted(_index(source).items()):
        if name in found:
            continue
        if name in sources.accepted and name not in _KNOWN_PARTS:
            parts.add(copied(name, library, kind, source / name), source)
        elif name not in _KNOWN_PARTS:
            parts.notes.append(f"left out of {source.name}: {name!r}, which the pipeline does not take")


def _find_text_encoder(parts: Parts, place: Path, sources: PartSources) -> None:
    encoder, beside = _text_encoder(place, sources.max_shard_bytes), place
    if encoder is None:
        if sources.text_encoder is not None:
            raise ValueError(
                f"text_encoder (--text-encoder) must be or hold a umT5 encoder, got {str(place)!r}"
            )
        return
    parts.add(encoder, place)
    tokenizer = indexed("tokenizer", beside) if sources.tokenizer is None else None
    if tokenizer is not None:
        tokenizer = _as_stored(tokenizer, beside / "tokenizer")
    parts.add(tokenizer or _tokenizer(sources.tokenizer, place), sources.tokenizer or place)


def _text_encoder(place: Path, max_shard_bytes: int) -> Component | None:
    if place.is_dir():
        if (part := indexed("text_encoder", place)) is not None:
            return part
        if _TEXT_ENCODER in _architectures(place):
            return copied("text_encoder", "transformers", _TEXT_ENCODER, place)
        file = _one_file(place, _WAN_TEXT_ENCODER)
    else:
        file = place
    return None if file is None else _published_text_encoder(file, max_shard_bytes)


def _published_text_encoder(file: Path, max_shard_bytes: int) -> Component:
    checkpoint = open_checkpoint(file, None)
    with naming(file):
        arguments = infer_umt5_config(checkpoint.shapes)
        places = umt5_places(checkpoint.shapes, arguments)
    tensors = {name: checkpoint.tensors[theirs] for name, theirs in places.items()}
    return _made("text_encoder", _TEXT_ENCODER, UMT5Config(**arguments), tensors, max_shard_bytes)


def _made(
    name: str,
    kind: str,
    config: PreTrainedConfig,
    stored: Mapping[str, StoredTensor],
    max_shard_bytes: int,
) -> Component:
    """A part of class `kind` of transformers, made of stored tensors by their names in it."""
    tensors = [PlannedTensor.of(name, tensor) for name, tensor in stored.items()]
    config.architectures = [kind]
    config.dtype = tensors[0].dtype

    def write(folder: Path) -> None:
        write_shards(folder, "model", tensors, max_shard_bytes)
        config.save_pretrained(folder)

    return Component(
        name=name,
        library="transformers",
        kind=kind,
        config=config.to_dict(),
        files=tuple(sorted({tensor.file for tensor in stored.values()})),
        write=write,
    )


def _as_stored(tokenizer: Component, folder: Path) -> Component:
    """The tokenizer as its file has it: T5's class would build another one, without umT5's byte fallback."""
    if (folder / "tokenizer.json").is_file():
        return replace(tokenizer, kind=PreTrainedTokenizerFast.__name__)
    return tokenizer


def _find_image_encoder(parts: Parts, sources: PartSources) -> None:
    place = sources.image_encoder
    if place is None:
        held = sources.source if sources.takes_image and sources.source.is_dir() else None
        place = None if held is None else _one_file(held, _WAN_IMAGE_ENCODER)
        if place is None:
            return
    file = _one_file(place, _WAN_IMAGE_ENCODER) if place.is_dir() else place
    if file is not None:
        encoder, processor = _published_image_encoder(file, sources.max_shard_bytes)
    else:
        encoder, processor = _stored_image_encoder(place)
    parts.add(encoder, file or place)
    if file is not None:
        parts.notes.append(f"left out of {file.name}: CLIP's text half, which the pipeline does not take")
    parts.add(processor, file or place)


def _stored_image_encoder(place: Path) -> tuple[Component, Component]:
    """Encoder and processor in folders of diffusers or transformers."""
    encoder, processor = indexed("image_encoder", place), indexed("image_processor", place)
    kind = next((kind for kind in _architectures(place) if kind in _IMAGE_ENCODERS), None)
    if encoder is None and kind is not None:
        encoder = copied("image_encoder", "transformers", kind, place)
        beside = [place, place.parent / "image_processor"]
        processor = next((_image_processor(folder) for folder in beside if _has_processor(folder)), None)
    if encoder is None or processor is None:
        raise ValueError(
            f"image_encoder (--image-encoder) must be the folder of a CLIP vision model with "
            f"{_PROCESSOR_NAME} in it or in image_processor beside it, or of a pipeline with both, or Wan's "
            f"{_WAN_IMAGE_ENCODER}.pth, got {str(place)!r}"
        )
    return encoder, processor


def _published_image_encoder(file: Path, max_shard_bytes: int) -> tuple[Component, Component]:
    """The vision half of the published CLIP, and how Wan 2.1 brings a picture to its size."""
    checkpoint = open_checkpoint(file, None)
    with naming(file):
        arguments = infer_clip_config(checkpoint.shapes)
        places = clip_places(checkpoint.shapes, arguments)
    tensors = {
        name: checkpoint.tensors[place.name].part(place.first_row, place.shape)
        for name, place in places.items()
    }
    processor = WanImageProcessor(size=arguments["image_size"])
    described = Component(
        name="image_processor",
        library="genstream",
        kind=WanImageProcessor.__name__,
        config={},
        files=(),
        write=processor.save_pretrained,
    )
    encoder = _made(
        "image_encoder", _IMAGE_ENCODERS[0], CLIPVisionConfig(**arguments), tensors, max_shard_bytes
    )
    return encoder, described


def _has_processor(folder: Path) -> bool:
    return (folder / _PROCESSOR_NAME).is_file()


def _image_processor(folder: Path) -> Component:
    """Only its description: the folder may be that of the encoder."""
    file = folder / _PROCESSOR_NAME
    described = read_object(file)

    def write(target: Path) -> None:
        target.mkdir()
        shutil.copy(file, target)

    kind = described.get("image_processor_type", "CLIPImageProcessor")
    library = "genstream" if kind == WanImageProcessor.__name__ else "transformers"
    return Component(
        name="image_processor", library=library, kind=kind, config=described, files=(), write=write
    )


def _tokenizer(given: Path | None, encoder: Path) -> Component:
    """The tokenizer that was given, or the one beside a published text encoder."""
    folder = encoder if encoder.is_dir() else encoder.parent
    candidates = [given] if given else [folder / _WAN_TOKENIZER, folder.parent / "tokenizer"]
    for place in candidates:
        if (place / "tokenizer_config.json").is_file():
            kind = read_object(place / "tokenizer_config.json").get("tokenizer_class", "T5Tokenizer")
            return _as_stored(copied("tokenizer", "transformers", kind, place), place)
    raise ValueError(
        f"tokenizer (--tokenizer) must be a folder with tokenizer_config.json, got "
        f"{' and '.join(repr(str(place)) for place in candidates)}"
    )


def _find_vae(place: Path, sources: PartSources) -> Component | None:
    file: Path | None = place
    if place.is_dir():
        if (part := indexed("vae", place)) is not None:
            return part
        place = component_folder(place)  # of a training run
        kind = str(_config(place).get("_class_name", ""))
        if kind in _OWN_VAES or "Autoencoder" in kind:
            return copied("vae", "genstream" if kind in _OWN_VAES else "diffusers", kind, place)
        file = _one_file(place, _WAN_VAE)
    if file is None:
        if sources.vae is not None:
            raise ValueError(f"vae (--vae) must be or hold a video VAE, got {str(place)!r}")
        return None
    return _published_vae(file)


def _published_vae(file: Path) -> Component:
    with naming(file):
        tensors = read_weights(file)
        vae: ModelMixin = load_taehv(tensors) if "encoder.0.weight" in tensors else load_wan_vae(tensors)
    return Component(
        name="vae",
        library="genstream",
        kind=type(vae).__name__,
        config=dict(vae.config),
        files=(file,),
        write=vae.save_pretrained,
    )


def _one_file(folder: Path, pattern: str) -> Path | None:
    files = [path for path in sorted(folder.glob(pattern)) if path.suffix in (*TORCH_SUFFIXES, SAFETENSORS)]
    if len(files) > 1:
        raise ValueError(
            f"{str(folder)!r} holds {', '.join(path.name for path in files)}: name the file to take"
        )
    return files[0] if files else None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG_NAME
    return read_object(path) if path.is_file() else {}


def _architectures(folder: Path) -> list[str]:
    """Classes that a configuration of transformers names."""
    named = _config(folder).get("architectures")
    return [str(kind) for kind in named] if isinstance(named, list) else []


def _check_equal(component: Component, name: str, argument: str, config: Mapping[str, Any]) -> None:
    if config[argument] is None:
        raise ValueError(f"{component.name} has no place: the transformer has no {argument}")
    if name in component.config and component.config[name] != config[argument]:
        raise ValueError(
            f"{component.name} must have {name} {config[argument]} like the transformer's {argument}, "
            f"got {component.config[name]}"
        )
