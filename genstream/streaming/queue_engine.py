"""Generates video through a queue of chunks, each noisier than the one before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from genstream.cache.joint_context import JointContext
from genstream.cache.kv_cache import TextCache
from genstream.cache.layout import CacheLayout, PositionPolicy
from genstream.shapes import latent_frames_covering
from genstream.streaming.controls import ResetControl
from genstream.streaming.engine import CacheEngine, check_finite, evaluations_per_step, timesteps_of
from genstream.streaming.request import StreamRequest
from genstream.streaming.settings import ContextPolicy
from genstream.streaming.state import StreamState


@dataclass(frozen=True)
class QueueEngine(CacheEngine):
    """The session of `CacheEngine`, but the chunks are denoised together, as on an assembly line.

    The queue holds one chunk for each noise level of the schedule, the oldest at the lowest. A joint pass,
    bidirectional over the queue, takes all of them one level further: the oldest is then clean, is committed
    by a pass of its own and given out, and a chunk of pure noise joins at the other end. So the first chunk
    takes as many joint passes as there are levels, every later one a single pass. At the end of a stream of
    known length nothing joins any more and the queue runs empty; an endless stream never gets there.

    A joint pass sees the sinks and the latest finished frames, together with the queue as many latent frames
    as `window_frames + chunk_frames`; `positions` says where the sinks stand for it. The pass that commits a
    chunk sees that many latest frames, the sinks only as long as they are among them.

    A control takes effect in front of a joint pass. A new prompt then guides every chunk of the queue from
    the level it has reached: the next chunk given out was shaped by the old prompt at all levels but its
    last, and the first chunk that never knew the old one comes `levels - 1` chunks later. Chunks given out
    never change. A reset drops the queue, a stop too.

    Source: Rolling Forcing (arXiv 2509.25161).
    """

    def cache_layout(self, request: StreamRequest) -> CacheLayout:
        """Which latent frames are kept; un-rotated sinks, and a ring for the passes that commit a chunk.

        Raises:
            ValueError: the window cannot hold the queue.
        """
        self.joint_layout(request)
        layout = super().cache_layout(request)
        return replace(layout, positions=PositionPolicy.ABSOLUTE, sink_reach_frames=layout.ring_frames)

    def joint_layout(self, request: StreamRequest) -> CacheLayout:
        """What a joint pass sees: sinks, latest finished frames and the queue.

        Raises:
            ValueError: the window cannot hold the queue, or the stream is to follow a source.
        """
        if request.transform is not None:
            raise ValueError(
                "a source cannot be followed by a queue of chunks (Rolling Forcing), which all start as noise"
            )
        settings, levels = request.settings, len(request.schedule.timesteps)
        chunk, sinks = settings.chunk_frames, settings.sink_frames
        least = sinks + (levels - 1) * chunk
        if settings.window_frames is None or settings.window_frames < least:
            raise ValueError(
                f"window_frames must be at least {least} for a queue of {levels} chunks of {chunk} latent "
                f"frames behind {sinks} sink frames, got {settings.window_frames}"
            )
        return CacheLayout(
            chunk_frames=chunk,
            sink_frames=sinks,
            window_frames=settings.window_frames - sinks,
            positions=settings.positions,
        )

    def evaluations_per_chunk(self, request: StreamRequest) -> int:
        """Those of a full queue: of its joint pass, and of the one that commits its oldest chunk."""
        return evaluations_per_step(request) + 1

    def generate(self, state: StreamState) -> Tensor:
        """Clean latents `[B, C, T, h, w]` of the next chunk; leaves those behind it in the queue."""
        if state.frame < state.request.given_frames:
            return super().generate(state)
        context = JointContext.allocate(state.kv, self.joint_layout(state.request))
        last = len(state.request.schedule.timesteps) - 1
        for level in range(0 if state.queue is None else last, last + 1):
            state.queue = self._advance_queue(level, state, context)
        assert state.queue is not None
        frames = state.request.settings.chunk_at(state.frame)
        latents, state.queue = state.queue[:, :, :frames], state.queue[:, :, frames:]
        return latents

    def predict_queue(
        self, queue: Tensor, timesteps: Tensor, state: StreamState, context: JointContext
    ) -> Tensor:
        """Velocity of the queue at timesteps `[B, T]`, with classifier-free guidance."""
        toward = self._joint_velocity(queue, timesteps, state, context, state.text)
        if state.negative_text is None:
            return toward
        away = self._joint_velocity(queue, timesteps, state, context, state.negative_text)
        return away + state.request.settings.guidance_scale * (toward - away)

    def _advance_queue(self, level: int, state: StreamState, context: JointContext) -> Tensor:
        """The queue after a joint pass in which its oldest chunk is at noise level `level`."""
        schedule = state.request.schedule
        chunks = self._with_noise(state)
        levels = range(level, level - len(chunks), -1)
        queue = torch.cat(chunks, dim=2)
        timesteps = torch.cat(
            [
                timesteps_of(chunk, schedule.timesteps[at]).expand(-1, chunk.shape[2])
                for at, chunk in zip(levels, chunks, strict=True)
            ],
            dim=1,
        )
        velocity = self.predict_queue(queue, timesteps, state, context)
        velocities = velocity.split([chunk.shape[2] for chunk in chunks], dim=2)
        start, advanced = state.frame, []
        for at, chunk, of_chunk in zip(levels, chunks, velocities, strict=True):
            draw = partial(_fresh_noise, state, start, at, chunk)
            advanced.append(schedule.advance(at, chunk, of_chunk, draw))
            start += chunk.shape[2]
        following = torch.cat(advanced, dim=2)
        check_finite("latents", following, state)
        return following

    def _with_noise(self, state: StreamState) -> list[Tensor]:
        """The chunks of the queue, and one of pure noise unless the stream ends with them."""
        settings, frame, chunks = state.request.settings, state.frame, []
        queue = state.history[:, :, :0] if state.queue is None else state.queue
        end = frame + queue.shape[2]
        while frame < end:
            length = settings.chunk_at(frame)
            chunks.append(queue[:, :, :length])
            queue, frame = queue[:, :, length:], frame + length
        left = self._latent_frames_left(state)
        if left is None or end - state.frame < left:
            shape = (*queue.shape[:2], settings.chunk_at(end), *queue.shape[3:])
            chunks.append(state.noise.initial(end, shape).to(queue))
        return chunks

    def _latent_frames_left(self, state: StreamState) -> int | None:
        """Fewest latent frames, from the next on, that give the frames still to come."""
        if state.request.num_frames is None:
            return None
        frames = state.request.num_frames - state.frames_out
        ratio = self._temporal_ratio
        return latent_frames_covering(frames, ratio) if state.frame == 0 else -(-frames // ratio)

    def _joint_velocity(
        self,
        queue: Tensor,
        timesteps: Tensor,
        state: StreamState,
        context: JointContext,
        text: TextCache,
    ) -> Tensor:
        velocity: Tensor = self.transformer(
            queue,
            timesteps,
            frame_positions=range(state.frame, state.frame + queue.shape[2]),
            kv_cache=context,
            text_cache=text,
            return_dict=False,
        )[0]
        return velocity

    def _check_context(self, request: StreamRequest) -> None:
        settings = request.settings
        if settings.context is not ContextPolicy.CLEAN or settings.past_weight != 1:
            raise ValueError(
                "the queue engine commits a chunk by a pass of its own and weighs all frames alike: context "
                f"must be 'clean' and past_weight 1, got {str(settings.context)!r} and {settings.past_weight}"
            )

    def _reset(self, control: ResetControl, state: StreamState) -> None:
        super()._reset(control, state)
        state.queue = None


def _fresh_noise(state: StreamState, start: int, level: int, like: Tensor) -> Tensor:
    return state.noise.fresh(start, level, like.shape).to(like)
