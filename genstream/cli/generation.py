"""Runs a plan through the pipeline into a file."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from genstream.cli.figures import RunClock
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

    @classmethod
    def load(
        cls,
        folder: Path,
        plan: GeneratePlan,
        image: NDArray[np.uint8] | None,
        *,
        device: str | None,
        dtype: str | None,
    ) -> Self:
        """Load the model in `folder`; where `device` or `dtype` is None, the machine decides."""
        target = _device(device)
        default_dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
        pipe = CausalVideoPipeline.from_pretrained(
            folder, dtype=getattr(torch, dtype) if dtype else default_dtype
        )
        pipe.to(target)
        if plan.num_frames is not None:
            check_frame_count(plan.num_frames, pipe.vae.spec.temporal_ratio)
        generation = cls(pipe=pipe, plan=plan, image=image)
        generation._warn_of_unknown_words()
        return generation

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

    def _warn_of_unknown_words(self) -> None:
        prompts = [self.plan.prompt, *(switch.prompt for switch in self.plan.switches)]
        unknown = dict.fromkeys(word for prompt in prompts for word in self.pipe.unknown_words(prompt))
        if unknown:
            _warn(
                f"the model never saw {', '.join(map(repr, unknown))} and will ignore or misread it;"
                f" it knows: {', '.join(self.pipe.known_words())}"
            )


def to_uint8(frames: torch.Tensor) -> NDArray[np.uint8]:
    """Frames [1, 3, F, H, W] in [-1, 1] as uint8 [F, H, W, 3] on the host."""
    levels = ((frames[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(levels.permute(1, 2, 3, 0).cpu().numpy())  # [3, F, H, W] -> [F, H, W, 3]


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    available += ["mps"] if torch.backends.mps.is_available() else []
    if name not in available and not (name == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"device (--device) must be one of {', '.join(available)} here, got {name!r}")
    return torch.device(name)


def _warn_of_unused(waiting: list[Switch]) -> None:
    for switch in waiting:
        _warn(f"the switch at {switch.seconds}s had no effect: no chunk starts that late")


def _warn(text: str) -> None:
    print(f"genstream: warning: {text}", file=sys.stderr)
