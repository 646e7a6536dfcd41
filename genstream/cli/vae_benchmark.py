"""Speed, memory and use of the processor by one video VAE."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from genstream.cli.process import (
    hardware_name,
    peak_memory_since,
    resident_memory_bytes,
    restart_peak_memory,
)
from genstream.cli.units import change, mib
from genstream.vae.protocol import RGB, Direction, StreamingVAE, VAESpec, VAEState

_MATMUL_SIZE = 1024
_MATMUL_SIZE_GPU = 8192
_MATMUL_RUNS = 10
_PARTS = 10
_FEWEST_TURNS = 5
_MOST_TURNS = 50
_GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is measured.

    Attributes:
        width: pixels.
        height: pixels.
        chunk_latents: latent frames of a chunk; None for what the VAE works off together.
        chunks: measured in each direction.
        max_seconds: a direction ends early after so long, with the chunks until then.
    """

    width: int
    height: int
    chunk_latents: int | None = None
    chunks: int = 50
    max_seconds: float = math.inf

    def __post_init__(self) -> None:
        if self.chunks < _PARTS:
            raise ValueError(f"chunks (--chunks) must be at least {_PARTS}, got {self.chunks}")
        if not self.max_seconds > 0:
            raise ValueError(f"max_seconds (--max-seconds) must be positive, got {self.max_seconds}")

    def latents_of_chunk(self, spec: VAESpec) -> int:
        """Latent frames of a chunk of a VAE; whole pieces of it, so that every chunk gives frames."""
        chosen = spec.chunk_latents if self.chunk_latents is None else self.chunk_latents
        if chosen < 1 or chosen % spec.chunk_latents:
            raise ValueError(
                f"chunk_latents (--chunk-latents) must be a positive multiple of {spec.chunk_latents}, "
                f"which this VAE works off together, got {chosen}"
            )
        return chosen


@dataclass(frozen=True, kw_only=True)
class StreamFigures:
    """What one direction took.

    `first` and `last` are medians of the first and last tenth of the chunks. `new` and `late` are those of a
    new stream and of this one behind its last chunk, which took turns: machines that are shared change their
    speed within minutes, so that its own first chunks are nothing to compare with.
    """

    chunks: int
    chunk_frames: int
    frame_rate: float
    chunk_median_s: float
    chunk_p95_s: float
    frame_new_s: float
    frame_late_s: float
    memory_first_bytes: float
    memory_last_bytes: float
    state_bytes: int
    peak_memory_bytes: int | None
    flop_per_chunk: int

    def share_of(self, flop_per_s: float) -> float:
        """Of what the processor can do, what the median chunk did."""
        return self.flop_per_chunk / self.chunk_median_s / flop_per_s


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What was measured in one direction.

    Attributes:
        chunk_s: seconds of each chunk.
        memory: bytes after each chunk.
        turns: seconds of a chunk of a new stream and of this one behind all others, again and again.
        chunk_frames: of every chunk.
        state_bytes: what the stream remembers.
        peak_memory_bytes: most that was held during these chunks, if that is known.
        flop: floating-point operations of a chunk.
    """

    chunk_s: Sequence[float]
    memory: Sequence[int]
    turns: Sequence[tuple[float, float]]
    chunk_frames: int
    state_bytes: int
    peak_memory_bytes: int | None
    flop: int

    def figures(self) -> StreamFigures:
        """What is told of them."""
        chunks, frames = len(self.chunk_s), self.chunk_frames
        tenth = max(1, chunks // _PARTS)
        return StreamFigures(
            chunks=chunks,
            chunk_frames=frames,
            frame_rate=frames * chunks / sum(self.chunk_s),
            chunk_median_s=statistics.median(self.chunk_s),
            chunk_p95_s=sorted(self.chunk_s)[math.ceil(0.95 * chunks) - 1],
            frame_new_s=statistics.median(new for new, _ in self.turns) / frames,
            frame_late_s=statistics.median(late for _, late in self.turns) / frames,
            memory_first_bytes=statistics.median(self.memory[:tenth]),
            memory_last_bytes=statistics.median(self.memory[-tenth:]),
            state_bytes=self.state_bytes,
            peak_memory_bytes=self.peak_memory_bytes,
            flop_per_chunk=self.flop,
        )


@dataclass(frozen=True, kw_only=True)
class VAEFigures:
    """Figures of one VAE at one size, all of one run of one process; `encode` is None without an encoder."""

    vae: str
    width: int
    height: int
    chunk_latents: int
    device: str
    dtype: str
    hardware: str
    date: str
    exactness: str
    matmul_flop_per_s: float
    decode: StreamFigures
    encode: StreamFigures | None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `dataclasses.asdict` made values of."""
        streams = {
            name: None if values[name] is None else StreamFigures(**values[name])
            for name in ("decode", "encode")
        }
        return cls(**{**values, **streams})


