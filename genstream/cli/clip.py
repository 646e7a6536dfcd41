"""What `generate` was asked for, checked as far as it can be before anything heavy is loaded."""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

from genstream.io.model_folder import ModelCard
from genstream.shapes import frames_for_seconds

DEFAULT_SECONDS = 4.0
_SWITCH = re.compile(r"(?P<seconds>\d+(?:\.\d+)?)s:\s*(?P<prompt>\S.*)")
_LORA = re.compile(r"(?P<path>.+):(?P<scale>[-+]?\d+(?:\.\d+)?)")
_SIZE = re.compile(r"(?P<width>\d+)x(?P<height>\d+)")


@dataclass(frozen=True, kw_only=True)
class Switch:
    """From the first chunk that starts at or after `seconds` on, the stream follows `prompt`."""

    seconds: float
    prompt: str


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA to run the model with, and the factor on what it adds."""

    path: Path
    scale: float


@dataclass(frozen=True, kw_only=True)
class GeneratePlan:
    """One clip to generate: `num_frames` or `seconds` is given, the other is None. Sizes in pixels."""

    prompt: str
    width: int
    height: int
    fps: float
    seed: int
    num_frames: int | None
    seconds: float | None
    switches: tuple[Switch, ...]

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError(f"prompt must not be empty, got {self.prompt!r}")
        if not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be a positive number, got {self.fps}")
        if self.total_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {self.num_frames}")
        for switch in self.switches:
            if switch.seconds * self.fps >= self.total_frames:
                raise ValueError(
                    f"switch at {switch.seconds}s comes after the end; the video has {self._length}"
                )

    @property
    def total_frames(self) -> int:
        """Frames in the file."""
        if self.seconds is not None:
            return frames_for_seconds(self.seconds, self.fps)
        assert self.num_frames is not None
        return self.num_frames

    @property
    def rounding(self) -> str | None:
        """How `seconds` and the length of the file differ; None where they do not."""
        if self.seconds is None or math.isclose(self.seconds * self.fps, self.total_frames):
            return None
        whole_s = self.total_frames / self.fps
        return f"{self.seconds:g} s at {self.fps:g} fps become {self.total_frames} frames, {whole_s:.4g} s"

    @property
    def described_prompt(self) -> str:
        """The prompt with its switches, for the metadata of the file."""
        return "; ".join(
            [self.prompt, *(f"{switch.seconds:g}s: {switch.prompt}" for switch in self.switches)]
        )

    @property
    def _length(self) -> str:
        return f"num_frames {self.num_frames}" if self.seconds is None else f"seconds {self.seconds}"


def check_single_image(output: str, plan: GeneratePlan) -> None:
    """Raise ValueError if a video is to go into one png."""
    if output.lower().endswith(".png") and plan.total_frames != 1:
        raise ValueError(
            f"output path {output!r} is one image and takes 1 frame, got {plan.total_frames} frames;"
            " add --frames 1, or use a name without suffix for a folder of png"
        )


def make_plan(arguments: argparse.Namespace, card: ModelCard) -> GeneratePlan:
    """The plan of the parsed command line; the model's card fills in its native size and frame rate."""
    width, height = (card.width, card.height) if arguments.size is None else arguments.size
    fps = card.fps if arguments.fps is None else arguments.fps
    if width is None or height is None or fps is None:
        raise ValueError(
            f"size and fps must be given (--size, --fps): model {card.name!r} does not say its own"
        )
    seconds = arguments.seconds
    if seconds is None and arguments.frames is None:
        seconds = DEFAULT_SECONDS
    return GeneratePlan(
        prompt=arguments.prompt,
        width=width,
        height=height,
        fps=fps,
        seed=arguments.seed,
        num_frames=arguments.frames,
        seconds=seconds,
        switches=tuple(sorted(arguments.switch, key=lambda switch: switch.seconds)),
    )


def parse_switch(text: str) -> Switch:
    """`4s: a blue square moving left` as a Switch."""
    match = _SWITCH.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f'must look like "4s: a blue square moving left", got {text!r}')
    return Switch(seconds=float(match["seconds"]), prompt=match["prompt"])


def parse_lora(text: str) -> LoraFile:
    """`watercolour.safetensors:0.8` as a LoraFile; the scale is 1 where none is given."""
    match = _LORA.fullmatch(text)
    lora = LoraFile(
        path=Path(text if match is None else match["path"]), scale=float(match["scale"] if match else 1)
    )
    if not lora.path.exists():
        raise argparse.ArgumentTypeError(
            f"must be a file or folder, or PATH:SCALE, got {text!r}, which does not exist"
        )
    return lora


def parse_size(text: str) -> tuple[int, int]:
    """`WxH` as (width, height) in pixels."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, such as 128x128, got {text!r}")
    return int(match["width"]), int(match["height"])
