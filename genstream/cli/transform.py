"""`genstream transform`: a video becomes another one that follows a prompt, written while it is generated.

As many frames come out as go in, at the same rate. Sound is not carried over.
"""

import argparse
import time
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from genstream.cli.clip import GeneratePlan, check_single_image, make_plan
from genstream.cli.generate import add_run_options, load, write
from genstream.io.model_folder import ModelCard, find_model, read_card
from genstream.streaming.presets import find_preset
from genstream.streaming.settings import DEFAULT_STRENGTH

if TYPE_CHECKING:
    from genstream.io.reader import VideoFile


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "transform", help="make a video from a video and a prompt", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "input", type=Path, help="video file, or folder of frame_*.png, in the size of the video"
    )
    parser.add_argument("prompt", help="what to show, such as: a blue square moving left")
    parser.add_argument(
        "--strength",
        type=float,
        default=DEFAULT_STRENGTH,
        help=f"noise put on the input, in (0, 1]; at 1 nothing of it is left ({DEFAULT_STRENGTH})",
    )
    parser.add_argument("--motion-aware", action="store_true", help="less noise where the input moves much")
    parser.add_argument("--frames", type=int, help="end after so many frames, if the input is longer")
    add_run_options(parser, image="image of image-to-video models, in the size of the video")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check all that needs no torch, then load, generate and report."""
    began_s = time.perf_counter()
    if arguments.preset is not None:
        find_preset(arguments.preset).check_source(arguments.preset)
    folder = find_model(arguments.model)
    card = read_card(folder)
    from genstream.io.reader import inspect_video, read_image, read_video
    from genstream.io.writer import check_path
    from genstream.shapes import check_same_size

    check_path(arguments.output, overwrite=arguments.overwrite)
    plan = _plan(arguments, inspect_video(arguments.input), card)
    check_single_image(arguments.output, plan)
    frames = read_video(arguments.input)
    first = next(frames)
    size = (first.shape[0], first.shape[1])
    check_same_size(f"input {str(arguments.input)!r}", size, (plan.height, plan.width))
    image = None if arguments.image is None else read_image(arguments.image, plan.height, plan.width)
    from genstream.cli.generation import Generation, SourceClip
    from genstream.streaming.intake import MotionNoise

    clip = SourceClip(
        frames=chain([first], frames),
        strength=arguments.strength,
        motion=MotionNoise() if arguments.motion_aware else None,
    )
    pipe = load(folder, arguments)
    generation = Generation(
        pipe=pipe,
        plan=plan,
        image=image,
        vocabulary=card.vocabulary,
        native_size=card.native_size,
        clip=clip,
    )
    return write(generation, arguments, load_s=time.perf_counter() - began_s)


def _plan(arguments: argparse.Namespace, video: "VideoFile", card: ModelCard) -> GeneratePlan:
    """The plan of the parsed command line, as long and as fast as the input unless it says otherwise."""
    frames, fps = video.frames, arguments.fps
    if arguments.frames is not None:
        frames = min(frames, arguments.frames)
    if fps is None and video.fps > 0:
        fps = video.fps
    changed = {"frames": frames, "fps": fps, "seconds": None}
    return make_plan(argparse.Namespace(**{**vars(arguments), **changed}), card)
