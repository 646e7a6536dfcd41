"""All that changes while a stream runs."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field, fields
from threading import Lock

from torch import Tensor

from genstream.cache.kv_cache import KVCache, TextCache
from genstream.shapes import check_whole
from genstream.streaming.controls import Applied, Control, Submitted
from genstream.streaming.intake import Intake
from genstream.streaming.noise import NoiseSource
from genstream.streaming.request import StreamRequest
from genstream.streaming.settings import RecachePolicy
from genstream.streaming.source import FrameSource
from genstream.transformer.adapters import LoraUse
from genstream.vae.protocol import VAEState


@dataclass(frozen=True, eq=False)
class Blend:
    """A prompt on its way from one embedding to another."""

    source: Tensor
    target: Tensor
    chunks: int
    done: int
    recache: RecachePolicy

    @property
    def embeds(self) -> Tensor:
        """The embedding after `done` of `chunks` chunks."""
        share = self.done / self.chunks
        return self.target if self.done == self.chunks else self.source.lerp(self.target, share)


@dataclass(eq=False)
class StreamState:
    """A running stream: pass it to `step`, clone it to fork, save it to go on later.

    Device hooks must not move it: it is no container and has no method named `to`.

    Attributes:
        request: what was asked for.
        noise: source of the noise, which a reset may have replaced.
        prompt_embeds: current prompt `[B, tokens, text_dim]`.
        text: its cross-attention keys and values.
        negative_text: those of the negative prompt; None without guidance.
        kv: keys and values of the past.
        vae: decoder state; None when the stream is not decoded.
        queue: chunks under way `[B, C, T, h, w]` behind the finished ones, the oldest and least noisy first;
            None until the first pass over them, and for an engine that finishes each chunk at once.
        history: the latent frames whose keys and values `kv` can hold, for re-caching.
        uncommitted: latent frames at its end whose keys and values the next pass makes permanent.
        pixels: the last decoded frames, where the context is made from them; None elsewhere.
        frame: latent frames finished since the start or the last reset.
        chunk_index: chunks finished.
        frames_out: frames of the finished latent frames.
        waiting_frames: those of them that the VAE holds back, because it looks ahead or works in pieces.
        held: frames from before a reset that go out with the next chunk.
        paused: nothing is generated until resumed.
        stopped: ended by a control.
        blend: prompt blend in progress.
        intake: what was taken in of the source; None without one.
        source: where the frames of a video-to-video stream come from; not part of a snapshot or a clone.
        loras: the LoRAs in use on this stream.
        log: the controls that took effect; with the request they replay the stream.
        pending: the controls that wait.
        sequence: number of the last submitted control.
        lock: guards `pending` and `sequence`, which other threads may change.
    """

    request: StreamRequest
    noise: NoiseSource
    prompt_embeds: Tensor
    text: TextCache
    negative_text: TextCache | None
    kv: KVCache
    vae: VAEState | None
    history: Tensor
    queue: Tensor | None = None
    uncommitted: int = 0
    pixels: Tensor | None = None
    frame: int = 0
    chunk_index: int = 0
    frames_out: int = 0
    waiting_frames: int = 0
    held: Tensor | None = None
    paused: bool = False
    stopped: bool = False
    blend: Blend | None = None
    intake: Intake | None = None
    source: FrameSource | None = None
    loras: tuple[LoraUse, ...] = ()
    log: tuple[Applied, ...] = ()
    pending: deque[Submitted] = field(default_factory=deque)
    sequence: int = 0
    lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def finished(self) -> bool:
        """Whether the stream has given all its frames or was stopped."""
        total = self.num_frames
        return self.stopped or (total is not None and self.frames_out >= total)

    @property
    def num_frames(self) -> int | None:
        """Frames of the whole stream; None while they are not known."""
        if self.intake is not None and self.intake.ended:
            return self.intake.frames
        return self.request.num_frames

    def submit(self, control: Control, *, not_before: int = 0) -> int:
        """Ask for a change at the first chunk that starts at or after frame `not_before`.

        May be called from another thread while a step runs.

        Returns:
            The control's sequence number, reported back by the chunk that it changes.
        """
        if not isinstance(control, Control):
            raise ValueError(f"control must be one of genstream's, got {control!r}")
        check_whole("not_before", not_before)
        with self.lock:
            self.sequence += 1
            self.pending.append(Submitted(self.sequence, control, not_before))
            return self.sequence

    def due(self) -> list[Submitted]:
        """The waiting controls that take effect now, in order."""
        with self.lock:
            return [waiting for waiting in self.pending if waiting.not_before <= self.frames_out]

    def draft(self) -> StreamState:
        """A shallow copy for a step to work on, so that a step that fails leaves this state as it was."""
        return copy.copy(self)

    def adopt(self, draft: StreamState, applied: list[Submitted]) -> None:
        """Take over a finished step. Controls that arrived meanwhile keep waiting."""
        for name in (item.name for item in fields(self)):
            if name not in ("pending", "sequence", "source"):
                setattr(self, name, getattr(draft, name))
        self.withdraw(applied)

    def withdraw(self, controls: list[Submitted]) -> None:
        """Forget waiting controls."""
        with self.lock:
            for control in controls:
                self.pending.remove(control)

    def clone(self) -> StreamState:
        """An independent stream that goes on from here (fork); set its `source`, which two cannot share."""
        fork = copy.copy(self)
        fork.kv = self.kv.clone()
        fork.vae = None if self.vae is None else self.vae.clone()
        fork.intake = None if self.intake is None else self.intake.clone()
        fork.source = None
        with self.lock:
            fork.pending = deque(self.pending)
            fork.sequence = self.sequence
        fork.lock = Lock()
        return fork
