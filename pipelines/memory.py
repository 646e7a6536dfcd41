"""Memory that a stream takes on a GPU, known before a weight is read: from configurations and file headers.

Weights and caches are exact. What a pass takes besides is found by running it on tensors that have only a
shape, so it follows the code of every component; workspaces of libraries come on top.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from genstream.cache.joint_context import JointContext
from genstream.cache.kv_cache import TextCache
from genstream.io.checkpoint import naming, open_checkpoint
from genstream.io.model_folder import INDEX_NAME, read_object
from genstream.pipelines.allocation import peak_bytes
from genstream.pipelines.causal_video import ENGINES
from genstream.pipelines.quantization import KEPT, WeightFormat
from genstream.schedulers.few_step import FewStepScheduler
from genstream.shapes import check_divides, frames_of
from genstream.streaming.intake import TransformSettings, encode_start, holds_back
from genstream.streaming.noise import SeededNoise
from genstream.streaming.presets import EngineKind
from genstream.streaming.queue_engine import QueueEngine
from genstream.streaming.request import StreamRequest
from genstream.streaming.settings import ContextPolicy, RecachePolicy, StreamSettings
from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import places, whole_config
from genstream.vae.adapters.registry import adapter_of
from genstream.vae.protocol import RGB, StreamingVAE
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.wrapping import module_of, streams

_IMAGE_TOKENS = 257  # of a CLIP ViT-H, which Wan's image-to-video models look through
_IMAGE_FRAMES = 2  # the image, and nothing for all frames behind it
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
        engine: what generates the chunks.
        levels: noise levels of the schedule; the queue engine holds as many chunks.
        dtype: of weights, cache and activations.
        weights: eight-bit weights in the transformer's blocks; None for `dtype`.
        offload: where the text encoder waits.
        tiny_vae: decode with TAEHV in place of the model's own VAE.
        batch_size: streams that advance together.
        transform: whether it follows a video, which is encoded on the GPU.
        loras: files or folders of the LoRAs that are loaded.
    """

    folder: Path
    height: int
    width: int
    settings: StreamSettings
    num_frames: int | None = None
    engine: EngineKind = EngineKind.CACHE
    levels: int = 4
    dtype: torch.dtype = torch.bfloat16
    weights: WeightFormat | None = None
    offload: TextEncoderOffload = TextEncoderOffload.NONE
    tiny_vae: bool = False
    batch_size: int = 1
    transform: bool = False
    loras: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the GPU.

    Attributes:
        transformer_bytes: weights.
        lora_bytes: weights of the LoRAs.
        vae_bytes: weights.
        text_encoder_bytes: weights that stay; 0 where it is offloaded or there is none.
        image_encoder_bytes: likewise.
        kv_cache_bytes: keys and values of the past, and what they are rebuilt from.
        text_cache_bytes: keys and values of the prompt, and of the negative one.
        vae_state_bytes: what the decoder remembers.
        intake_bytes: of a stream that follows a video: what its encoder remembers, the frames and latents of
            the next chunk; 0 elsewhere.
        denoise_bytes: besides, for the passes of a chunk.
        decode_bytes: besides, for decoding a chunk, its frames included.
        intake_pass_bytes: besides, for encoding the frames of a chunk.
        encode_bytes: besides, for encoding a prompt, weights that come for it included.
        recache_bytes: besides, for rebuilding the cache after a new prompt, the new cache included.
    """

    transformer_bytes: int
    lora_bytes: int
    vae_bytes: int
    text_encoder_bytes: int
    image_encoder_bytes: int
    kv_cache_bytes: int
    text_cache_bytes: int
    vae_state_bytes: int
    intake_bytes: int
    denoise_bytes: int
    decode_bytes: int
    intake_pass_bytes: int
    encode_bytes: int
    recache_bytes: int

    @property
    def resting_bytes(self) -> int:
        """Between two steps of a stream."""
        weights = self.transformer_bytes + self.lora_bytes + self.vae_bytes
        weights += self.text_encoder_bytes + self.image_encoder_bytes
        stream = self.kv_cache_bytes + self.text_cache_bytes + self.vae_state_bytes + self.intake_bytes
        return weights + stream

    @property
    def streaming_bytes(self) -> int:
        """Most at once while it streams with one prompt."""
        return self.resting_bytes + max(self.denoise_bytes, self.decode_bytes, self.intake_pass_bytes)

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
        self._taking_in: dict[StreamPlan, tuple[int, int]] = {}

    def estimate(self, plan: StreamPlan) -> MemoryEstimate:
        """The memory of a stream.

        Raises:
            ValueError: the size does not fit the model, its files contradict each other, or an endless
                stream would keep everything.
        """
        vae = _vae(plan)
        config = transformer_config(plan.folder)
        transformer_bytes = sum(_transformer_bytes(config, plan).values())  # they must fit before all else
        stream = _Stream(config, vae, plan)
        decoded = replace(_plain(plan), tiny_vae=plan.tiny_vae)
        if decoded not in self._decoding:
            self._decoding[decoded] = _decoding(vae, stream)
        if plan.transform and decoded not in self._taking_in:
            self._taking_in[decoded] = _taking_in(vae, stream)
        encoded = replace(_plain(plan), height=0, width=0, offload=plan.offload)
        if encoded not in self._encoding:
            self._encoding[encoded] = _text_encoding(plan)
        encoder_bytes, encode_bytes = self._encoding[encoded]
        state_bytes, decode_bytes = self._decoding[decoded]
        intake_bytes, intake_pass_bytes = self._taking_in[decoded] if plan.transform else (0, 0)
        return MemoryEstimate(
            transformer_bytes=transformer_bytes,
            lora_bytes=sum(_lora_bytes(path, plan.dtype) for path in plan.loras),
            vae_bytes=_nbytes(_tensors(module_of(vae))),
            text_encoder_bytes=encoder_bytes,
            image_encoder_bytes=_image_encoder_bytes(plan),
            kv_cache_bytes=stream.kv_bytes + stream.source_bytes,
            text_cache_bytes=stream.text_bytes,
            vae_state_bytes=state_bytes,
            intake_bytes=intake_bytes,
            denoise_bytes=stream.denoise_bytes(),
            decode_bytes=decode_bytes,
            intake_pass_bytes=intake_pass_bytes,
            encode_bytes=encode_bytes,
            recache_bytes=stream.recache_bytes(),
        )

    def proposals(self, plan: StreamPlan) -> list[Proposal]:
        """What would take less memory; first what harms the picture least."""
        found, together, before = [], plan, self.estimate(plan).peak_bytes
        least = before
        for option, changed in _smaller(plan):
            alone, more = replace(plan, **changed), replace(together, **changed)
            peak_bytes, together_bytes = self.estimate(alone).peak_bytes, self.estimate(more).peak_bytes
            if peak_bytes > before or together_bytes > least:
                continue
            together, least = more, together_bytes
            found.append(
                Proposal(option=option, plan=alone, peak_bytes=peak_bytes, together_bytes=together_bytes)
            )
        return found


def transformer_config(folder: Path) -> dict[str, Any]:
    """All arguments of `CausalDiT` of a model folder."""
    return whole_config(read_object(folder / "transformer" / "config.json"))


def _plain(plan: StreamPlan) -> StreamPlan:
    """What every part of the memory depends on; the window, for one, is nothing to the VAE."""
    settings = StreamSettings(
        chunk_frames=plan.settings.chunk_frames,
        window_frames=0,
        independent_first_frame=plan.settings.independent_first_frame,
    )
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
    if plan.offload is not TextEncoderOffload.GROUP and _has("text_encoder", plan):
        yield "--offload group", {"offload": TextEncoderOffload.GROUP}
    if plan.weights is None:
        yield "--quantize int8", {"weights": WeightFormat.INT8}
    if not plan.tiny_vae and _tiny_fits(plan):
        yield "--tiny-vae", {"tiny_vae": True}
    least = settings.chunk_frames
    if plan.engine is EngineKind.QUEUE:
        least = settings.sink_frames + (plan.levels - 1) * settings.chunk_frames
    if settings.window_frames is None or settings.window_frames > least:
        window = max((settings.window_frames or 0) // 2, least)
        yield f"--window {window}", {"settings": replace(settings, window_frames=window)}
    if size := _smaller_size(plan):
        yield f"--size {size[0]}x{size[1]}", {"width": size[0], "height": size[1]}


class _Stream:
    """A stream that has run for a while, through the first of the transformer's blocks.

    The other blocks take the same, one after another; only what stays behind counts for each.
    """

    def __init__(self, config: Mapping[str, Any], vae: StreamingVAE, plan: StreamPlan) -> None:
        with torch.device("meta"):
            transformer = CausalDiT(**{**config, "num_layers": 1}).eval()
        _cast(transformer, plan.dtype)
        ratio, (_, patch_height, patch_width) = vae.spec.spatial_ratio, transformer.patch_size
        check_divides("height", plan.height, ratio * patch_height)
        check_divides("width", plan.width, ratio * patch_width)
        self.plan, self.transformer = plan, transformer
        self.layers: int = config["num_layers"]
        self.size = (plan.height // ratio, plan.width // ratio)
        # Prompts are given as embeddings, so none is encoded.
        self.engine = ENGINES[plan.engine](transformer, vae, lambda prompts: self.empty(0))
        state = self.state = self.engine.start(self._request())
        self.chunk = plan.settings.chunk_frames
        state.frame = 2 * self.chunk * state.kv.layout.capacity_frames
        kept = state.kv.layout.window_frames if self._recomputes else state.kv.layout.capacity_frames
        state.history = self.latents(kept)
        if plan.settings.reencodes:
            frames = frames_of(kept, vae.spec.temporal_ratio)
            state.pixels = self.empty(RGB, frames, plan.height, plan.width)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of the past, of all blocks."""
        return self.layers * self.state.kv.nbytes

    @property
    def source_bytes(self) -> int:
        """What the past is rebuilt from, and the queue."""
        frames = self.state.history.shape[2]
        if self.plan.engine is EngineKind.QUEUE:
            frames += (self.plan.levels - 1) * self.chunk
        others = (self.state.pixels, self.state.text.channels)
        return self.latents(frames).nbytes + _nbytes(tensor for tensor in others if tensor is not None)

    @property
    def text_bytes(self) -> int:
        """Keys and values of the prompt and, with guidance, of the negative one."""
        texts = [text for text in (self.state.text, self.state.negative_text) if text is not None]
        return self.layers * sum(_nbytes(_keys_and_values(text)) for text in texts)

    def denoise_bytes(self) -> int:
        """Besides weights and caches, for what happens between two chunks."""
        if isinstance(self.engine, QueueEngine):
            return self._measure(self._joint_pass)
        state = self.state.draft()
        if self.plan.settings.context is ContextPolicy.FUSED:
            state.uncommitted = self.chunk
        x = self.latents(self.chunk)
        passing = self._measure(partial(self.engine.predict, x, _TIMESTEP, state), x)
        return max(passing, self._rebuild_bytes()) if self._recomputes else passing

    def recache_bytes(self) -> int:
        """Besides weights and caches, for rebuilding the past with a new prompt."""
        return 0 if self.plan.settings.recache is RecachePolicy.NOTHING else self._rebuild_bytes()

    def empty(self, *shape: int) -> Tensor:
        """A tensor with the batch in front."""
        return torch.empty(self.plan.batch_size, *shape, dtype=self.plan.dtype, device="meta")

    def latents(self, frames: int) -> Tensor:
        """Latent frames of the stream's size."""
        return self.empty(self.transformer.out_channels, frames, *self.size)

    @property
    def _recomputes(self) -> bool:
        return self.plan.settings.context is ContextPolicy.RECOMPUTE

    def _rebuild_bytes(self) -> int:
        state = self.state.draft()
        found = self._measure(partial(self.engine.recache, state, RecachePolicy.ALL))
        # A rebuilt cache stands beside the old one until the step is done: all blocks of it.
        return found + (0 if state.kv is self.state.kv else self.kv_bytes - self.state.kv.nbytes)

    def _joint_pass(self) -> Tensor:
        assert isinstance(self.engine, QueueEngine)
        state, frames = self.state, self.plan.levels * self.chunk
        context = JointContext.allocate(state.kv, self.engine.joint_layout(state.request))
        queue = self.latents(frames)
        timesteps = torch.zeros(len(queue), frames, dtype=torch.float64, device="meta")
        return self.engine.predict_queue(queue, timesteps, state, context)

    def _measure(self, run: Callable[[], object], *given: Tensor) -> int:
        state = self.state
        here = [*_tensors(self.transformer), *_tensors(module_of(self.engine.vae)), *given, state.history]
        here += state.kv.tensors().values()
        here += [tensor for tensor in (state.pixels, state.text.channels) if tensor is not None]
        for text in (state.text, state.negative_text):
            here += [] if text is None else _keys_and_values(text)
        unpacked = 0
        if self.plan.weights is not None:
            # A layer's weights are cast to the dtype of the computation while it runs.
            unpacked = max(tensor.nbytes for tensor in _tensors(self.transformer.blocks))
        return _nbytes(given) + unpacked + peak_bytes(run, here)

    def _request(self) -> StreamRequest:
        plan, config = self.plan, self.transformer.config
        steps = tuple(_TIMESTEP / (1 + step) for step in range(plan.levels))
        embeds = self.empty(_text_tokens(plan), config.text_dim)
        guided = plan.settings.guidance_scale > 1
        extra = config.in_channels - self.transformer.out_channels
        tokens = config.pos_embed_seq_len or _IMAGE_TOKENS
        return StreamRequest(
            prompt=(),
            prompt_embeds=embeds,
            height=plan.height,
            width=plan.width,
            num_frames=plan.num_frames,
            noise=SeededNoise((0,) * plan.batch_size),
            schedule=FewStepScheduler(steps=steps).schedule(None),
            settings=plan.settings,
            negative_embeds=embeds if guided else None,
            image_embeds=None if config.image_dim is None else self.empty(tokens, config.image_dim),
            image_channels=self.empty(extra, _IMAGE_FRAMES, *self.size) if extra else None,
            transform=TransformSettings(strength=1.0) if plan.transform else None,
        )


