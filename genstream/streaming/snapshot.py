"""Streams in files: save, restore, and go on exactly where they were."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Collection
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from genstream.schedulers import schedule as schedules
from genstream.streaming.controls import Applied, Submitted, from_json, to_json
from genstream.streaming.engine import CacheEngine
from genstream.streaming.intake import Intake, MotionNoise, TransformSettings
from genstream.streaming.noise import restore_noise
from genstream.streaming.request import StreamRequest
from genstream.streaming.settings import RecachePolicy, StreamSettings
from genstream.streaming.state import Blend, StreamState
from genstream.transformer.adapters import LoraUse, adapter_of, base_name, check_loaded, loras_in_use
from genstream.vae.protocol import VAEState
from genstream.vae.wrapping import module_of

FORMAT = 3
_KEY = "genstream_stream"
_INTAKE_TENSORS = ("waiting", "latents", "previous")
_COUNTERS = (
    "frame",
    "uncommitted",
    "chunk_index",
    "frames_out",
    "waiting_frames",
    "paused",
    "stopped",
    "sequence",
)


def model_fingerprint(*modules: nn.Module, loras: Collection[LoraUse] = ()) -> str:
    """Tells models apart by the names, shapes, dtypes and first values of their parameters.

    Of the LoRAs on them only those count that a stream uses.
    """
    digest = sha256()
    used = {None, *(lora.name for lora in loras)}
    for module in modules:
        for name, parameter in module.state_dict().items():
            if adapter_of(name) not in used:
                continue
            digest.update(f"{base_name(name)} {tuple(parameter.shape)} {parameter.dtype}".encode())
            for values in _stored(parameter):
                digest.update(repr(values.flatten()[:8].float().tolist()).encode())
    return digest.hexdigest()


def _stored(parameter: Tensor) -> list[Tensor]:
    """The tensors that hold its numbers; quantized weights are made of several."""
    if not is_traceable_wrapper_subclass(parameter):
        return [parameter]
    names, _ = parameter.__tensor_flatten__()
    return [getattr(parameter, name) for name in names]


def save_state(state: StreamState, path: str | Path, fingerprint: str) -> None:
    """Write a stream to a safetensors file; the file appears whole or not at all."""
    request = state.request
    sources = {
        "prompt_embeds": state.prompt_embeds,
        "history": state.history,
        "queue": state.queue,
        "held": state.held,
        "pixels": state.pixels,
        "request.prompt_embeds": request.prompt_embeds,
        "request.negative_embeds": request.negative_embeds,
        "request.initial_latents": request.initial_latents,
        "request.image_embeds": request.image_embeds,
        "request.image_channels": request.image_channels,
        **_intake_tensors(state),
        **{f"kv.{name}": tensor for name, tensor in state.kv.tensors().items()},
        **{f"noise.{name}": tensor for name, tensor in state.noise.tensors().items()},
        **{f"request.noise.{name}": tensor for name, tensor in request.noise.tensors().items()},
        **({} if state.vae is None else {f"vae.{name}": x for name, x in state.vae.tensors().items()}),
        **(
            {}
            if state.blend is None
            else {"blend.source": state.blend.source, "blend.target": state.blend.target}
        ),
    }
    # A copy of its own for each name: safetensors refuses tensors that share memory.
    tensors = {
        name: tensor.detach().cpu().clone().contiguous()
        for name, tensor in sources.items()
        if tensor is not None
    }
    if not Path(path).parent.is_dir():
        raise ValueError(f"path must lie in an existing folder, got {str(path)!r}")
    if Path(path).is_dir():
        raise ValueError(f"path must name a file, got {str(path)!r}, which is a folder")
    partial = Path(f"{path}.partial")
    try:
        save_file(tensors, partial, metadata={_KEY: json.dumps(_meta(state, fingerprint))})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"path {str(path)!r} cannot be written: {error}") from error


def load_state(path: str | Path, engine: CacheEngine) -> StreamState:
    """The stream that `save_state` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no snapshot, is damaged, or is of another version or model.
    """
    expected = f"path must be a stream snapshot, got {str(path)!r}"
    if Path(path).is_dir():
        raise ValueError(f"{expected}, which is a folder")
    if not Path(path).exists():
        raise FileNotFoundError(f"{expected}, which does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise ValueError(expected)
            meta = json.loads(text)
            _check_format(meta, path)
            loras = _restore_loras(meta["loras"])
            check_loaded(engine.transformer, loras)
            _check_model(
                meta, path, model_fingerprint(engine.transformer, module_of(engine.vae), loras=loras)
            )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return _restore(meta, tensors, engine)
    except SafetensorError as error:
        raise ValueError(f"path must be a whole stream snapshot, got {str(path)!r}: {error}") from error
    except KeyError as error:
        raise ValueError(f"path must be a whole snapshot, got {str(path)!r}, which lacks {error}") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"path must be a snapshot of this version, got {str(path)!r}: {error}") from error


def _check_format(meta: dict[str, Any], path: str | Path) -> None:
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"snapshot {str(path)!r} must have format {FORMAT}, got {meta.get('format')}: it was written by"
            " another version of genstream"
        )


def _check_model(meta: dict[str, Any], path: str | Path, fingerprint: str) -> None:
    if meta.get("model") != fingerprint:
        raise ValueError(
            f"snapshot {str(path)!r} belongs to another model or dtype, or to another LoRA: "
            f"{str(meta.get('model'))[:12]} in the file, {fingerprint[:12]} loaded"
        )


def _meta(state: StreamState, fingerprint: str) -> dict[str, Any]:
    request = state.request
    with state.lock:
        pending = tuple(state.pending)
    return {
        "format": FORMAT,
        "model": fingerprint,
        "request": {
            "prompt": list(request.prompt),
            "height": request.height,
            "width": request.width,
            "num_frames": request.num_frames,
            "decode": request.decode,
            "transform": None if request.transform is None else asdict(request.transform),
            "settings": asdict(request.settings),
            "schedule": {
                "kind": type(request.schedule).__name__,
                "timesteps": list(request.schedule.timesteps),
                "sigmas": list(request.schedule.sigmas),
            },
            "noise": request.noise.meta(),
            "loras": [asdict(lora) for lora in request.loras],
        },
        "counters": {name: getattr(state, name) for name in _COUNTERS},
        "noise": state.noise.meta(),
        "loras": [asdict(lora) for lora in state.loras],
        "origin": state.kv.origin,
        "layout": asdict(state.kv.layout),
        "vae": None if state.vae is None else state.vae.meta(),
        "blend": None if state.blend is None else _blend_meta(state.blend),
        "intake": None if state.intake is None else _intake_meta(state.intake),
        "log": [{**asdict(item), "control": to_json(item.control)} for item in state.log],
        "pending": [{**asdict(item), "control": to_json(item.control)} for item in pending],
    }


def _blend_meta(blend: Blend) -> dict[str, Any]:
    return {name: getattr(blend, name) for name in ("chunks", "done", "recache")}


@torch.no_grad()
def _restore(meta: dict[str, Any], tensors: dict[str, Tensor], engine: CacheEngine) -> StreamState:
    request = _restore_request(meta["request"], _under("request", tensors))
    loras = _restore_loras(meta["loras"])
    # The LoRAs it started with need not be loaded any more.
    state = engine.start(replace(request, loras=loras))
    state.request = request
    layout = asdict(state.kv.layout)
    if meta["layout"] != layout:
        raise ValueError(f"snapshot must have the engine's cache layout {layout}, got {meta['layout']}")
    for name in _COUNTERS:
        value, kind = meta["counters"][name], type(getattr(state, name))
        if type(value) is not kind:
            raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")
        setattr(state, name, value)
    state.noise = restore_noise(meta["noise"], _under("noise", tensors))
    state.prompt_embeds = tensors["prompt_embeds"].to(state.prompt_embeds)
    with loras_in_use(engine.transformer, loras):
        state.text = engine.text_cache(state.prompt_embeds, state.request)
    _check_history(tensors["history"], state.history)
    state.history = tensors["history"].to(state.history)
    state.queue = tensors["queue"].to(state.history) if "queue" in tensors else None
    state.kv.load(_under("kv", tensors), meta["origin"])
    if meta["vae"] is not None:
        slots = {name: slot.to(state.history.device) for name, slot in _under("vae", tensors).items()}
        state.vae = VAEState.restore(slots, meta["vae"])
    for name in ("held", "pixels"):
        if name in tensors:
            setattr(state, name, tensors[name].to(state.history.device))
    if meta["blend"] is not None:
        source, target = (tensors[f"blend.{name}"].to(state.prompt_embeds) for name in ("source", "target"))
        recache = RecachePolicy(meta["blend"]["recache"])
        state.blend = Blend(source=source, target=target, **{**meta["blend"], "recache": recache})
    if state.intake is not None:
        state.intake = _restore_intake(state.intake, meta["intake"], _under("intake", tensors))
    state.log = tuple(Applied(**{**item, "control": from_json(item["control"])}) for item in meta["log"])
    state.pending = deque(
        Submitted(**{**item, "control": from_json(item["control"])}) for item in meta["pending"]
    )
    return state


def _check_history(found: Tensor, empty: Tensor) -> None:
    """The latents must be a stream's of this size, of any length."""
    (batch, channels, _, *size), shape = empty.shape, list(found.shape)
    if len(shape) != empty.ndim or [*shape[:2], *shape[3:]] != [batch, channels, *size]:
        wanted = f"[{batch}, {channels}, any, {size[0]}, {size[1]}]"
        raise ValueError(f"snapshot must have a history of shape {wanted}, got {shape}")


