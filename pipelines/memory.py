"""Memory that a stream takes on a GPU, known before a weight is read: from configurations and file headers.

Weights and caches are exact. What a pass takes besides is found by running it on tensors that have only a
shape, so it follows the code of every component; workspaces of libraries come on top.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ModelMixin
from torch import Tensor, nn
from transformers import AutoConfig

import genstream
from genstream.io.checkpoint import open_checkpoint
from genstream.io.model_folder import INDEX_NAME, read_object
from genstream.pipelines.allocation import peak_bytes
from genstream.pipelines.quantization import KEPT, WeightFormat
from genstream.shapes import check_divides, latent_frames_covering
from genstream.streaming.request import StreamSettings
from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import places, read_config
from genstream.vae.adapters.registry import adapter_of
from genstream.vae.protocol import StreamingVAE, VAESpec
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.wrapping import module_of, streams

_IMAGE_TOKENS = 257  # of a CLIP ViT-H, which Wan's image-to-video models look through
_TIMESTEP = 500.0
_TEXT_TOKENS = 512


class TextEncoderOffload(StrEnum):
    """Where the text encoder waits between prompts."""

    NONE = "none"
    """On the GPU."""
    MODEL = "model"
    """On the CPU; it comes whole for each prompt (diffusers' `enable_model_cpu_offload`)."""
    GROUP = "group"
    """On the CPU; its layers come one by one (diffusers' `enable_group_offload`)."""


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """A stream whose memory is asked for.

    Attributes:
        folder: of the model, in diffusers layout.
        height: pixels.
        width: pixels.
        settings: how the model is run.
        num_frames: length of the stream; None for an endless one.
        dtype: of weights, cache and activations.
        weights: eight-bit weights in the transformer's blocks; None for `dtype`.
        offload: where the text encoder waits.
        tiny_vae: decode with TAEHV in place of the model's own VAE.
        batch_size: streams that advance together.
    """

    folder: Path
    height: int
    width: int
    settings: StreamSettings
    num_frames: int | None = None
    dtype: torch.dtype = torch.bfloat16
    weights: WeightFormat | None = None
    offload: TextEncoderOffload = TextEncoderOffload.NONE
    tiny_vae: bool = False
    batch_size: int = 1


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the GPU.

    Attributes:
        transformer_bytes: weights.
        vae_bytes: weights.
        text_encoder_bytes: weights that stay; 0 where it is offloaded or there is none.
        kv_cache_bytes: keys and values of the past, and the latents they are rebuilt from.
        text_cache_bytes: keys and values of the prompt, and of the negative one.
        vae_state_bytes: what the decoder remembers.
        denoise_bytes: besides, for a pass over a chunk.
        decode_bytes: besides, for decoding a chunk, its frames included.
        encode_bytes: besides, for encoding a prompt, weights that come for it included.
        recache_bytes: besides, for rebuilding the cache after a new prompt, the new cache included.
    """

    transformer_bytes: int
    vae_bytes: int
    text_encoder_bytes: int
    kv_cache_bytes: int
    text_cache_bytes: int
    vae_state_bytes: int
    denoise_bytes: int
    decode_bytes: int
    encode_bytes: int
    recache_bytes: int

    @property
    def resting_bytes(self) -> int:
        """Between two steps of a stream."""
        weights = self.transformer_bytes + self.vae_bytes + self.text_encoder_bytes
        return weights + self.kv_cache_bytes + self.text_cache_bytes + self.vae_state_bytes

    @property
    def streaming_bytes(self) -> int:
        """Most at once while it streams with one prompt."""
        return self.resting_bytes + max(self.denoise_bytes, self.decode_bytes)

    @property
    def peak_bytes(self) -> int:
        """Most at once, changes of the prompt included."""
        return max(self.streaming_bytes, self.resting_bytes + max(self.encode_bytes, self.recache_bytes))


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What would take less memory.

    Attributes:
        option: of `genstream plan`.
        plan: with it alone.
        peak_bytes: of that plan.
        together_bytes: of a plan with all proposals up to this one.
    """

    option: str
    plan: StreamPlan
    peak_bytes: int
    together_bytes: int


class MemoryPlanner:
    """Estimates plans of one model. What plans have in common is found once."""

    def __init__(self) -> None:
        self._decoding: dict[StreamPlan, tuple[int, int]] = {}
        self._encoding: dict[StreamPlan, tuple[int, int]] = {}

    def estimate(self, plan: StreamPlan) -> MemoryEstimate:
        """The memory of a stream.

        Raises:
            ValueError: the size does not fit the model, its files contradict each other, or an endless
                stream would keep everything.
        """
        vae = _vae(plan)
        config = read_config(read_object(plan.folder / "transformer" / "config.json"))
        stream = _Stream(config, vae.spec, plan)
        layers, capacity = config["num_layers"], stream.layout.capacity_frames
        cache_bytes = layers * stream.kv.nbytes
        decoded = replace(_plain(plan), tiny_vae=plan.tiny_vae)
        if decoded not in self._decoding:
            self._decoding[decoded] = _decoding(vae, stream)
        encoded = replace(_plain(plan), height=0, width=0, offload=plan.offload)
        if encoded not in self._encoding:
            self._encoding[encoded] = _text_encoding(plan)
        encoder_bytes, encode_bytes = self._encoding[encoded]
        state_bytes, decode_bytes = self._decoding[decoded]
        return MemoryEstimate(
            transformer_bytes=sum(_transformer_bytes(config, plan).values()),
            vae_bytes=sum(tensor.nbytes for tensor in _tensors(module_of(vae))),
            text_encoder_bytes=encoder_bytes,
            kv_cache_bytes=cache_bytes + stream.latents(stream.transformer.out_channels, capacity).nbytes,
            text_cache_bytes=layers * stream.text_bytes,
            vae_state_bytes=state_bytes,
            denoise_bytes=stream.pass_bytes(capacity, plan.settings.chunk_frames),
            decode_bytes=decode_bytes,
            encode_bytes=encode_bytes,
            recache_bytes=cache_bytes + stream.pass_bytes(0, capacity),
        )

    def proposals(self, plan: StreamPlan) -> list[Proposal]:
        """What would take less memory; first what harms the picture least."""
        found, together = [], plan
        for option, changed in _smaller(plan):
            together = replace(together, **changed)
            alone = replace(plan, **changed)
            found.append(
                Proposal(
                    option=option,
                    plan=alone,
                    peak_bytes=self.estimate(alone).peak_bytes,
                    together_bytes=self.estimate(together).peak_bytes,
                )
            )
        return found


def _plain(plan: StreamPlan) -> StreamPlan:
    """What every part of the memory depends on; the window, for one, is nothing to the VAE."""
    settings = replace(plan.settings, sink_frames=0, window_frames=0, guidance_scale=1.0)
    return StreamPlan(
        folder=plan.folder,
        height=plan.height,
        width=plan.width,
        settings=settings,
        dtype=plan.dtype,
        batch_size=plan.batch_size,
    )


def _smaller(plan: StreamPlan) -> Iterator[tuple[str, dict[str, Any]]]:
    """Options and the fields of the plan that they change."""
    settings = plan.settings
    if plan.dtype == torch.float32:
        yield "--dtype bfloat16", {"dtype": torch.bfloat16}
    if plan.offload is not TextEncoderOffload.GROUP and _has_text_encoder(plan):
        yield "--offload group", {"offload": TextEncoderOffload.GROUP}
    if plan.weights is None:
        yield "--quantize int8", {"weights": WeightFormat.INT8}
    if not plan.tiny_vae and _tiny_fits(plan):
        yield "--tiny-vae", {"tiny_vae": True}
    if settings.window_frames is None or settings.window_frames > settings.chunk_frames:
        window = max((settings.window_frames or 0) // 2, settings.chunk_frames)
        yield f"--window {window}", {"settings": replace(settings, window_frames=window)}
    if size := _smaller_size(plan):
        yield f"--size {size[0]}x{size[1]}", {"width": size[0], "height": size[1]}


class _Stream:
    """A stream through the first of the transformer's blocks. The others take the same, one after another."""

    def __init__(self, config: Mapping[str, Any], vae: VAESpec, plan: StreamPlan) -> None:
        with torch.device("meta"):
            self.transformer = CausalDiT(**{**config, "num_layers": 1}).eval()
        _cast(self.transformer, plan.dtype)
        _, patch_height, patch_width = self.transformer.patch_size
        check_divides("height", plan.height, vae.spatial_ratio * patch_height)
        check_divides("width", plan.width, vae.spatial_ratio * patch_width)
        self.plan = plan
        self.size = (plan.height // vae.spatial_ratio, plan.width // vae.spatial_ratio)
        self.layout = plan.settings.layout(_latent_frames(plan, vae.temporal_ratio))
        self.kv = self.transformer.kv_cache(self.layout, plan.batch_size, *self.size)
        image_dim = self.transformer.config.image_dim
        with torch.no_grad():
            self.text = self.transformer.text_cache(
                self.empty(_text_tokens(plan), self.transformer.config.text_dim),
                None if image_dim is None else self.empty(_IMAGE_TOKENS, image_dim),
            )

    @property
    def text_bytes(self) -> int:
        """Of the prompt and, with guidance, of the negative one."""
        prompts = 1 if self.plan.settings.guidance_scale == 1 else 2
        return prompts * sum(tensor.nbytes for tensor in self._text_tensors())

    def pass_bytes(self, start: int, frames: int) -> int:
        """Besides weights and caches, for a pass over `frames` latent frames from frame `start`."""
        latents = self.latents(self.transformer.config.in_channels, frames)
        timesteps = torch.full((self.plan.batch_size,), _TIMESTEP, dtype=torch.float64, device="meta")

        def run() -> object:
            return self.transformer(
                latents,
                timesteps,
                frame_positions=range(start, start + frames),
                kv_cache=self.kv,
                text_cache=self.text,
                return_dict=False,
            )

        given = [*_tensors(self.transformer), *self.kv.tensors().values(), *self._text_tensors()]
        unpacked = 0
        if self.plan.weights is not None:
            # A layer's weights are cast to the dtype of the computation while it runs.
            unpacked = max(tensor.nbytes for tensor in _tensors(self.transformer.blocks))
        return latents.nbytes + unpacked + peak_bytes(run, given)

    def empty(self, *shape: int) -> Tensor:
        """A tensor with the batch in front."""
        return torch.empty(self.plan.batch_size, *shape, dtype=self.plan.dtype, device="meta")

    def latents(self, channels: int, frames: int) -> Tensor:
        """Latent frames of the stream's size."""
        return self.empty(channels, frames, *self.size)

    def _text_tensors(self) -> list[Tensor]:
        pairs = [*self.text.text, *(self.text.image or [])]
        return [tensor for pair in pairs for tensor in pair]


def _decoding(vae: StreamingVAE, stream: _Stream) -> tuple[int, int]:
    """Bytes of the decoder's memory, and what decoding a chunk takes besides."""
    plan, weights = stream.plan, _tensors(module_of(vae))
    state = vae.init_state("decode", plan.batch_size, plan.height, plan.width)
    most = frame = 0
    for _ in range(3):  # the first chunk has no past, and some decoders hold frames back
        latents = stream.latents(vae.spec.latent_channels, plan.settings.chunk_at(frame))
        given = [*weights, *state.slots.values(), latents]
        most = max(most, peak_bytes(partial(vae.decode_chunk, latents, state), given))
        frame += latents.shape[2]
    return state.nbytes, most


def _text_encoding(plan: StreamPlan) -> tuple[int, int]:
    """Bytes of the text encoder that stay, and what encoding a prompt takes besides."""
    if not _has_text_encoder(plan):
        return 0, 0
    folder = plan.folder / "text_encoder"
    config = AutoConfig.from_pretrained(folder)
    config.num_layers = 1  # the others take the same, one after another
    with torch.device("meta"):
        encoder = getattr(transformers, _component(plan, "text_encoder")[1])(config)
    _cast(encoder, plan.dtype)
    kept = _kept_in_float32(encoder, plan.dtype)
    sizes = _loaded_bytes(open_checkpoint(folder, None).shapes, plan.dtype, kept).values()
    tokens = torch.zeros((plan.batch_size, _text_tokens(plan)), dtype=torch.long, device="meta")
    passing = peak_bytes(partial(encoder, tokens), [*_tensors(encoder), tokens])
    match plan.offload:
        case TextEncoderOffload.NONE:
            return sum(sizes), passing
        case TextEncoderOffload.MODEL:
            return 0, sum(sizes) + passing
        case TextEncoderOffload.GROUP:
            return 0, max(sizes) + passing


def _vae(plan: StreamPlan) -> StreamingVAE:
    """The VAE without weights, in the dtypes that it is loaded with."""
    library, kind = _component(plan, "vae")
    cls: Any = getattr({"genstream": genstream, "diffusers": diffusers}[library], kind)
    with torch.device("meta"):
        vae: Any = TinyVideoVAE() if plan.tiny_vae else cls.from_config(cls.load_config(plan.folder / "vae"))
    _cast(vae, plan.dtype)
    return vae if streams(vae) else adapter_of(vae)


def _tiny_fits(plan: StreamPlan) -> bool:
    """Whether TAEHV decodes this model's latents, those of Wan 2.1, and the model has another VAE."""
    own, tiny = _vae(plan), _vae(replace(plan, tiny_vae=True))
    return not isinstance(own, TinyVideoVAE) and all(
        getattr(own.spec, name) == getattr(tiny.spec, name)
        for name in ("latent_channels", "temporal_ratio", "spatial_ratio")
    )


def _transformer_bytes(config: Mapping[str, Any], plan: StreamPlan) -> dict[str, int]:
    """Of each weight of the transformer."""
    stored = open_checkpoint(plan.folder / "transformer", None).shapes
    shapes = {ours: stored[theirs] for ours, theirs in places(stored, config).items()}
    sizes = _loaded_bytes(shapes, plan.dtype, CausalDiT._keep_in_fp32_modules)
    if plan.weights is not None:
        scale = plan.dtype.itemsize if plan.weights is WeightFormat.INT8 else torch.float32.itemsize
        for name, shape in shapes.items():
            if name.partition(".")[0] not in KEPT and name.endswith(".weight") and len(shape) == 2:
                sizes[name] = shape[0] * shape[1] + shape[0] * scale
    return sizes


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    kept = _kept_in_float32(module, dtype)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.empty_like(tensor, dtype=_loaded_dtype(name, dtype, kept))


def _kept_in_float32(module: nn.Module, dtype: torch.dtype) -> Collection[str]:
    """Parts of names whose weights stay in float32; transformers keeps them for float16 only."""
    if dtype == torch.float32 or (dtype == torch.bfloat16 and not isinstance(module, ModelMixin)):
        return ()
    return tuple(getattr(module, "_keep_in_fp32_modules", None) or ())


def _loaded_dtype(name: str, dtype: torch.dtype, kept: Collection[str]) -> torch.dtype:
    return torch.float32 if any(part in kept for part in name.split(".")) else dtype


def _loaded_bytes(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, kept: Collection[str]
) -> dict[str, int]:
    return {
        name: torch.Size(shape).numel() * _loaded_dtype(name, dtype, kept).itemsize
        for name, shape in shapes.items()
    }


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _component(plan: StreamPlan, name: str) -> tuple[str, str]:
    library, kind = read_object(plan.folder / INDEX_NAME)[name]
    return library, kind


def _has_text_encoder(plan: StreamPlan) -> bool:
    return read_object(plan.folder / INDEX_NAME).get("text_encoder", [None])[0] is not None


def _text_tokens(plan: StreamPlan) -> int:
    tokens: int = read_object(plan.folder / INDEX_NAME).get("text_tokens", _TEXT_TOKENS)
    return tokens


def _latent_frames(plan: StreamPlan, temporal_ratio: int) -> int | None:
    """Latent frames of the stream in whole chunks; None for an endless one."""
    if plan.num_frames is None:
        return None
    first, chunk = plan.settings.chunk_at(0), plan.settings.chunk_frames
    behind_first = max(0, latent_frames_covering(plan.num_frames, temporal_ratio) - first)
    return first + -(-behind_first // chunk) * chunk


def _smaller_size(plan: StreamPlan) -> tuple[int, int] | None:
    """Three quarters of width and height, in whole tokens; None where nothing is left."""
    patch = read_config(read_object(plan.folder / "transformer" / "config.json"))["patch_size"][1]
    pixels = _vae(plan).spec.spatial_ratio * patch
    width, height = (3 * side // 4 // pixels * pixels for side in (plan.width, plan.height))
    return (width, height) if min(width, height) > 0 else None