def _decoding(vae: StreamingVAE, stream: _Stream) -> tuple[int, int]:
    """Bytes of the decoder's memory, and what decoding a chunk takes besides."""
    plan, weights = stream.plan, _tensors(module_of(vae))
    state = vae.init_state("decode", plan.batch_size, plan.height, plan.width)
    most = frame = 0
    for _ in range(3):  # the first chunk has no past, and some decoders hold frames back
        latents = stream.latents(plan.settings.chunk_at(frame))
        given = [*weights, *state.slots.values(), latents]
        most = max(most, peak_bytes(partial(vae.decode_chunk, latents, state), given))
        frame += latents.shape[2]
    return state.nbytes, most


def _taking_in(vae: StreamingVAE, stream: _Stream) -> tuple[int, int]:
    """Bytes of what is there of a source between two steps, and what encoding a chunk of it takes besides."""
    plan, weights = stream.plan, _tensors(module_of(vae))
    state = vae.init_state("encode", 1, plan.height, plan.width)
    first = frames_of(plan.settings.chunk_at(0), vae.spec.temporal_ratio) + int(holds_back(vae.spec))
    later = vae.spec.temporal_ratio * stream.chunk
    most = 0
    for chunk in range(3):
        run, count = (vae.encode_chunk, later) if chunk else (partial(encode_start, vae), first)
        frames = stream.empty(RGB, count, plan.height, plan.width)[:1]
        given = [*weights, *state.slots.values(), frames]
        most = max(most, peak_bytes(partial(run, frames, state), given))
    previous = frames[:, :, :1]
    return state.nbytes + _nbytes((frames, previous, stream.latents(stream.chunk)[:1])), most


