"""`genstream bench`: one long stream, to see whether it keeps its speed and its memory."""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from genstream.cli.figures import RunClock
from genstream.cli.process import hardware_name, resident_memory_bytes
from genstream.cli.units import change, mib
from genstream.io.model_folder import find_model
from genstream.io.sections import check_section_file, write_section

if TYPE_CHECKING:
    from genstream.pipelines.causal_video import CausalVideoPipeline
    from genstream.streaming.chunk import Chunk

_MINUTE_S = 60.0


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "bench", help="measure one long stream", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--model", default="toyworld", help="installed model, model folder or run (toyworld)")
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of video, at least 2 (10)")
    parser.add_argument("--prompt", default="a red circle moving right", help="(a red circle moving right)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(by device)")
    parser.add_argument("--json", action="store_true", help="print json in place of the table")
    parser.add_argument(
        "--output",
        type=Path,
        help="also write the table to this markdown file, as its section One long stream",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Generate, measure, print the table."""
    if not 2 <= arguments.minutes < float("inf"):
        raise ValueError(f"minutes (--minutes) must be at least 2, got {arguments.minutes}")
    if arguments.output is not None:
        check_section_file(arguments.output)
    folder = find_model(arguments.model)
    from genstream.cli.pipeline import load_pipeline

    pipe = load_pipeline(folder, device=arguments.device, dtype=arguments.dtype)
    figures = measure(pipe, arguments.prompt, arguments.seed, arguments.minutes)
    table = figures.table()
    print(json.dumps(asdict(figures)) if arguments.json else table)
    if arguments.output is not None:
        write_section(arguments.output, "One long stream", table)
    return 0


@dataclass(frozen=True, kw_only=True)
class EnduranceFigures:
    """What a long stream took; minutes are minutes of video.

    Machines change their speed within minutes. So in one more minute the stream takes turns with a new one:
    `chunk_latency_old_s` and `chunk_latency_new_s` are medians of that minute.
    """

    hardware: str
    date: str
    minutes: float
    frames: int
    frame_rate: float
    real_time_factor: float
    time_to_first_frame_s: float
    start_to_first_frame_s: float
    chunk_latency_first_minute_s: float
    chunk_latency_last_minute_s: float
    chunk_latency_p95_s: float
    chunk_latency_old_s: float
    chunk_latency_new_s: float
    memory_first_minute_bytes: float
    memory_last_minute_bytes: float

    @classmethod
    def of(
        cls,
        clock: RunClock,
        memory: Sequence[int],
        turns: tuple[RunClock, RunClock],
        hardware: str,
        fps: float,
    ) -> Self:
        """Figures of a stream.

        Args:
            clock: that watched it.
            memory: resident bytes after each of its chunks.
            turns: clocks of one more minute, and of the first one of a new stream.
            hardware: that it ran on.
            fps: of the video.
        """
        started, p95 = clock.start_to_first_frame_s, clock.chunk_latency_s(95)
        assert started is not None and p95 is not None
        minutes = clock.frames / fps / _MINUTE_S
        per_minute = round(len(clock.chunk_s) / minutes)
        old, new = (statistics.median(turn.chunk_s) for turn in turns)
        return cls(
            hardware=hardware,
            date=datetime.now(UTC).date().isoformat(),
            minutes=minutes,
            frames=clock.frames,
            frame_rate=clock.frame_rate,
            real_time_factor=clock.frame_rate / fps,
            time_to_first_frame_s=clock.chunk_s[0],
            start_to_first_frame_s=started,
            chunk_latency_first_minute_s=statistics.median(clock.chunk_s[:per_minute]),
            chunk_latency_last_minute_s=statistics.median(clock.chunk_s[-per_minute:]),
            chunk_latency_p95_s=p95,
            chunk_latency_old_s=old,
            chunk_latency_new_s=new,
            memory_first_minute_bytes=statistics.median(memory[:per_minute]),
            memory_last_minute_bytes=statistics.median(memory[-per_minute:]),
        )

    def table(self) -> str:
        """The figures as a markdown table."""
        latency = change(self.chunk_latency_new_s, self.chunk_latency_old_s)
        memory = change(self.memory_first_minute_bytes, self.memory_last_minute_bytes)
        rows = (
            ("frame rate, decoding included", f"{self.frame_rate:.1f} fps"),
            ("real-time factor", f"{self.real_time_factor:.2f}"),
            ("time to first frame, model loaded", f"{self.time_to_first_frame_s:.2f} s"),
            ("process start to first frame", f"{self.start_to_first_frame_s:.1f} s"),
            (
                "chunk latency, median of the first minute",
                f"{1000 * self.chunk_latency_first_minute_s:.1f} ms",
            ),
            (
                "chunk latency, median of the last minute",
                f"{1000 * self.chunk_latency_last_minute_s:.1f} ms "
                f"({change(self.chunk_latency_first_minute_s, self.chunk_latency_last_minute_s)})",
            ),
            (
                "one more minute, in turns with the first minute of a new stream",
                f"{1000 * self.chunk_latency_old_s:.1f} against {1000 * self.chunk_latency_new_s:.1f} ms "
                f"({latency})",
            ),
            ("chunk latency, 95th percentile", f"{1000 * self.chunk_latency_p95_s:.1f} ms"),
            (
                "process memory, median of the first minute",
                mib(self.memory_first_minute_bytes),
            ),
            (
                "process memory, median of the last minute",
                f"{mib(self.memory_last_minute_bytes)} ({memory})",
            ),
        )
        title = f"One stream of {self.minutes:.3g} minutes of video; {self.hardware}, {self.date}"
        return "\n".join([title, "", "| figure | value |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def measure(pipe: "CausalVideoPipeline", prompt: str, seed: int, minutes: float) -> EnduranceFigures:
    """Run one stream and drop its frames; progress on stderr."""
    from genstream.cli.pipeline import frames_of_chunk
    from genstream.cli.progress import progress_for

    fps = pipe.config.default_fps
    frames = round(minutes * _MINUTE_S * fps)
    clock, memory = RunClock(), []
    stream = pipe.stream(prompt, seconds=(minutes + 1) * _MINUTE_S, seed=seed)
    with progress_for(frames, fps) as progress:
        clock.start()
        while clock.frames < frames:
            clock.chunk_done(len(frames_of_chunk(next(stream))))
            progress.show(clock)
            memory.append(resident_memory_bytes())
    turns = _take_turns(stream, pipe.stream(prompt, seconds=_MINUTE_S, seed=seed))
    return EnduranceFigures.of(clock, memory, turns, hardware_name(pipe.device), fps)


def _take_turns(old: Iterator["Chunk"], new: Iterator["Chunk"]) -> tuple[RunClock, RunClock]:
    """Clocks of two streams that generate chunk by chunk in turns, until one of them ends."""
    from genstream.cli.pipeline import frames_of_chunk

    clocks = RunClock(), RunClock()
    while True:
        for stream, clock in zip((old, new), clocks, strict=True):
            clock.start()
            if (chunk := next(stream, None)) is None:
                return clocks
            clock.chunk_done(len(frames_of_chunk(chunk)))
