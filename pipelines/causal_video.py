"""Prompt to video with a causal few-step student: the public Python API."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel

from genstream.conditioning.image import Picture
from genstream.conditioning.text import unknown_words
from genstream.pipelines.conditions import ConditionsMixin
from genstream.pipelines.folders import FolderPipeline
from genstream.pipelines.output import OUTPUT_TYPES, CausalVideoOutput, convert, to_host
from genstream.schedulers.few_step import FewStepScheduler, FlowEulerScheduler
from genstream.shapes import (
    check_count,
    check_divides,
    check_exclusive,
    check_positive,
    check_whole,
    frames_for_seconds,
    frames_of,
    latent_frames_covering,
    latent_frames_of,
)
from genstream.streaming.chunk import Chunk
from genstream.streaming.controls import Applied
from genstream.streaming.engine import CacheEngine
from genstream.streaming.intake import MotionNoise, TransformSettings
from genstream.streaming.noise import NoiseSource, SeededNoise
from genstream.streaming.presets import EngineKind, Preset, find_preset
from genstream.streaming.queue_engine import QueueEngine
from genstream.streaming.request import StreamRequest
from genstream.streaming.settings import DEFAULT_STRENGTH, StreamSettings
from genstream.streaming.snapshot import load_state, model_fingerprint, save_state
from genstream.streaming.source import FrameSource, as_source
from genstream.streaming.state import StreamState
from genstream.transformer.adapters import active_loras
from genstream.transformer.causal_dit import CausalDiT
from genstream.vae.protocol import StreamingVAE
from genstream.vae.wrapping import as_streaming, module_of, streams

logger = logging.getLogger(__name__)

DEFAULT_SECONDS = 4.0
ENGINES: dict[str, type[CacheEngine]] = {EngineKind.CACHE: CacheEngine, EngineKind.QUEUE: QueueEngine}


class CausalVideoPipeline(FolderPipeline, ConditionsMixin):
    """Streams video from a causal few-step transformer, one chunk of latent frames at a time.

    Args:
        tokenizer: of the text encoder.
        text_encoder: UMT5 encoder; None when callers give prompt embeddings.
        transformer: the student.
        vae: any VAE that streams, or one of diffusers' video VAEs, which gets an adapter. An adapter or a
            tiling given here is used too, but only the VAE inside is moved and saved with the pipeline.
        scheduler: the student's denoising steps.
        engine: "cache" finishes one chunk after the other (Self Forcing and its kin); "queue" denoises as
            many chunks together as the scheduler has steps (Rolling Forcing), see `QueueEngine`.
        chunk_frames: latent frames generated together.
        sink_frames: first latent frames, kept for ever.
        window_frames: latent frames kept besides the sinks and the current chunk; None keeps all.
        positions: "absolute" or "window", temporal positions of the sinks.
        context: "clean", "fused", "last_step" or "recompute", where keys and values of the past come from.
        context_timestep: timestep of the passes that make them, in [0, 1000].
        recache: "nothing", "window" or "all", what a new prompt does to them.
        past_weight: factor in (0, 1] on the attention to past frames but the first; 1 is off.
        independent_first_frame: the first chunk is a single latent frame.
        guidance_scale: of classifier-free guidance, when a call names none; 1 is off.
        text_tokens: prompt length the transformer was trained with.
        default_height: pixels, when a call names none.
        default_width: pixels, when a call names none.
        default_fps: frames per second, when a call names none.
        image_processor: of the image encoder.
        image_encoder: CLIP, for transformers that take image tokens; None when callers give image embeddings.
    """

    # Transformer and VAE take turns in every chunk: moving them each time would cost more than it saves.
    model_cpu_offload_seq = "text_encoder->image_encoder"
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["transformer", "vae"]
    _optional_components: ClassVar[list[str]] = [
        "tokenizer",
        "text_encoder",
        "image_processor",
        "image_encoder",
    ]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: UMT5EncoderModel | None,
        transformer: CausalDiT,
        vae: StreamingVAE | ModelMixin,
        scheduler: FewStepScheduler | FlowEulerScheduler,
        engine: str = "cache",
        chunk_frames: int = 3,
        sink_frames: int = 0,
        window_frames: int | None = None,
        positions: str = "absolute",
        context: str = "clean",
        context_timestep: float = 0.0,
        recache: str = "all",
        past_weight: float = 1.0,
        independent_first_frame: bool = False,
        guidance_scale: float = 1.0,
        text_tokens: int = 512,
        default_height: int = 480,
        default_width: int = 832,
        default_fps: int = 16,
        image_processor: BaseImageProcessor | None = None,
        image_encoder: CLIPVisionModel | None = None,
    ) -> None:
        super().__init__()
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {[str(kind) for kind in ENGINES]}, got {engine!r}")
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            vae=module_of(vae),
            scheduler=scheduler,
            image_processor=image_processor,
            image_encoder=image_encoder,
        )
        self.register_to_config(
            engine=engine,
            chunk_frames=chunk_frames,
            sink_frames=sink_frames,
            window_frames=window_frames,
            positions=positions,
            context=context,
            context_timestep=context_timestep,
            recache=recache,
            past_weight=past_weight,
            independent_first_frame=independent_first_frame,
            guidance_scale=guidance_scale,
            text_tokens=text_tokens,
            default_height=default_height,
            default_width=default_width,
            default_fps=default_fps,
        )
        self.vae = vae
        _ = self.settings  # checks them
        for name in ("text_tokens", "default_height", "default_width"):
            check_count(name, self.config[name])
        for name, part, wanted in (
            ("transformer", transformer, "text_cache"),
            ("scheduler", scheduler, "schedule"),
        ):
            if not hasattr(part, wanted):
                raise ValueError(f"{name} must be one of genstream, got a {type(part).__name__}")
        check_positive("default_fps", self.config.default_fps)

    def __setattr__(self, name: str, value: object) -> None:
        """Of a VAE with others around it only the one inside is a part, moved and saved with the pipeline."""
        if name == "vae":
            module = module_of(value)
            self._streaming = (module, value if streams(value) else None)
            value = module
        super().__setattr__(name, value)

    @property
    def settings(self) -> StreamSettings:
        """How the model is run, from the configuration."""
        return StreamSettings(
            chunk_frames=self.config.chunk_frames,
            sink_frames=self.config.sink_frames,
            window_frames=self.config.window_frames,
            positions=self.config.positions,
            context=self.config.context,
            context_timestep=self.config.context_timestep,
            recache=self.config.recache,
            past_weight=self.config.past_weight,
            independent_first_frame=self.config.independent_first_frame,
            guidance_scale=self.config.guidance_scale,
        )

    @property
    def engine(self) -> CacheEngine:
        """The streaming core over this pipeline's components."""
        return ENGINES[self.config.engine](self.transformer, self.streaming_vae, self.encode_prompt)

    @property
    def streaming_vae(self) -> StreamingVAE:
        """The VAE as it streams: `vae` itself, what was wrapped around it, or an adapter.

        Raises:
            ValueError: it cannot stream, or its latents are not those of the transformer.
        """
        source, streaming = self._streaming
        if source is not self.vae or streaming is None:
            streaming = as_streaming(self.vae)
        spec, channels = streaming.spec, self.transformer.out_channels
        if spec.latent_channels != channels:
            raise ValueError(
                f"vae must have {channels} latent channels like the transformer, got {spec.latent_channels}"
            )
        if spec.first_frames != 1:
            raise ValueError(
                f"vae must turn a stream's first latent frame into 1 frame, got {spec.first_frames}"
            )
        self._streaming = (self.vae, streaming)
        return streaming

    def apply_preset(self, name: str) -> None:
        """Run the model like a published student from now on: its denoising steps and all its settings.

        Args:
            name: one of `genstream.streaming.presets.PRESETS`.

        Raises:
            ValueError: there is no such preset, or the model cannot be run that way.
        """
        preset = find_preset(name)
        self._check_preset(name, preset)
        self.scheduler = FewStepScheduler(steps=list(preset.steps), shift=preset.shift, warped=preset.warped)
        self.register_to_config(
            engine=str(preset.engine),
            **{
                name: str(value) if isinstance(value, str) else value
                for name, value in asdict(preset.settings).items()
            },
        )

    def maybe_free_model_hooks(self) -> None:
        """Nothing has to move at the end of a clip: transformer and VAE stay for other streams."""
        self.transformer._reset_stateful_cache()
        self._offload_encoders()

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Refused: a stream would wait for every weight in every pass."""
        raise ValueError(
            "enable_sequential_cpu_offload would move every weight in every pass; use "
            "enable_model_cpu_offload, or enable_group_offload with exclude_modules=['transformer', 'vae']"
        )

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that the model never saw."""
        return [] if self.tokenizer is None else unknown_words(prompt, self.tokenizer)

    def known_words(self) -> list[str]:
        """All words the model was trained with; empty for a model with a sub-word vocabulary."""
        if self.tokenizer is None or self.tokenizer.unk_token_id is None:
            return []
        special = set(self.tokenizer.all_special_tokens)
        return sorted(word for word in self.tokenizer.get_vocab() if word not in special)

    def request(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        seconds: float | None = None,
        fps: float | None = None,
        seed: int | list[int] | None = None,
        image: Image.Image | Tensor | None = None,
        noise: NoiseSource | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        initial_latents: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_channels: Tensor | None = None,
        strength: float | None = None,
        motion: MotionNoise | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        settings: StreamSettings | None = None,
        decode: bool = True,
    ) -> StreamRequest:
        """Check and complete what a caller asks for.

        Args:
            prompt: one, or one for each element of the batch.
            height: pixels, a multiple of the VAE's ratio times the patch; the model's own when None.
            width: pixels, likewise.
            num_frames: 1 + r k frames; endless when neither this nor `seconds` is given. With `strength` any
                number, at which the stream ends if its source has not ended before.
            seconds: length, instead of `num_frames`: exactly round(seconds x fps) frames.
            fps: frames per second that `seconds` counts in; the model's own when None.
            seed: one, or one for each prompt; the prompts of a batch otherwise count up from it; 0 when None.
            image: first frame, of exactly the asked size; PIL, or `[B, 3, H, W]` in [-1, 1]. It becomes the
                first latent frame; a transformer with channels or tokens for an image gets it there instead.
            noise: instead of `seed`.
            prompt_embeds: `[B, text_tokens, text_dim]`, instead of `prompt`.
            negative_prompt_embeds: `[1 or B, text_tokens, text_dim]`, instead of `negative_prompt`.
            initial_latents: clean latent frames to go on from, whole chunks; instead of `image`.
            image_embeds: CLIP tokens of the image, `[B, tokens, image_dim]`, for transformers that take them;
                those of `image` when None.
            image_channels: `[B, in_channels - out_channels, T, h, w]`, for transformers that take them; those
                of `image` when None. The last latent frame stands for all that follow.
            strength: noise level in (0, 1] that the frames of a source are brought to before they are
                denoised with the prompt: 1 leaves nothing of them. A few-step student starts at its first
                trained step at or below it; below all of them it makes one step at the strength itself.
                Such a request is started with a source; None makes a stream without one.
            motion: lowers that noise level where the source moves much.
            num_inference_steps: denoising steps, where the scheduler leaves a choice.
            guidance_scale: of classifier-free guidance; 1 is off, the model's own when None.
            negative_prompt: what guidance leads away from; nothing in particular when None.
            settings: instead of the model's own.
            decode: give frames, not only latents.

        Raises:
            ValueError: an argument is out of range, or two exclude each other.
        """
        check_exclusive(seed=seed, noise=noise)
        height = self.config.default_height if height is None else height
        width = self.config.default_width if width is None else width
        self._check_size(height, width)
        height, width = int(height), int(width)
        num_frames = self._length(num_frames, seconds, fps, any_number=strength is not None)
        prompts, embeds = self._prompts(prompt, prompt_embeds)
        settings = settings or self.settings
        if guidance_scale is not None:
            settings = replace(settings, guidance_scale=guidance_scale)
        pixels = None if image is None else self._image_pixels(image, height, width, len(embeds))
        image_embeds = self._image_tokens(pixels, image_embeds, len(embeds))
        image_channels = self._image_channels(pixels, image_channels, len(embeds), num_frames)
        if image_channels is not None:
            self._check_channels(image_channels, len(embeds), height, width)
        if pixels is not None and not self._takes_images:
            if initial_latents is not None:
                raise ValueError("image and initial_latents exclude each other, got both")
            initial_latents = self.encode_image(pixels, height, width, batch_size=len(embeds))
            settings = _start_from_image(settings)
        if initial_latents is not None:
            self._check_latents(initial_latents, len(embeds), height, width, num_frames)
        settings = self._fitting(settings, num_frames, initial_latents)
        return StreamRequest(
            prompt=tuple(prompts),
            prompt_embeds=embeds,
            height=height,
            width=width,
            num_frames=num_frames,
            noise=noise or SeededNoise(_seeds(0 if seed is None else seed, len(embeds))),
            schedule=self.scheduler.schedule(num_inference_steps),
            settings=settings,
            initial_latents=initial_latents,
            negative_embeds=self._negative_embeds(
                negative_prompt, negative_prompt_embeds, settings, len(embeds)
            ),
            image_embeds=image_embeds,
            image_channels=image_channels,
            transform=_transform(strength, motion),
            loras=active_loras(self.transformer),
            decode=decode,
        )

    def _length(
        self, num_frames: int | None, seconds: float | None, fps: float | None, *, any_number: bool
    ) -> int | None:
        """Frames of a stream, which are 1 + r k unless any number will do; None for an endless one."""
        fps = self.config.default_fps if fps is None else fps
        check_positive("fps", fps)
        if num_frames is not None and seconds is not None:
            raise ValueError(f"num_frames and seconds exclude each other, got {num_frames} and {seconds}")
        if seconds is not None:
            return frames_for_seconds(seconds, fps)
        if num_frames is None:
            return None
        check_whole("num_frames", num_frames)
        if not any_number:
            latent_frames_of(num_frames, self.streaming_vae.spec.temporal_ratio)
        return int(num_frames)

    def start(
        self,
        request: StreamRequest,
        controls: Iterable[Applied] = (),
        source: FrameSource | Iterable[Picture] | None = None,
    ) -> StreamState:
        """State in front of the first chunk.

        Args:
            request: what to make.
            controls: the log of another run, to be replayed.
            source: frames of a request with a strength.

        Raises:
            ValueError: there is a source but no strength, or the other way round.
        """
        if (source is None) != (request.transform is None):
            raise ValueError(
                "source and the request's strength must be given together, got "
                + ("strength without source" if source is None else "source without strength")
            )
        frames = None if source is None else as_source(source, request.height, request.width)
        return self.engine.start(request, controls, frames)

    def step(self, state: StreamState) -> Chunk:
        """Generate the next chunk of a running stream."""
        return self.engine.step(state)

    def stream(
        self,
        prompt: str | list[str] | None = None,
        **arguments: Any,  # noqa: ANN401
    ) -> Iterator[Chunk]:
        """Chunks of frames as they are generated; arguments are those of `request`, endless without a length.

        To send controls while it runs, use `state = pipe.start(pipe.request(...))` and `pipe.run(state)`.
        """
        return self.run(self.start(self.request(prompt, **arguments)))

    def transform(
        self,
        source: FrameSource | Iterable[Picture],
        prompt: str | list[str] | None = None,
        *,
        strength: float = DEFAULT_STRENGTH,
        **arguments: Any,  # noqa: ANN401
    ) -> Iterator[Chunk]:
        """Video to video: chunks of as many frames as the source has, made from its frames and the prompt.

        To send controls while it runs, use
        `state = pipe.start(pipe.request(prompt, strength=0.85), source=frames)` and `pipe.run(state)`.

        Args:
            source: an iterable of frames, or `LiveFrames`; PIL images, uint8 `[H, W, 3]` or tensors
                `[3, H, W]` in [-1, 1], of exactly the asked size.
            prompt: one, or several for one video of the source each.
            strength: noise level that the frames are brought to, as for `request`.
            **arguments: those of `request`.
        """
        return self.run(self.start(self.request(prompt, strength=strength, **arguments), source=source))

    def run(self, state: StreamState) -> Iterator[Chunk]:
        """The chunks that are left of a running stream."""
        return self.engine.run(state)

    def save_state(self, state: StreamState, path: str | Path) -> None:
        """Write a running stream to a file, to go on later with `load_state`.

        Raises:
            ValueError: the path is a folder, or lies in none.
            OSError: it cannot be written.
        """
        fingerprint = model_fingerprint(self.transformer, module_of(self.vae), loras=state.loras)
        save_state(state, path, fingerprint)

    def load_state(
        self, path: str | Path, source: FrameSource | Iterable[Picture] | None = None
    ) -> StreamState:
        """A stream that `save_state` wrote, with the same transformer, VAE and LoRAs.

        The text encoder is not compared: only prompts to come depend on it.

        Args:
            path: the snapshot.
            source: of a video-to-video stream, from frame `state.intake.frames` of its source on.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no snapshot, or one of another version or model.
        """
        state = load_state(path, self.engine)
        if source is not None:
            state.source = as_source(source, state.request.height, state.request.width)
        return state

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        seconds: float | None = None,
        fps: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | list[int] | None = None,
        image: Image.Image | Tensor | None = None,
        noise: NoiseSource | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        initial_latents: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_channels: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, float, dict[str, Any]], object] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> CausalVideoOutput | tuple[Any]:
        """A whole clip at once, built on the same steps as a stream.

        Args:
            prompt: one, or a list for a batch.
            height: pixels; the model's own when None.
            width: pixels; the model's own when None.
            num_frames: 1 + r k; 1 gives an image. Four seconds when no length is given.
            seconds: length, instead of `num_frames`.
            fps: frames per second that `seconds` counts in.
            num_inference_steps: denoising steps, where the scheduler leaves a choice.
            guidance_scale: of classifier-free guidance; 1 is off, the model's own when None.
            negative_prompt: what guidance leads away from.
            num_videos_per_prompt: videos for each prompt.
            generator: draws the seeds, one for each video; instead of `seed`.
            seed: one, or one for each video; 0 when None.
            image: first frame.
            noise: source of all noise, instead of `seed`.
            prompt_embeds: instead of `prompt`.
            negative_prompt_embeds: instead of `negative_prompt`.
            initial_latents: clean latent frames to go on from; part of the result.
            image_embeds: CLIP tokens of the image, for transformers that take them.
            image_channels: the image's channels behind the latents', for transformers that take them.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: return `CausalVideoOutput` instead of a tuple.
            callback_on_step_end: called as `f(pipe, chunk_index, 0.0, tensors)` after every chunk, whose
                frames are out by then: what it returns is ignored. Setting `pipe._interrupt = True` in it
                ends the clip there.
            callback_on_step_end_tensor_inputs: only ["latents"], the chunk's latents.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {list(OUTPUT_TYPES)}, got {output_type!r}")
        wanted = callback_on_step_end_tensor_inputs or ["latents"]
        if wanted != ["latents"]:
            raise ValueError(f"callback_on_step_end_tensor_inputs must be ['latents'], got {wanted}")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"callback_on_step_end must be callable, got {callback_on_step_end!r}")
        if num_frames is None and seconds is None:
            seconds = DEFAULT_SECONDS
        check_exclusive(seed=seed, noise=noise, generator=generator)
        prompts, embeds = self._prompts(prompt, prompt_embeds, num_videos_per_prompt)
        request = self.request(
            prompts,
            height=height,
            width=width,
            num_frames=num_frames,
            seconds=seconds,
            fps=fps,
            seed=seed if generator is None else _draw_seeds(generator, len(embeds)),
            image=image,
            noise=noise,
            prompt_embeds=embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            initial_latents=initial_latents,
            image_embeds=image_embeds,
            image_channels=image_channels,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            # Where the context comes from decoded pixels, latents cannot do without them.
            decode=output_type != "latent" or self.settings.reencodes,
        )
        chunks: list[Tensor] = []
        self._interrupt = False
        with self.progress_bar(total=self.engine.chunk_count(request)) as bar:
            for chunk in self.run(self.start(request)):
                chunks.append(to_host(chunk, output_type))
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, chunk.index, 0.0, {"latents": chunk.latents})
                if self._interrupt:
                    break
        self.maybe_free_model_hooks()
        frames = convert(torch.cat(chunks, dim=2), output_type)
        return CausalVideoOutput(frames=frames) if return_dict else (frames,)

    def _check_preset(self, name: str, preset: Preset) -> None:
        config = self.transformer.config
        preset.check_scheduler(name, type(self.scheduler).__name__)
        preset.check_chunk(name, self.config.chunk_frames)
        preset.check_channels(name, config.in_channels, self.transformer.out_channels)

    def _fitting(
        self, settings: StreamSettings, num_frames: int | None, initial_latents: Tensor | None
    ) -> StreamSettings:
        """Where a chunk is a whole clip, it is as long as the clip; a longer one would not hold together."""
        if settings.sees_past or initial_latents is not None:
            return settings
        ratio = self.streaming_vae.spec.temporal_ratio
        longest = frames_of(settings.chunk_frames, ratio)
        if num_frames is None or num_frames > longest:
            logger.warning(
                f"num_frames is {num_frames or 'endless'}, and this model makes clips of {longest} frames"
                " that know nothing of each other: it has neither a window nor sinks"
            )
            return settings
        if isinstance(self.scheduler, FewStepScheduler):
            return settings
        return replace(settings, chunk_frames=latent_frames_covering(num_frames, ratio))

    def _check_size(self, height: int, width: int) -> None:
        _, patch_height, patch_width = self.transformer.config.patch_size
        ratio = self.streaming_vae.spec.spatial_ratio
        check_divides("height", height, ratio * patch_height)
        check_divides("width", width, ratio * patch_width)


def _start_from_image(settings: StreamSettings) -> StreamSettings:
    return replace(settings, independent_first_frame=True)


def _transform(strength: float | None, motion: MotionNoise | None) -> TransformSettings | None:
    if strength is not None:
        return TransformSettings(strength=strength, motion=motion)
    if motion is not None:
        raise ValueError("motion needs a strength, got None")
    return None


def _seeds(seed: int | list[int], count: int) -> tuple[int, ...]:
    if not isinstance(seed, list | tuple):
        check_whole("seed", seed)
        return tuple(int(seed) + i for i in range(count))
    if len(seed) != count:
        raise ValueError(f"seed must be one number or one for each of {count} videos, got {len(seed)}")
    for each in seed:
        check_whole("seed", each)
    return tuple(map(int, seed))


def _draw_seeds(generator: torch.Generator | list[torch.Generator], count: int) -> list[int]:
    """One seed from each generator, or all from one, as diffusers' pipelines use them."""
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"generator must be one or one for each of {count} videos, got {len(generator)}")
    sources = generator if isinstance(generator, list) else [generator] * count
    for source in sources:
        if not isinstance(source, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {source!r}")
    return [int(torch.randint(2**63 - 1, (1,), generator=g, device=g.device)) for g in sources]