@torch.no_grad()
def measure(vae: StreamingVAE, name: str, settings: BenchSettings) -> VAEFigures:
    """Decode and encode a stream of random numbers and drop what comes out."""
    chunk_latents = settings.latents_of_chunk(vae.spec)
    like = next(iter(vae.init_state("decode", 1, settings.height, settings.width).slots.values()))
    device = like.device
    peak = _matmul_peak(like)
    decode = _measure_direction(vae, "decode", settings)
    encode = _measure_direction(vae, "encode", settings) if _encodes(vae, settings) else None
    return VAEFigures(
        vae=name,
        width=settings.width,
        height=settings.height,
        chunk_latents=chunk_latents,
        device=device.type,
        dtype=str(like.dtype).removeprefix("torch."),
        hardware=hardware_name(device),
        date=datetime.now(UTC).date().isoformat(),
        exactness=vae.spec.exactness,
        # Twice: machines that are shared change their speed within minutes.
        matmul_flop_per_s=max(peak, _matmul_peak(like)),
        decode=decode,
        encode=encode,
    )


def _encodes(vae: StreamingVAE, settings: BenchSettings) -> bool:
    """Whether there is an encoder; the size was good for decoding."""
    try:
        vae.init_state("encode", 1, settings.height, settings.width)
    except ValueError:
        return False
    return True


def _measure_direction(vae: StreamingVAE, direction: Direction, settings: BenchSettings) -> StreamFigures:
    state = vae.init_state(direction, 1, settings.height, settings.width)
    chunk = _random_chunk(vae.spec, state, settings.latents_of_chunk(vae.spec))
    counts_peak = restart_peak_memory(chunk.device)
    step = _warmed_up(vae, state, chunk)
    with FlopCounterMode(display=False) as counter:
        step(chunk)
    frames = chunk.shape[2] * (vae.spec.temporal_ratio if direction == "decode" else 1)
    chunk_s: list[float] = []
    memory: list[int] = []
    deadline = time.perf_counter() + settings.max_seconds
    while len(chunk_s) < settings.chunks and (time.perf_counter() < deadline or not chunk_s):
        chunk_s.append(_seconds(step, chunk))
        memory.append(_memory(chunk.device))
    state_bytes = state.nbytes
    peak = peak_memory_since(chunk.device) if counts_peak else None
    # Behind the peak: two streams are more than one.
    new = _warmed_up(vae, vae.init_state(direction, 1, settings.height, settings.width), chunk)
    turns = [(_seconds(new, chunk), _seconds(step, chunk)) for _ in range(_turns(len(chunk_s)))]
    measured = Measurements(
        chunk_s=chunk_s,
        memory=memory,
        turns=turns,
        chunk_frames=frames,
        state_bytes=state_bytes,
        # The system notes peaks late: some hundred kilobytes below what was in memory.
        peak_memory_bytes=None if peak is None else max(peak, *memory),
        flop=counter.get_total_flops(),
    )
    return measured.figures()


def _seconds(step: Callable[[Tensor], None], chunk: Tensor) -> float:
    begun = time.perf_counter()
    step(chunk)
    return time.perf_counter() - begun