def _restore_request(meta: dict[str, Any], tensors: dict[str, Tensor]) -> StreamRequest:
    settings = meta["settings"]
    levels = meta["schedule"]
    schedule = getattr(schedules, levels["kind"])(tuple(levels["timesteps"]), tuple(levels["sigmas"]))
    return StreamRequest(
        prompt=tuple(meta["prompt"]),
        prompt_embeds=tensors["prompt_embeds"],
        height=meta["height"],
        width=meta["width"],
        num_frames=meta["num_frames"],
        noise=restore_noise(meta["noise"], _under("noise", tensors)),
        schedule=schedule,
        settings=StreamSettings(**settings),
        initial_latents=tensors.get("initial_latents"),
        negative_embeds=tensors.get("negative_embeds"),
        image_embeds=tensors.get("image_embeds"),
        image_channels=tensors.get("image_channels"),
        transform=_restore_transform(meta["transform"]),
        loras=_restore_loras(meta["loras"]),
        decode=meta["decode"],
    )


def _intake_tensors(state: StreamState) -> dict[str, Tensor]:
    intake = state.intake
    if intake is None:
        return {}
    own = {f"intake.{name}": getattr(intake, name) for name in _INTAKE_TENSORS}
    return {**own, **{f"intake.vae.{name}": tensor for name, tensor in intake.vae.tensors().items()}}


def _intake_meta(intake: Intake) -> dict[str, Any]:
    own = {name: getattr(intake, name) for name in ("level", "encoded", "frames", "ended")}
    return {**own, "vae": intake.vae.meta()}


def _restore_intake(empty: Intake, meta: dict[str, Any], tensors: dict[str, Tensor]) -> Intake:
    device = empty.waiting.device
    slots = {name: slot.to(device) for name, slot in _under("vae", tensors).items()}
    own = {name: tensors[name].to(device) for name in _INTAKE_TENSORS}
    return replace(empty, **{**meta, **own, "vae": VAEState.restore(slots, meta["vae"])})


def _restore_transform(meta: dict[str, Any] | None) -> TransformSettings | None:
    if meta is None:
        return None
    motion = meta["motion"]
    return TransformSettings(
        strength=meta["strength"], motion=None if motion is None else MotionNoise(**motion)
    )


def _restore_loras(meta: list[dict[str, Any]]) -> tuple[LoraUse, ...]:
    return tuple(LoraUse(**lora) for lora in meta)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix.`, without it."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
