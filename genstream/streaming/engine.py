"""Generates video chunk by chunk against a KV cache: the one generation loop."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from genstream.cache.kv_cache import TextCache
from genstream.cache.layout import CacheLayout
from genstream.schedulers.schedule import Schedule
from genstream.shapes import frames_of, latent_frames_covering
from genstream.streaming.chunk import Chunk, Timings
from genstream.streaming.controls import (
    Applied,
    Control,
    LoraControl,
    PauseControl,
    PromptControl,
    ResetControl,
    ResumeControl,
    StopControl,
    Submitted,
)
from genstream.streaming.intake import Intake, holds_back
from genstream.streaming.noise import SeededNoise
from genstream.streaming.request import StreamRequest
from genstream.streaming.settings import ContextPolicy, RecachePolicy
from genstream.streaming.source import FrameSource
from genstream.streaming.state import Blend, StreamState
from genstream.transformer.adapters import loras_in_use, use_loras
from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.embeddings import timestep_dtype
from genstream.vae.protocol import StreamingVAE, VAEState

Predict = Callable[[Tensor, float], Tensor]
Draw = Callable[[int], Tensor]


class NonFiniteError(ArithmeticError):
    """Latents or frames are NaN or infinite."""


def _wait_a_little() -> None:
    time.sleep(0.02)


@dataclass(frozen=True)
class CacheEngine:
    """Holds weights and settings; what changes is in `StreamState`, so one engine serves many streams.

    Attributes:
        transformer: the student.
        vae: decodes the latents; it may have another dtype than the transformer.
        encode_prompt: prompts to embeddings `[B, tokens, text_dim]`, for prompt controls.
        idle: called between steps while a stream is paused or waits for its source.
    """

    transformer: CausalDiT
    vae: StreamingVAE
    encode_prompt: Callable[[list[str]], Tensor]
    idle: Callable[[], None] = _wait_a_little

    def stream(self, request: StreamRequest, controls: Iterable[Applied] = ()) -> Iterator[Chunk]:
        """All chunks of a request; an endless request never ends."""
        yield from self.run(self.start(request, controls))

    def run(self, state: StreamState) -> Iterator[Chunk]:
        """The chunks that are left; `state` always stands behind the last chunk given out."""
        while not state.finished:
            chunk = self.step(state)
            if chunk.latents is not None:
                yield chunk
            elif not state.finished:
                self.idle()

    @torch.no_grad()
    def start(
        self, request: StreamRequest, controls: Iterable[Applied] = (), source: FrameSource | None = None
    ) -> StreamState:
        """The state in front of the first chunk; `controls`, the log of another run, are replayed."""
        self._check_context(request)
        with loras_in_use(self.transformer, request.loras):
            state = self._start(request, source)
        for applied in controls:
            state.submit(applied.control, not_before=applied.frame)
        return state

    def _start(self, request: StreamRequest, source: FrameSource | None) -> StreamState:
        device, dtype = self.transformer.device, self.transformer.dtype
        height, width = self._latent_size(request)
        layout = self.cache_layout(request)
        embeds = request.prompt_embeds.to(device, dtype)
        channels = self.transformer.out_channels
        return StreamState(
            request=request,
            noise=request.noise,
            prompt_embeds=embeds,
            text=self.text_cache(embeds, request),
            negative_text=self._negative_text(request, embeds),
            kv=self.transformer.kv_cache(layout, request.batch_size, height, width),
            vae=self._vae_state(request),
            history=torch.zeros(request.batch_size, channels, 0, height, width, device=device, dtype=dtype),
            intake=self._intake(request),
            source=source,
            loras=request.loras,
        )

    @torch.no_grad()
    def step(self, state: StreamState) -> Chunk:
        """Generate one chunk and advance `state`; a step that raises leaves the stream as it was.

        A stream that is paused or stopped by a control, or that waits for its source (a step long also when
        it resumes or is reset), gives a chunk without latents and frames.

        Raises:
            NonFiniteError: the chunk's latents are not finite.
            ValueError: the stream is finished, or a control does not fit it, such as a prompt that is too
                long; that control is dropped.
        """
        if state.finished:
            raise ValueError("state is finished: its stream has no further chunk")
        self._take_in(state)
        with loras_in_use(self.transformer, state.loras):
            return self._step(state)

    def _step(self, state: StreamState) -> Chunk:
        """`step` with the stream's LoRAs in use; a control may change them."""
        draft = state.draft()
        due = self._apply_due(draft)
        controls = draft.log[len(state.log) :]
        if draft.paused or draft.stopped or not self._has_source_frames(draft):
            state.adopt(draft, due)
            return Chunk(
                index=state.chunk_index,
                first_frame=state.frames_out,
                frames=None,
                latents=None,
                applied=controls,
                timings=None,
            )
        begun = time.perf_counter()
        if draft.request.settings.context is ContextPolicy.RECOMPUTE:
            # In front of a new prompt, which says itself whether the past is made with it.
            self._rebuild(draft)
        self._advance_blend(draft)
        with draft.kv.undone_on_failure():
            latents = self.generate(draft)
            generated = time.perf_counter()
            self.commit(latents, draft)
            committed = time.perf_counter()
            frames = self._decode(latents, draft)
        timings = Timings(
            denoise_s=generated - begun,
            commit_s=committed - generated,
            decode_s=time.perf_counter() - committed,
        )
        chunk = Chunk(
            index=state.chunk_index,
            first_frame=state.frames_out - state.waiting_frames,
            frames=frames,
            latents=latents,
            applied=controls,
            timings=timings,
            noise_level=None if draft.intake is None else draft.intake.level,
        )
        if draft.intake is not None:
            whole = self._whole_frames(latents.shape[2], draft)
            draft.intake = draft.intake.after(whole, latents.shape[2])
        draft.frames_out += self._count_frames(latents.shape[2], draft)
        draft.frame += latents.shape[2]
        draft.chunk_index += 1
        state.adopt(draft, due)
        return chunk

    def generate(self, state: StreamState) -> Tensor:
        """Clean latents `[B, C, T, h, w]` of the next chunk: given ones, or denoised in a few steps."""
        request = state.request
        frames = request.settings.chunk_at(state.frame)
        if state.frame < request.given_frames and request.initial_latents is not None:
            given = request.initial_latents[:, :, state.frame : state.frame + frames]
            return given.to(state.history)
        shape = (*state.history.shape[:2], frames, *state.history.shape[3:])
        noise = state.noise.initial(state.frame, shape).to(state.history)

        def draw(step: int) -> Tensor:
            return state.noise.fresh(state.frame, step, shape).to(state.history)

        x, schedule = noise, request.schedule
        if state.intake is not None:
            level = self._noise_level(state)
            source = state.intake.latents[:, :, :frames].to(noise)
            x, schedule = (1 - level) * source + level * noise, schedule.starting_at(level)
        latents = denoise(lambda x, t: self.predict(x, t, state), x, schedule, draw)
        check_finite("latents", latents, state)
        return latents

    def predict(self, x: Tensor, timestep: float, state: StreamState) -> Tensor:
        """Velocity of a noisy chunk in the context of the stream's past, with classifier-free guidance.

        Both passes see the same past. The one with the prompt comes last, so that its keys and values of the
        chunk are those that stay (Ho and Salimans, arXiv 2207.12598, in the convention where 1 is off).
        """
        if state.uncommitted:
            return self._velocity_and_commit(x, timestep, state)
        if state.negative_text is None:
            return self._velocity(x, timestep, state, state.text)
        away = self._velocity(x, timestep, state, state.negative_text)
        toward = self._velocity(x, timestep, state, state.text)
        return away + state.request.settings.guidance_scale * (toward - away)

    def commit(self, latents: Tensor, state: StreamState) -> None:
        """Make the clean chunk part of the past, by a pass over it unless the model has another way."""
        frames, settings = latents.shape[2], state.request.settings
        is_given = state.frame < state.request.given_frames  # so that no denoising step has seen it
        if settings.context is ContextPolicy.FUSED and not is_given:
            state.uncommitted = frames
        elif settings.context is ContextPolicy.CLEAN or is_given:
            self._clean_pass(latents, state.frame, state)
        state.history = _kept(torch.cat([state.history, latents], dim=2), state)

    def recache(self, state: StreamState, policy: RecachePolicy) -> None:
        """Rebuild the kept keys and values with the current prompt, in one pass over the kept latents.

        The pass is bidirectional over its frames (LongLive, arXiv 2509.22622). While nothing has been dropped
        yet, all frames are rebuilt, sinks included, whatever the policy.
        """
        if state.frame == 0 or policy is RecachePolicy.NOTHING:
            return
        if state.request.settings.context is ContextPolicy.RECOMPUTE:
            self._rebuild(state)
            return
        layout, kv = state.kv.layout, state.kv.clone()
        if state.frame - kv.origin > layout.capacity_frames:
            if policy is RecachePolicy.WINDOW:
                start = state.frame - layout.ring_frames
            else:
                start = kv.origin = state.frame - layout.capacity_frames
        else:
            start = kv.origin
        latents = state.history[:, :, -(state.frame - start) :]
        state.kv, state.uncommitted = kv, 0
        self._clean_pass(latents, start, state)

    def _check_context(self, request: StreamRequest) -> None:
        """Frames that the past is made from must be there when the next chunk starts, and be encodable."""
        if not request.settings.reencodes:
            return
        spec = self.vae.spec
        at_once = spec.lookahead_latents == 0 and spec.first_latents == spec.chunk_latents == 1
        if not (request.decode and at_once):
            raise ValueError(
                "context 'recompute' encodes decoded frames again: it needs decode=True and a VAE that "
                "decodes every latent frame at once, or sink_frames above 0; "
                f"got decode={request.decode} and {type(self.vae).__name__}"
            )
        self.vae.init_state("encode", request.batch_size, request.height, request.width)

    def text_cache(self, prompt_embeds: Tensor, request: StreamRequest) -> TextCache:
        """What the transformer is told: the prompt, and the request's image as tokens and channels."""
        image, channels = (
            None if given is None else given.to(prompt_embeds)
            for given in (request.image_embeds, request.image_channels)
        )
        return replace(self.transformer.text_cache(prompt_embeds, image), channels=channels)

    def cache_layout(self, request: StreamRequest) -> CacheLayout:
        """Which latent frames the cache of a stream keeps."""
        return request.settings.layout(self._latent_frames(request))

    def _negative_text(self, request: StreamRequest, like: Tensor) -> TextCache | None:
        embeds = request.negative_embeds
        return None if embeds is None else self.text_cache(embeds.to(like), request)

    def _rebuild(self, state: StreamState) -> None:
        """Write the whole past anew from its latents, chunk by chunk from position 0 of an empty cache.

        Once frames have been dropped and there are no sinks, its first latent frame is encoded again from
        the oldest decoded frame that it covers: as the first of a video it carries nothing of those before
        (Krea Realtime 14B).
        """
        latents, settings = state.history, state.request.settings
        frames = latents.shape[2]
        if settings.reencodes and frames < state.frame and state.pixels is not None:
            oldest = self.vae.encode(state.pixels[:, :, :1])  # [B, C, 1, h, w]
            latents = torch.cat([oldest.to(latents), latents[:, :, 1:]], dim=2)
        state.kv.origin = state.frame - frames
        start = 0
        while start < frames:
            end = min(start + settings.chunk_at(start), frames)
            self._clean_pass(latents[:, :, start:end], state.kv.origin + start, state)
            start = end

    def _velocity(self, x: Tensor, timestep: float, state: StreamState, text: TextCache) -> Tensor:
        """Velocity of the noisy current chunk."""
        velocity: Tensor = self.transformer(
            x,
            timesteps_of(x, timestep),
            frame_positions=range(state.frame, state.frame + x.shape[2]),
            kv_cache=state.kv,
            text_cache=text,
            past_weight=state.request.settings.past_weight,
            return_dict=False,
        )[0]
        return velocity

    def _velocity_and_commit(self, x: Tensor, timestep: float, state: StreamState) -> Tensor:
        """Velocity of the current chunk, in a pass that commits the chunk in front of it too."""
        settings, finished = state.request.settings, state.uncommitted
        clean = state.history[:, :, -finished:]
        levels = [
            timesteps_of(part, level).expand(-1, part.shape[2])
            for part, level in ((clean, settings.context_timestep), (x, timestep))
        ]
        velocity: Tensor = self.transformer(
            torch.cat([clean, x], dim=2),
            torch.cat(levels, dim=1),
            frame_positions=range(state.frame - finished, state.frame + x.shape[2]),
            kv_cache=state.kv,
            text_cache=state.text,
            finished_frames=finished,
            past_weight=settings.past_weight,
            return_dict=False,
        )[0]
        state.uncommitted = 0
        return velocity[:, :, finished:]

    def _clean_pass(self, latents: Tensor, start: int, state: StreamState) -> None:
        """Write the keys and values of clean latents from latent frame `start` on."""
        self.transformer(
            latents,
            timesteps_of(latents, state.request.settings.context_timestep),
            frame_positions=range(start, start + latents.shape[2]),
            kv_cache=state.kv,
            text_cache=state.text,
        )

    def _apply_due(self, state: StreamState) -> list[Submitted]:
        """Apply the controls that take effect now; returns them."""
        due = state.due()
        for submitted in due:
            try:
                self._apply(submitted.control, state)
            except ValueError:
                # It would fail again at every further step.
                state.withdraw([submitted])
                raise
            applied = Applied(submitted.sequence, submitted.control, state.frames_out)
            state.log = (*state.log, applied)
        return due

    def _apply(self, control: Control, state: StreamState) -> None:
        match control:
            case PromptControl():
                target = self._embeds(control, state)
                state.blend = Blend(
                    source=state.prompt_embeds,
                    target=target.to(state.prompt_embeds),
                    chunks=control.blend_chunks,
                    done=0,
                    recache=control.recache or state.request.settings.recache,
                )
            case LoraControl():
                self._change_lora(control, state)
            case PauseControl():
                state.paused = True
            case ResumeControl():
                state.paused = False
            case StopControl():
                state.stopped = True
            case ResetControl():
                self._reset(control, state)
            case _:
                raise ValueError(f"control must be one of genstream's, got {control!r}")

    def _embeds(self, control: PromptControl, state: StreamState) -> Tensor:
        if control.prompt_embeds is None:
            return self.encode_prompt([control.prompt] * state.request.batch_size)
        told, given = state.prompt_embeds.shape, control.prompt_embeds.shape
        if given[1:] != told[1:] or given[0] not in (1, told[0]):
            raise ValueError(
                f"prompt_embeds must be [1 or {told[0]}, {told[1]}, {told[2]}], got {list(given)}"
            )
        return control.prompt_embeds.expand(told[0], -1, -1)

    def _reset(self, control: ResetControl, state: StreamState) -> None:
        request = state.request
        if control.seed is None:
            state.noise = request.noise
        else:
            state.noise = SeededNoise(tuple(control.seed + i for i in range(request.batch_size)))
        height, width = self._latent_size(request)
        state.kv = self.transformer.kv_cache(state.kv.layout, request.batch_size, height, width)
        if state.vae is not None and state.waiting_frames > 0:
            held = self.vae.flush(copy.copy(state.vae))
            state.held = held if state.held is None else torch.cat([state.held, held], dim=2)
        state.vae = self._vae_state(request)
        state.history = state.history[:, :, :0]
        state.uncommitted, state.pixels = 0, None
        state.frame = 0
        state.intake = None if state.intake is None else state.intake.restarted(self.vae)

    def _change_lora(self, control: LoraControl, state: StreamState) -> None:
        self._commit_waiting(state)
        use_loras(self.transformer, control.uses)
        state.loras = control.uses
        state.text = self.text_cache(state.prompt_embeds, state.request)
        state.negative_text = self._negative_text(state.request, state.prompt_embeds)
        self.recache(state, control.recache or state.request.settings.recache)

    def _advance_blend(self, state: StreamState) -> None:
        blend = state.blend
        if blend is None:
            return
        self._commit_waiting(state)
        blend = replace(blend, done=blend.done + 1)
        state.prompt_embeds = blend.embeds
        state.text = self.text_cache(state.prompt_embeds, state.request)
        self.recache(state, blend.recache)
        state.blend = None if blend.done == blend.chunks else blend

    def _commit_waiting(self, state: StreamState) -> None:
        """Commit a chunk that waits for the next pass, while prompt and weights are those that made it."""
        if state.uncommitted:
            waiting = state.history[:, :, -state.uncommitted :]
            self._clean_pass(waiting, state.frame - state.uncommitted, state)
            state.uncommitted = 0

    def _decode(self, latents: Tensor, state: StreamState) -> Tensor | None:
        """Frames that are ready; with a stream's last chunk also those that the VAE held back."""
        if state.vae is None:
            return None
        count = self._count_frames(latents.shape[2], state)
        is_last = state.frames_out + count == state.num_frames
        # One of its own, so that a failure behind the decoding leaves the stream as it was; a step makes new
        # tensors and leaves the old ones as they are.
        state.vae = copy.copy(state.vae)
        like = next(iter(state.vae.slots.values()))
        frames = self.vae.decode_chunk(latents.to(like), state.vae)
        check_finite("frames", frames, state)
        if state.request.settings.reencodes:
            recent = frames if state.pixels is None else torch.cat([state.pixels, frames], dim=2)
            kept = frames_of(state.kv.layout.window_frames, self._temporal_ratio)
            state.pixels = recent[:, :, -kept:]
        if state.held is not None:
            frames = torch.cat([state.held, frames], dim=2)
        if is_last:
            frames = torch.cat([frames, self.vae.flush(state.vae)], dim=2)
        frames = frames[:, :, : state.waiting_frames + count]
        state.waiting_frames += count - frames.shape[2]
        state.held = None
        return frames

    def _count_frames(self, latent_frames: int, state: StreamState) -> int:
        """Frames of the next latent frames that belong to the stream; the last chunk may be cut."""
        frames, total = self._whole_frames(latent_frames, state), state.num_frames
        return frames if total is None else min(frames, total - state.frames_out)

    def _whole_frames(self, latent_frames: int, state: StreamState) -> int:
        """Frames that the next latent frames decode to."""
        ratio = self._temporal_ratio
        return frames_of(latent_frames, ratio) if state.frame == 0 else ratio * latent_frames

    @property
    def _temporal_ratio(self) -> int:
        return self.vae.spec.temporal_ratio

    def chunk_count(self, request: StreamRequest) -> int | None:
        """Chunks of a whole request; None for an endless one."""
        if request.num_frames is None:
            return None
        return request.settings.chunks_covering(
            latent_frames_covering(request.num_frames, self._temporal_ratio)
        )

    def evaluations_per_chunk(self, request: StreamRequest) -> int:
        """Evaluations of the transformer that each chunk costs, once the past is as long as it gets."""
        settings = request.settings
        evaluations = len(request.schedule.timesteps) * evaluations_per_step(request)
        if settings.context is ContextPolicy.CLEAN:
            return evaluations + 1
        if settings.context is ContextPolicy.RECOMPUTE:
            return evaluations + settings.chunks_covering(self.cache_layout(request).window_frames)
        return evaluations

    def chunk_start(self, chunk: int, request: StreamRequest) -> int:
        """First frame of chunk `chunk`, counted from 0, of a stream that is not reset."""
        if chunk == 0:
            return 0
        settings = request.settings
        latent_frames = settings.chunk_at(0) + (chunk - 1) * settings.chunk_frames
        return frames_of(latent_frames, self._temporal_ratio)

    def _latent_frames(self, request: StreamRequest) -> int | None:
        """Latent frames of a whole request, in whole chunks."""
        chunks = self.chunk_count(request)
        if chunks is None:
            return None
        return request.settings.chunk_at(0) + (chunks - 1) * request.settings.chunk_frames

    def _intake(self, request: StreamRequest) -> Intake | None:
        if request.transform is None:
            return None
        return Intake.empty(self.vae, request.height, request.width, request.highest_level)

    def _take_in(self, state: StreamState) -> None:
        """Take from the source what the next chunk lacks, as far as it is there.

        Frames cannot be given back: they stay in `state` even if the step then fails.
        """
        if state.intake is None or state.paused:
            return
        if state.source is None:
            raise ValueError("source must be set on a restored or cloned state, to go on with its frames")
        limit, latent_frames = state.request.num_frames, state.request.settings.chunk_at(state.frame)
        first = self._whole_frames(latent_frames, state)
        later = self._temporal_ratio * state.request.settings.chunk_frames
        wanted = self._wanted_frames(state)
        while not self._has_source_frames(state):
            state.intake = state.intake.filled(state.source, wanted, limit).completed(first, later)
            waiting = state.intake.waiting.shape[2]
            if waiting == 0 or (waiting < wanted and not state.intake.ended):
                break
            # Always in the same portions, whenever frames arrive: others would round differently.
            state.intake = state.intake.encode(self.vae, wanted, latent_frames)
            wanted += self._temporal_ratio
        if state.intake.ended and state.intake.frames == 0:
            raise ValueError("source must hold at least one frame, got none")

    def _has_source_frames(self, state: StreamState) -> bool:
        """Whether the next chunk's source frames are encoded; true without a source."""
        intake = state.intake
        if intake is None:
            return True
        latent_frames = state.request.settings.chunk_at(state.frame)
        enough = intake.ended or intake.waiting.shape[2] >= self._wanted_frames(state)
        return enough and intake.latents.shape[2] >= latent_frames

    def _wanted_frames(self, state: StreamState) -> int:
        """Source frames that the next chunk waits for.

        A decoder that holds frames back gives them with the last chunk: then the next frame, or the end,
        must be known too.
        """
        whole = self._whole_frames(state.request.settings.chunk_at(state.frame), state)
        return whole + int(state.vae is not None and holds_back(self.vae.spec))

    def _noise_level(self, state: StreamState) -> float:
        """Noise level of the next chunk, which then is the intake's."""
        transform, intake = state.request.transform, state.intake
        assert transform is not None and intake is not None
        level = state.request.highest_level
        if transform.motion is not None:
            frames = self._whole_frames(state.request.settings.chunk_at(state.frame), state)
            level = transform.motion.level(level, intake.level, intake.motion(frames))
        state.intake = replace(intake, level=level)
        return level

    def _latent_size(self, request: StreamRequest) -> tuple[int, int]:
        ratio = self.vae.spec.spatial_ratio
        return request.height // ratio, request.width // ratio

    def _vae_state(self, request: StreamRequest) -> VAEState | None:
        if not request.decode:
            return None
        return self.vae.init_state("decode", request.batch_size, request.height, request.width)


