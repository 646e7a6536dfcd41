"""The toy-world benchmark: prompt adherence, drift, VAE quality and speed of one model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import torch
from numpy.typing import NDArray

from genstream.cli.figures import RunClock
from genstream.cli.pipeline import frames_of_chunk, to_uint8
from genstream.cli.process import hardware_name
from genstream.cli.progress import progress_for
from genstream.cli.window_judge import WindowJudge
from genstream.data.prompts import evaluation_prompts
from genstream.data.toyworld import ToyWorld
from genstream.evaluation.drift import DriftWindow, Slope, drift, slope
from genstream.evaluation.judge import Adherence, ClipScore, judge_clip
from genstream.evaluation.quality import psnr
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.training.clips import to_tensor

_VAE_CLIP_FRAMES = 65
_METRICS = ("colour", "shape", "direction", "count")
_SLOPES = ("brightness", "saturation")
_DRIFT_ROWS = 15


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What is generated and judged; `end_of_s` None leaves drift out. Sizes in pixels."""

    prompts: int
    vae_clips: int
    seconds: float
    end_of_s: float | None
    seed: int
    height: int
    width: int
    fps: int

    def __post_init__(self) -> None:
        for name in ("prompts", "vae_clips"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not (0 < self.seconds < math.inf and _is_whole(self.seconds * self.fps)):
            raise ValueError(f"seconds must be whole frames at {self.fps} fps, got {self.seconds}")
        if self.end_of_s is not None and not (
            self.seconds <= self.end_of_s < math.inf and _is_whole(self.end_of_s / self.seconds)
        ):
            raise ValueError(f"end_of must be a multiple of seconds ({self.seconds}), got {self.end_of_s}")

    @property
    def judged_frames(self) -> int:
        """Frames of a judged stretch."""
        return round(self.seconds * self.fps)

    @property
    def stream_s(self) -> float:
        """Seconds that are generated per prompt."""
        return self.seconds if self.end_of_s is None else self.end_of_s


@dataclass(frozen=True, kw_only=True)
class ReconstructionScore:
    """Mean PSNR in dB of evaluation clips against their reconstructions, and what the judge says of those."""

    psnr_db: float
    adherence: Adherence


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """Scores of all streams, window by window, and what the run took on which machine."""

    settings: BenchmarkSettings
    windows: tuple[DriftWindow, ...]
    slopes: dict[str, Slope]
    reconstruction: ReconstructionScore
    clock: RunClock
    first_frame_s: tuple[float, ...]
    hardware: str
    date: str

    @property
    def start(self) -> Adherence:
        """Scores of the first window."""
        return self.windows[0].adherence

    @property
    def end(self) -> Adherence | None:
        """Scores of the last window of long streams."""
        return None if self.settings.end_of_s is None else self.windows[-1].adherence

    def as_json(self) -> dict[str, object]:
        """All figures as plain values."""
        return {
            "prompts": self.settings.prompts,
            "seconds": self.settings.seconds,
            "seed": self.settings.seed,
            "start": _shares(self.start),
            "end_of_s": self.settings.end_of_s,
            "end": None if self.end is None else _shares(self.end),
            "drift": [
                {
                    "start_s": window.start_s,
                    **_shares(window.adherence),
                    "colour_error": window.colour_error,
                    "brightness_error": window.brightness_error,
                    "saturation_error": window.saturation_error,
                }
                for window in self.windows
            ],
            "slopes": {
                name: {"per_minute": each.per_minute, "low": each.low, "high": each.high}
                for name, each in self.slopes.items()
            },
            "hardware": self.hardware,
            "date": self.date,
            "vae_psnr_db": self.reconstruction.psnr_db,
            "vae": _shares(self.reconstruction.adherence),
            "frame_rate": self.clock.frame_rate,
            "time_to_first_frame_s": float(np.median(self.first_frame_s)),
            "chunk_latency_p50_s": self.clock.chunk_latency_s(50),
            "chunk_latency_p95_s": self.clock.chunk_latency_s(95),
        }

    def table(self, model: str) -> str:
        """The figures as a markdown table; adherence in per cent with 95 % intervals.

        Of long streams, how they go on: quality of the VAE and speed stand in the table of short ones.
        """
        settings = self.settings
        rows = [
            (f"{name}, first {settings.seconds:g} s", str(getattr(self.start, name))) for name in _METRICS
        ]
        if self.end is not None:
            label = f"last {settings.seconds:g} of {settings.end_of_s:g} s"
            rows += [(f"{name}, {label}", str(getattr(self.end, name))) for name in _METRICS]
            rows += [(f"slope of the {name} of objects, of 255", str(self.slopes[name])) for name in _SLOPES]
        else:
            rows += self._further_rows()
        title = f"{model}: {settings.prompts} prompts, seeds from {settings.seed},"
        title += f" {settings.width}x{settings.height} at {settings.fps} fps"
        lines = [title, "", "| figure | value |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
        return "\n".join(lines if self.end is None else [*lines, "", *self._drift_table()])

    def _further_rows(self) -> list[tuple[str, str]]:
        """Reconstructions and speed."""
        settings, clock = self.settings, self.clock
        return [
            (f"VAE PSNR, {settings.vae_clips} evaluation clips", f"{self.reconstruction.psnr_db:.2f} dB"),
            *(
                (f"{name}, their reconstructions", str(getattr(self.reconstruction.adherence, name)))
                for name in _METRICS
            ),
            (f"frame rate; {self.hardware}, {self.date}", f"{clock.frame_rate:.1f} fps"),
            ("time to first frame, median", f"{np.median(self.first_frame_s):.3f} s"),
            (
                "chunk latency p50 / p95",
                f"{clock.chunk_latency_s(50):.3f} / {clock.chunk_latency_s(95):.3f} s",
            ),
        ]

    def _drift_table(self) -> list[str]:
        """Markdown lines: what becomes of the streams as time goes by, of long ones at a few moments."""
        lines = [
            "| from | colour | shape | direction | count | colour error | brightness | saturation |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for window in self._shown_windows():
            shares = (f"{100 * getattr(window.adherence, name).value:.1f} %" for name in _METRICS)
            changes = (window.brightness_error, window.saturation_error)
            errors = (f"{window.colour_error:.1f}", *(f"{change:+.1f}" for change in changes))
            lines.append(f"| {' | '.join([f'{window.start_s:g} s', *shares, *errors])} |")
        return [
            *lines,
            "",
            "Errors of colour, brightness and saturation are of 255; slopes with 95 % intervals.",
        ]

    def _shown_windows(self) -> list[DriftWindow]:
        """Evenly spread ones, the first and the last among them."""
        last = len(self.windows) - 1
        rows = min(len(self.windows), _DRIFT_ROWS)
        return [self.windows[round(row * last / max(1, rows - 1))] for row in range(rows)]


def _is_whole(number: float) -> bool:
    """Up to the rounding of decimal fractions."""
    return round(number) >= 1 and math.isclose(number, round(number), rel_tol=1e-9)


def run_benchmark(pipe: CausalVideoPipeline, settings: BenchmarkSettings) -> BenchmarkResult:
    """Generate, judge and time; progress on stderr."""
    streams: list[list[ClipScore]] = []
    first_frame_s: list[float] = []
    clock = RunClock()
    total = settings.prompts * round(settings.stream_s * settings.fps)
    with progress_for(total, settings.fps) as progress:
        for index, prompt in enumerate(evaluation_prompts(settings.prompts)):
            chunks_before = len(clock.chunk_s)
            judge = WindowJudge(settings.judged_frames, prompt.scene, settings.fps)
            clock.start()
            for frames in _stream(pipe, settings, prompt.caption, settings.seed + index):
                clock.chunk_done(len(frames))
                judge.add(frames)
                progress.show(clock)
                clock.start()
            first_frame_s.append(clock.chunk_s[chunks_before])
            streams.append(judge.scores)
    return BenchmarkResult(
        settings=settings,
        windows=tuple(drift(streams, settings.seconds)),
        slopes={name: slope(streams, settings.seconds, f"{name}_error") for name in _SLOPES},
        reconstruction=judge_reconstructions(pipe, settings),
        clock=clock,
        first_frame_s=tuple(first_frame_s),
        hardware=hardware_name(pipe.device),
        date=datetime.now(UTC).date().isoformat(),
    )


def judge_reconstructions(pipe: CausalVideoPipeline, settings: BenchmarkSettings) -> ReconstructionScore:
    """Encode, decode and judge evaluation clips."""
    world = ToyWorld(height=settings.height, width=settings.width, fps=settings.fps)
    values, scores = [], []
    for seed in range(settings.vae_clips):
        scene = world.scene(seed, "eval")
        clip = world.frames(scene, _VAE_CLIP_FRAMES)
        pixels = to_tensor(clip[None])
        with torch.inference_mode():
            vae = pipe.streaming_vae
            again = to_uint8(vae.decode(vae.encode(pixels.to(pipe.device, pipe.vae.dtype))))
        values.append(psnr(clip, again))
        scores.append(judge_clip(again, scene, settings.fps))
    return ReconstructionScore(psnr_db=float(np.mean(values)), adherence=Adherence.of(scores))


def _stream(
    pipe: CausalVideoPipeline, settings: BenchmarkSettings, prompt: str, seed: int
) -> Iterator[NDArray[np.uint8]]:
    chunks = pipe.stream(
        prompt=prompt,
        height=settings.height,
        width=settings.width,
        seconds=settings.stream_s,
        fps=settings.fps,
        seed=seed,
    )
    for chunk in chunks:
        yield frames_of_chunk(chunk)


def _shares(adherence: Adherence) -> dict[str, dict[str, float]]:
    shares = {name: getattr(adherence, name) for name in _METRICS}
    return {
        name: {
            "value": share.value,
            "low": share.interval[0],
            "high": share.interval[1],
            "total": share.total,
        }
        for name, share in shares.items()
    }