def _text_encoding(plan: StreamPlan) -> tuple[int, int]:
    """Bytes of the text encoder that stay, and what encoding a prompt takes besides."""
    if not _has("text_encoder", plan):
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


def _image_encoder_bytes(plan: StreamPlan) -> int:
    """Of CLIP, which is used before a stream starts, when there is room for it."""
    if plan.offload is not TextEncoderOffload.NONE or not _has("image_encoder", plan):
        return 0
    shapes = open_checkpoint(plan.folder / "image_encoder", None).shapes
    return sum(_loaded_bytes(shapes, plan.dtype, ()).values())


def _vae(plan: StreamPlan) -> StreamingVAE:
    """The VAE without weights, in the dtypes that it is loaded with."""
    with torch.device("meta"):
        vae: Any = TinyVideoVAE() if plan.tiny_vae else _own_vae(plan.folder)
    _cast(vae, plan.dtype)
    return vae if streams(vae) else adapter_of(vae)


def bare_vae(folder: Path) -> StreamingVAE:
    """The VAE of a model folder without weights."""
    with torch.device("meta"):
        vae: Any = _own_vae(folder)
    return vae if streams(vae) else adapter_of(vae)


def _own_vae(folder: Path) -> ModelMixin:
    library, kind = read_object(folder / INDEX_NAME).get("vae", [None, None])
    if library is None:
        raise ValueError(
            f"model folder {str(folder)!r} has no vae: plan with another one (--tiny-vae), or make a "
            f"folder that has one with genstream convert {folder} --vae PATH -o NEW_FOLDER"
        )
    cls: Any = getattr({"genstream": genstream, "diffusers": diffusers}[library], kind)
    vae: ModelMixin = cls.from_config(cls.load_config(folder / "vae"))
    return vae


