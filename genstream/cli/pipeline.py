"""Loading the pipeline, and its frames as bytes."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from genstream.cli.clip import LoraFile
from genstream.io.hub_card import ADAPTER_FOLDER
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.pipelines.memory import TextEncoderOffload
from genstream.pipelines.quantization import WeightFormat, quantization
from genstream.streaming.chunk import Chunk


def load_pipeline(
    folder: Path,
    *,
    device: str | None,
    dtype: str | None,
    quantize: str | None = None,
    offload: str = "none",
    loras: Sequence[LoraFile] = (),
) -> CausalVideoPipeline:
    """The pipeline in `folder`; where `device` or `dtype` is None, the machine decides.

    `quantize` names a `WeightFormat`, `offload` a `TextEncoderOffload`; `loras` are in use together.
    """
    target = pick_device(device)
    if target.type == "cpu" and offload != TextEncoderOffload.NONE:
        raise ValueError(f"offload (--offload) must be none on cpu, got {offload}")
    quiet_loading()
    pipe: CausalVideoPipeline = CausalVideoPipeline.from_pretrained(
        folder,
        dtype=pick_dtype(dtype, target),
        quantization_config=_quantization(quantize),
    )
    adapter = folder / ADAPTER_FOLDER
    if adapter.is_dir() and not loras:
        print(f"the model holds a LoRA that is not in use: --lora {adapter}", file=sys.stderr)
    _use_loras(pipe, loras)
    match TextEncoderOffload(offload):
        case TextEncoderOffload.NONE:
            _move(pipe, target)
        case TextEncoderOffload.MODEL:
            pipe.enable_model_cpu_offload(device=target)
        case TextEncoderOffload.GROUP:
            kept = ["transformer", "vae"]
            pipe.enable_group_offload(target, offload_type="leaf_level", exclude_modules=kept)
    return pipe


def quiet_loading() -> None:
    """Hide the bars of diffusers and transformers for reading a few files: they would stand before ours."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _move(pipe: CausalVideoPipeline, target: torch.device) -> None:
    # diffusers warns that half precision cannot run on CPUs, where it runs.
    logger = diffusers_logging.get_logger(DiffusionPipeline.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        pipe.to(target)
    finally:
        logger.setLevel(level)


def _use_loras(pipe: CausalVideoPipeline, loras: Sequence[LoraFile]) -> None:
    names = [f"lora_{number}" for number in range(len(loras))]
    try:
        for name, lora in zip(names, loras, strict=True):
            pipe.load_lora_weights(lora.path, name)
    except ImportError as error:
        raise ValueError(f"--lora cannot be used: {error}") from error
    if loras:
        pipe.set_adapters(names, [lora.scale for lora in loras])


def _quantization(name: str | None) -> PipelineQuantizationConfig | None:
    try:
        return None if name is None else quantization(WeightFormat(name))
    except ImportError as error:
        raise ValueError(f"--quantize cannot be {name}: {error}") from error


def frames_of_chunk(chunk: Chunk) -> NDArray[np.uint8]:
    """Frames of a decoded chunk of one stream, uint8 [F, H, W, 3]."""
    assert chunk.frames is not None
    return to_uint8(chunk.frames)


def to_uint8(frames: torch.Tensor) -> NDArray[np.uint8]:
    """Frames [1, 3, F, H, W] in [-1, 1] as uint8 [F, H, W, 3] on the host."""
    levels = ((frames[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(levels.permute(1, 2, 3, 0).cpu().numpy())  # [3, F, H, W] -> [F, H, W, 3]


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name; float32 on cpu and bfloat16 elsewhere when None."""
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def pick_device(name: str | None) -> torch.device:
    """The device of that name; a GPU where there is one when None."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    available += ["mps"] if torch.backends.mps.is_available() else []
    if name not in available and not (name == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"device (--device) must be one of {', '.join(available)} here, got {name!r}")
    return torch.device(name)
