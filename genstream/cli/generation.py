"""Runs a plan through the pipeline into a file."""

import sys
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from genstream.cli.figures import RunClock
from genstream.cli.pipeline import to_uint8
from genstream.cli.plan import GeneratePlan, Switch, check_frame_count
from genstream.cli.progress import Progress, progress_for
from genstream.io.writer import VideoWriter
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.streaming.controls import PromptControl


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A loaded pipeline and what it is to make; `image` is uint8 [H, W, 3] or None."""

    pipe: CausalVideoPipeline
    plan: GeneratePlan
    image: NDArray[np.uint8] | None
    clock: RunClock = field(default_factory=RunClock)

    def __post_init__(self) -> None:
        if self.plan.num_frames is not None:
            check_frame_count(self.plan.num_frames, self.pipe.vae.spec.temporal_ratio)

    def run(self, writer: VideoWriter) -> None:
        """Generate into `writer`; Ctrl-C ends the video early and is noted on the clock."""
        self.clock.start()
        try:
            with writer, progress_for(self.plan.total_frames, self.plan.fps) as progress:
                self._write_chunks(writer, progress)
        except KeyboardInterrupt:
            self.clock.interrupted = True

    def _write_chunks(self, writer: VideoWriter, progress: Progress) -> None:
        plan = self.plan
        waiting = list(plan.switches)
        state = self.pipe.start(
            prompt=plan.prompt,
            height=plan.height,
            width=plan.width,
            num_frames=plan.num_frames,
            seconds=plan.seconds,
            fps=plan.fps,
            seed=plan.seed,
            image=None if self.image is None else Image.fromarray(self.image),
        )
        while not state.finished:
            while waiting and self.clock.frames >= waiting[0].seconds * plan.fps:
                state.submit(PromptControl(prompt=waiting.pop(0).prompt))
            frames = to_uint8(self.pipe.step(state).frames)
            writer.write(frames)
            self.clock.chunk_done(len(frames))
            progress.show(self.clock)
        _warn_of_unused(waiting)

    def warn_of_unknown_words(self) -> None:
        """Name on stderr what the model cannot know, and what it knows."""
        prompts = [self.plan.prompt, *(switch.prompt for switch in self.plan.switches)]
        unknown = dict.fromkeys(word for prompt in prompts for word in self.pipe.unknown_words(prompt))
        if unknown:
            _warn(
                f"the model never saw {', '.join(map(repr, unknown))} and will ignore or misread it;"
                f" it knows: {', '.join(self.pipe.known_words())}"
            )


def _warn_of_unused(waiting: list[Switch]) -> None:
    for switch in waiting:
        _warn(f"the switch at {switch.seconds}s had no effect: no chunk starts that late")


def _warn(text: str) -> None:
    print(f"genstream: warning: {text}", file=sys.stderr)
