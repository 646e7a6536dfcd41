"""Figures of one run."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from genstream.cli.clip import GeneratePlan
from genstream.cli.process import peak_memory_bytes, seconds_since_process_start


@dataclass(kw_only=True)
class RunClock:
    """Collects when chunks were done; times in seconds since `start`, the model being loaded."""

    now: Callable[[], float] = time.perf_counter
    frames: int = 0
    last_frames: int = 0
    chunk_s: list[float] = field(default_factory=list)
    switch_frames: list[int] = field(default_factory=list)
    start_to_first_frame_s: float | None = None
    elapsed_s: float = 0.0
    interrupted: bool = False
    _began_s: float = 0.0

    def start(self) -> None:
        """Generation begins, or goes on after a break that does not count."""
        self._began_s = self.now() - self.elapsed_s

    def chunk_done(self, frames: int) -> None:
        """Note that another `frames` frames are out."""
        before_s, self.elapsed_s = self.elapsed_s, self.now() - self._began_s
        if not self.chunk_s:
            self.start_to_first_frame_s = seconds_since_process_start()
        self.chunk_s.append(self.elapsed_s - before_s)
        self.last_frames = frames
        self.frames += frames

    @property
    def time_to_first_frame_s(self) -> float | None:
        """Seconds from `start` to the first chunk; None before it."""
        return self.chunk_s[0] if self.chunk_s else None

    @property
    def frame_rate(self) -> float:
        """Frames per second from `start` to the last chunk; 0 before the first."""
        return self.frames / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def last_frame_rate(self) -> float:
        """Frames per second of the last chunk; 0 before the first."""
        return self.last_frames / self.chunk_s[-1] if self.chunk_s and self.chunk_s[-1] else 0.0

    def chunk_latency_s(self, percent: float) -> float | None:
        """Percentile (nearest rank) of the chunk latencies; None before the first chunk."""
        if not self.chunk_s:
            return None
        return sorted(self.chunk_s)[max(math.ceil(percent / 100 * len(self.chunk_s)) - 1, 0)]


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """What `--json` prints.

    `real_time_factor` above 1 is faster than the video plays; `switch_frames` are the first frames that were
    made with the next prompt.
    """

    output: str
    model: str
    prompt: str
    seed: int
    interrupted: bool
    frames: int
    width: int
    height: int
    fps: float
    seconds: float
    switch_frames: list[int]
    load_s: float
    time_to_first_frame_s: float | None
    start_to_first_frame_s: float | None
    frame_rate: float
    real_time_factor: float
    chunks: int
    chunk_latency_p50_s: float | None
    chunk_latency_p95_s: float | None
    peak_memory_bytes: int | None

    @classmethod
    def of(cls, plan: GeneratePlan, clock: RunClock, *, output: str, model: str, load_s: float) -> Self:
        """Figures of the run that `clock` watched."""
        return cls(
            output=output,
            model=model,
            prompt=plan.described_prompt,
            seed=plan.seed,
            interrupted=clock.interrupted,
            frames=clock.frames,
            width=plan.width,
            height=plan.height,
            fps=plan.fps,
            seconds=clock.frames / plan.fps,
            switch_frames=clock.switch_frames,
            load_s=load_s,
            time_to_first_frame_s=clock.time_to_first_frame_s,
            start_to_first_frame_s=clock.start_to_first_frame_s,
            frame_rate=clock.frame_rate,
            real_time_factor=clock.frame_rate / plan.fps,
            chunks=len(clock.chunk_s),
            chunk_latency_p50_s=clock.chunk_latency_s(50),
            chunk_latency_p95_s=clock.chunk_latency_s(95),
            peak_memory_bytes=peak_memory_bytes(),
        )