def evaluations_per_step(request: StreamRequest) -> int:
    """Evaluations of the transformer for one velocity: guidance needs one without the prompt too."""
    return 1 if request.negative_embeds is None else 2


def timesteps_of(x: Tensor, timestep: float) -> Tensor:
    """The same timestep for all of `x`, `[B, 1]`."""
    return torch.full((len(x), 1), timestep, dtype=timestep_dtype(x.device), device=x.device)


def _kept(history: Tensor, state: StreamState) -> Tensor:
    """Of all latents so far, those that the past can be built anew from."""
    settings, layout = state.request.settings, state.kv.layout
    if settings.context is not ContextPolicy.RECOMPUTE:
        return history[:, :, -layout.capacity_frames :]
    if history.shape[2] <= layout.window_frames:
        return history
    sinks = settings.sink_frames
    recent = history[:, :, history.shape[2] - (layout.window_frames - sinks) :]
    return torch.cat([history[:, :, :sinks], recent], dim=2)


def check_finite(name: str, tensor: Tensor, state: StreamState) -> None:
    """One synchronisation, so that a broken chunk never enters the cache, the queue or the video."""
    if not bool(tensor.isfinite().all()):
        raise NonFiniteError(
            f"{name} of chunk {state.chunk_index} (from latent frame {state.frame}) are not finite; "
            f"the {'VAE' if name == 'frames' else 'model'} or its dtype ({tensor.dtype}) is at fault"
        )


def denoise(predict: Predict, x: Tensor, schedule: Schedule, draw: Draw) -> Tensor:
    """Clean sample from noise `x`: one model evaluation for each noise level of the schedule."""
    for step, timestep in enumerate(schedule.timesteps):
        x = schedule.advance(step, x, predict(x, timestep), partial(draw, step))
    return x