def _turns(chunks: int) -> int:
    return min(max(chunks // _PARTS, _FEWEST_TURNS), _MOST_TURNS)


def _random_chunk(spec: VAESpec, state: VAEState, latents: int) -> Tensor:
    """Input of a chunk behind a stream's first latent frame."""
    like = next(iter(state.slots.values()))
    ratio = spec.spatial_ratio
    shape = (1, RGB, latents * spec.temporal_ratio, state.height, state.width)
    if state.direction == "decode":
        shape = (1, spec.latent_channels, latents, state.height // ratio, state.width // ratio)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (values if state.direction == "decode" else values.clamp(-1, 1)).to(like)


def _warmed_up(vae: StreamingVAE, state: VAEState, chunk: Tensor) -> Callable[[Tensor], None]:
    """A step of the stream, which is under way: its start, all buffers and look-ahead lie behind it."""
    spec = vae.spec
    run = vae.decode_chunk if state.direction == "decode" else vae.encode_chunk

    def step(part: Tensor) -> None:
        run(part, state)
        _wait(part.device)

    frames = spec.temporal_ratio if state.direction == "encode" else 1
    surplus = spec.temporal_ratio - spec.first_frames if state.direction == "encode" else 0
    step(chunk[:, :, surplus:])
    waiting = spec.first_latents + spec.lookahead_latents + spec.chunk_latents
    for _ in range(math.ceil(waiting * frames / chunk.shape[2])):
        step(chunk)
    return step


def _matmul_peak(like: Tensor) -> float:
    """Floating-point operations per second of the best of some large matrix products."""
    size = _MATMUL_SIZE if like.device.type == "cpu" else _MATMUL_SIZE_GPU
    a = torch.randn(size, size).to(like)
    seconds = []
    for _ in range(_MATMUL_RUNS):
        begun = time.perf_counter()
        torch.mm(a, a)
        _wait(like.device)
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)


def _wait(device: torch.device) -> None:
    """Until a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _memory(device: torch.device) -> int:
    """Bytes that the process holds, on a GPU those of PyTorch's tensors."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_memory_bytes()


def section_title(figures: VAEFigures) -> str:
    """Of the section that the figures belong to."""
    return f"Speed at {figures.width}x{figures.height}, {figures.dtype} on {figures.device}"


def table(rows: Sequence[VAEFigures]) -> str:
    """Markdown tables of VAEs at one size: speed, then how steady it is."""
    ceiling = max(row.matmul_flop_per_s for row in rows)
    peaks = sorted(row.matmul_flop_per_s / _GIGA for row in rows)
    where = (
        "PyTorch on the GPU" if rows[0].device == "cuda" else "the process, weights and libraries included"
    )
    return "\n".join(
        [
            f"{rows[0].width}x{rows[0].height} in {rows[0].dtype}; {rows[0].hardware}, {rows[0].date}. The "
            f"arithmetic ceiling is the best of matrix products in all processes: {peaks[-1]:.0f} GFLOP/s "
            f"(the least was {peaks[0]:.0f}). Memory is that of {where}.",
            "",
            "| VAE | direction | latents per chunk | fps | ms per chunk, median | p95 | GFLOP per frame | "
            "of the ceiling | state | peak memory |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(_speed(row, name, stream, ceiling) for row in rows for name, stream in _streams(row)),
            *(
                f"\n{row.vae} does not stream exactly: {row.exactness}."
                for row in rows
                if row.exactness != "exact"
            ),
            "",
            *_steady_table(rows),
        ]
    )


def _steady_table(rows: Sequence[VAEFigures]) -> list[str]:
    steady = [
        _steadiness(row, name, stream)
        for row in rows
        for name, stream in _streams(row)
        if stream.chunks >= _PARTS
    ]
    if not steady:
        return [f"How steady they are was not measured: there were fewer than {_PARTS} chunks."]
    return [
        "The time of a frame behind so many chunks and of one of a new stream, in turns, and memory at the"
        f" first and at the last tenth of the chunks, where there were {_PARTS} at least in the time that was"
        " given; medians:",
        "",
        "| VAE | direction | chunks | ms per frame, new stream | behind the chunks | memory, first | last |",
        "|---|---|---|---|---|---|---|",
        *steady,
    ]


def _streams(row: VAEFigures) -> list[tuple[str, StreamFigures]]:
    return [("decode", row.decode), *([] if row.encode is None else [("encode", row.encode)])]


def _speed(row: VAEFigures, direction: str, stream: StreamFigures, ceiling: float) -> str:
    peak = "" if stream.peak_memory_bytes is None else mib(stream.peak_memory_bytes)
    cells = (
        row.vae,
        direction,
        str(row.chunk_latents),
        f"{stream.frame_rate:.4g}",
        f"{1000 * stream.chunk_median_s:.4g}",
        f"{1000 * stream.chunk_p95_s:.4g}",
        f"{stream.flop_per_chunk / stream.chunk_frames / _GIGA:.3g}",
        f"{100 * stream.share_of(ceiling):.0f} %",
        mib(stream.state_bytes),
        peak,
    )
    return f"| {' | '.join(cells)} |"


def _steadiness(row: VAEFigures, direction: str, stream: StreamFigures) -> str:
    cells = (
        row.vae,
        direction,
        str(stream.chunks),
        f"{1000 * stream.frame_new_s:.4g}",
        f"{1000 * stream.frame_late_s:.4g} ({change(stream.frame_new_s, stream.frame_late_s)})",
        mib(stream.memory_first_bytes),
        f"{mib(stream.memory_last_bytes)} ({change(stream.memory_first_bytes, stream.memory_last_bytes)})",
    )
    return f"| {' | '.join(cells)} |"
