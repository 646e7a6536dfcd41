"""Runs a plan through the pipeline into a file."""

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from genstream.cli.clip import GeneratePlan, Switch
from genstream.cli.figures import RunClock
from genstream.cli.pipeline import frames_of_chunk
from genstream.cli.progress import Progress, progress_for
from genstream.io.writer import VideoWriter
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.streaming.controls import PromptControl
from genstream.streaming.intake import MotionNoise
from genstream.streaming.request import StreamRequest
from genstream.streaming.state import StreamState


@dataclass(frozen=True, kw_only=True)
class SourceClip:
    """Frames uint8 [H, W, 3] to make a video from, and how much they are changed."""

    frames: Iterator[NDArray[np.uint8]]
    strength: float
    motion: MotionNoise | None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A loaded pipeline and what it is to make; `image` is uint8 [H, W, 3] or None.

    `vocabulary` is what the model's card says it knows, by group; `native_size` the width and height that it
    says.
    """

    pipe: CausalVideoPipeline
    plan: GeneratePlan
    image: NDArray[np.uint8] | None
    vocabulary: Mapping[str, Sequence[str]]
    native_size: tuple[int, int] | None = None
    clip: SourceClip | None = None
    clock: RunClock = field(default_factory=RunClock)

    def run(self, open_output: Callable[[], VideoWriter]) -> None:
        """Generate into what `open_output` opens; Ctrl-C ends the video early and is noted on the clock.

        The output is opened when the request is known to be good, so that a bad one touches no file.
        """
        self._warn_of_unknown_words()
        if self.plan.rounding is not None:
            print(f"genstream: note: {self.plan.rounding}", file=sys.stderr)
        self._warn_of_another_size()
        self.clock.start()
        try:
            state = self._start()
            with _stoppable_once() as ignore_more, open_output() as writer:
                try:
                    with progress_for(self.plan.total_frames, self.plan.fps) as progress:
                        self._write_chunks(state, writer, progress)
                finally:
                    ignore_more()
        except KeyboardInterrupt:
            self.clock.interrupted = True

    def _start(self) -> StreamState:
        plan, clip = self.plan, self.clip
        request = self.pipe.request(
            plan.prompt,
            height=plan.height,
            width=plan.width,
            num_frames=plan.num_frames,
            seconds=plan.seconds,
            fps=plan.fps,
            seed=plan.seed,
            image=None if self.image is None else Image.fromarray(self.image),
            strength=None if clip is None else clip.strength,
            motion=None if clip is None else clip.motion,
        )
        state = self.pipe.start(request, source=None if clip is None else clip.frames)
        taken: set[int] = set()
        for switch in plan.switches:
            # A prompt that is too long must fail now, not in the middle.
            self.pipe.encode_prompt(switch.prompt)
            start = self._chunk_start_from(math.ceil(switch.seconds * plan.fps), request, switch)
            if start in taken:
                raise ValueError(
                    f"switch at {switch.seconds:g}s falls into the same chunk as the one before, which"
                    f" starts at {start / plan.fps:g}s; choose a time after that"
                )
            taken.add(start)
            if start > switch.seconds * plan.fps:
                begins = f"frame {start}, {start / plan.fps:.4g} s, where the next chunk starts"
                print(f"genstream: note: switch at {switch.seconds:g}s begins at {begins}", file=sys.stderr)
            state.submit(PromptControl(prompt=switch.prompt), not_before=start)
        return state

    def _chunk_start_from(self, frame: int, request: StreamRequest, switch: Switch) -> int:
        """First frame at or after `frame` at which a chunk starts."""
        engine = self.pipe.engine
        starts = (engine.chunk_start(chunk, request) for chunk in range(engine.chunk_count(request) or 0))
        last = 0
        for last in starts:
            if last >= frame:
                return last
        raise ValueError(
            f"switch at {switch.seconds:g}s comes too late: the last chunk starts at "
            f"{last / self.plan.fps:g}s"
        )

    def _write_chunks(self, state: StreamState, writer: VideoWriter, progress: Progress) -> None:
        for chunk in self.pipe.run(state):
            if chunk.applied:
                self.clock.switch_frames.append(chunk.first_frame)
            frames = frames_of_chunk(chunk)
            writer.write(frames)
            self.clock.chunk_done(len(frames))
            progress.show(self.clock)

    def _warn_of_another_size(self) -> None:
        size = self.plan.width, self.plan.height
        if self.native_size not in (None, size):
            made, asked = ("x".join(map(str, each)) for each in (self.native_size, size))
            _warn(f"the model was made at {made} pixels: a video of {asked} may come out empty or torn")

    def _warn_of_unknown_words(self) -> None:
        prompts = [self.plan.prompt, *(switch.prompt for switch in self.plan.switches)]
        unknown = dict.fromkeys(word for prompt in prompts for word in self.pipe.unknown_words(prompt))
        if unknown:
            groups = self.vocabulary or {"words": self.pipe.known_words()}
            known = [f"\n  {group}: {', '.join(words)}" for group, words in groups.items()]
            _warn(
                f"the model never saw {', '.join(map(repr, unknown))} and will ignore or misread it;"
                f" it knows{''.join(known)}"
            )


@contextmanager
def _stoppable_once() -> Iterator[Callable[[], None]]:
    """Gives a function from whose call on Ctrl-C is ignored: a second one must not stop the file's end."""
    is_main = threading.current_thread() is threading.main_thread()  # the only one that may say so
    before = signal.getsignal(signal.SIGINT)

    def ignore() -> None:
        if is_main:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    try:
        yield ignore
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)


def _warn(text: str) -> None:
    print(f"genstream: warning: {text}", file=sys.stderr)
