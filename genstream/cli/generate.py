"""`genstream generate`: a prompt becomes a video file, written while it is generated."""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from genstream.cli.clip import check_single_image, make_plan, parse_lora, parse_size, parse_switch
from genstream.cli.figures import RunFigures
from genstream.io.model_folder import find_model, read_card
from genstream.streaming.presets import PRESETS

if TYPE_CHECKING:
    from genstream.cli.generation import Generation
    from genstream.pipelines.causal_video import CausalVideoPipeline

EXIT_INTERRUPTED = 130
_STREAM_OPTIONS = (
    ("--chunk", "chunk_frames", "latent frames generated together"),
    ("--window", "window_frames", "latest latent frames that are kept"),
    ("--sink", "sink_frames", "first latent frames that are kept for ever"),
    ("--guidance-scale", "guidance_scale", "of classifier-free guidance; 1 is off"),
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "generate", help="make a video from a prompt", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("prompt", help="what to show, such as: a red circle moving right")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="length of the video (4)")
    length.add_argument("--frames", type=int, help="length in frames: 1 + 4 k for the embedded model")
    add_run_options(parser, image="image to start from, in the size of the video")
    parser.set_defaults(run=run)


def add_run_options(parser: argparse.ArgumentParser, *, image: str) -> None:
    """Add the options of every command that makes a video with a model; `image` tells what one is for."""
    parser.add_argument(
        "-o",
        "--output",
        default="out.mp4",
        help=".mp4, .webm, .gif, .png (one frame), or a name without suffix: a folder of png (out.mp4)",
    )
    parser.add_argument("--image", type=Path, help=image)
    parser.add_argument("--seed", type=int, default=0, help="same seed, same video (0)")
    parser.add_argument("--model", default="toyworld", help="installed model, model folder or run (toyworld)")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="run the model like a published student: "
        f"{', '.join(PRESETS)}; `genstream models` describes them (the model's own way)",
    )
    for option, name, text in _STREAM_OPTIONS:
        kind = float if name == "guidance_scale" else int
        parser.add_argument(option, dest=name, type=kind, help=f"{text} (the model's own)")
    parser.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="LoRA to run the model with, a .safetensors file or a folder; may be given several times",
    )
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="size in pixels (the model's own)")
    parser.add_argument("--fps", type=float, help="frames per second (the input's or the model's own)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (cuda if there is one, else cpu)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="(float32 on cpu, else bfloat16)"
    )
    parser.add_argument("--quantize", choices=("int8", "fp8"), help="eight-bit weights in the transformer")
    parser.add_argument(
        "--offload",
        choices=("none", "model", "group"),
        default="none",
        help="keep the text encoder off the GPU and bring it whole, or layer by layer, to encode (none)",
    )
    parser.add_argument(
        "--overwrite",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="replace the output if it exists",
    )
    parser.add_argument(
        "--switch",
        type=parse_switch,
        action="append",
        default=[],
        metavar='"4s: PROMPT"',
        help="change the prompt at a time; may be given several times",
    )
    parser.add_argument("--json", action="store_true", help="print the figures of the run as json")


def run(arguments: argparse.Namespace) -> int:
    """Check all that needs no torch, then load, generate and report."""
    began_s = time.perf_counter()
    folder = find_model(arguments.model)
    card = read_card(folder)
    plan = make_plan(arguments, card)
    check_single_image(arguments.output, plan)
    from genstream.io.reader import read_image
    from genstream.io.writer import check_path

    check_path(arguments.output, overwrite=arguments.overwrite)
    image = None if arguments.image is None else read_image(arguments.image, plan.height, plan.width)
    from genstream.cli.generation import Generation

    pipe = load(folder, arguments)
    generation = Generation(
        pipe=pipe, plan=plan, image=image, vocabulary=card.vocabulary, native_size=card.native_size
    )
    return write(generation, arguments, load_s=time.perf_counter() - began_s)


def load(folder: Path, arguments: argparse.Namespace) -> "CausalVideoPipeline":
    """The model in `folder`, run as the command line says."""
    from genstream.cli.pipeline import load_pipeline

    pipe = load_pipeline(
        folder,
        device=arguments.device,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        offload=arguments.offload,
        loras=arguments.lora,
    )
    if arguments.preset is not None:
        pipe.apply_preset(arguments.preset)
    given = {name: getattr(arguments, name) for _, name, _ in _STREAM_OPTIONS}
    pipe.register_to_config(**{name: value for name, value in given.items() if value is not None})
    _ = pipe.settings  # checks them together
    return pipe


def write(generation: "Generation", arguments: argparse.Namespace, *, load_s: float) -> int:
    """Generate into the output and report; returns the exit code. The model took `load_s` to load."""
    from genstream.io.metadata import VideoMetadata
    from genstream.io.writer import open_writer

    plan = generation.plan
    generation.run(
        lambda: open_writer(
            arguments.output,
            fps=plan.fps,
            width=plan.width,
            height=plan.height,
            metadata=VideoMetadata(prompt=plan.described_prompt, seed=plan.seed, model=arguments.model),
            overwrite=arguments.overwrite,
        )
    )
    figures = RunFigures.of(
        plan, generation.clock, output=arguments.output, model=arguments.model, load_s=load_s
    )
    print(json.dumps(dataclasses.asdict(figures)) if arguments.json else _summary(figures))
    return EXIT_INTERRUPTED if figures.interrupted else 0


def _summary(figures: RunFigures) -> str:
    if not figures.frames:
        return "interrupted before the first frame: nothing was written"
    return (
        f"{'interrupted: ' if figures.interrupted else ''}{figures.output}: {figures.frames}"
        f" frame{'' if figures.frames == 1 else 's'},"
        f" {figures.width}x{figures.height}, {figures.seconds:.2f} s; {figures.frame_rate:.1f} fps,"
        f" {figures.real_time_factor:.2f}x real time"
    )