def _tiny_fits(plan: StreamPlan) -> bool:
    """Whether TAEHV decodes this model's latents, those of Wan 2.1, and the model has another VAE."""
    own, tiny = _vae(plan), _vae(replace(plan, tiny_vae=True))
    return not isinstance(own, TinyVideoVAE) and all(
        getattr(own.spec, name) == getattr(tiny.spec, name)
        for name in ("latent_channels", "temporal_ratio", "spatial_ratio")
    )


def _transformer_bytes(config: Mapping[str, Any], plan: StreamPlan) -> dict[str, int]:
    """Of each weight of the transformer."""
    folder = plan.folder / "transformer"
    stored = open_checkpoint(folder, None).shapes
    with naming(folder):
        shapes = {ours: stored[theirs] for ours, theirs in places(stored, config).items()}
    sizes = _loaded_bytes(shapes, plan.dtype, CausalDiT._keep_in_fp32_modules)
    if plan.weights is not None:
        scale = plan.dtype.itemsize if plan.weights is WeightFormat.INT8 else torch.float32.itemsize
        for name, shape in shapes.items():
            if name.partition(".")[0] not in KEPT and name.endswith(".weight") and len(shape) == 2:
                sizes[name] = shape[0] * shape[1] + shape[0] * scale
    return sizes


def _lora_bytes(path: Path, dtype: torch.dtype) -> int:
    return sum(_loaded_bytes(open_checkpoint(path, None).shapes, dtype, ()).values())


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


def _keys_and_values(text: TextCache) -> list[Tensor]:
    return [tensor for pair in (*text.text, *(text.image or ())) for tensor in pair]


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _component(plan: StreamPlan, name: str) -> tuple[str, str]:
    library, kind = read_object(plan.folder / INDEX_NAME)[name]
    return library, kind


def _has(component: str, plan: StreamPlan) -> bool:
    return read_object(plan.folder / INDEX_NAME).get(component, [None])[0] is not None


def _text_tokens(plan: StreamPlan) -> int:
    tokens: int = read_object(plan.folder / INDEX_NAME).get("text_tokens", _TEXT_TOKENS)
    return tokens


def _smaller_size(plan: StreamPlan) -> tuple[int, int] | None:
    """Three quarters of width and height, in whole tokens; None where nothing is left."""
    patch = transformer_config(plan.folder)["patch_size"][1]
    pixels = _vae(plan).spec.spatial_ratio * patch
    width, height = (3 * side // 4 // pixels * pixels for side in (plan.width, plan.height))
    return (width, height) if min(width, height) > 0 else None
