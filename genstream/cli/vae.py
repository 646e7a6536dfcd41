"""`genstream vae bench|compare`: speed and memory of video VAEs, and what they make of a clip."""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from genstream.cli.clip import parse_size
from genstream.cli.vae_names import check_name, is_random, names_help, open_decoder, open_vae, split_pair
from genstream.io.sections import check_section_file, write_section

if TYPE_CHECKING:
    from genstream.cli.vae_benchmark import BenchSettings, VAEFigures
    from genstream.cli.vae_comparison import Frames, Reconstruction

_SIZES = [(128, 128), (256, 256)]
_CLIP_SIZE = (128, 128)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "vae", help="measure and compare video VAEs", description=__doc__, allow_abbrev=False
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    _add_bench(actions)
    _add_compare(actions)


def _add_bench(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "bench",
        help="speed, memory and use of the processor, chunk by chunk",
        description="Streams of random numbers, in a process of its own for each VAE and size.",
        epilog=names_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("vaes", nargs="*", metavar="VAE", default=["toyworld"], help="see below (toyworld)")
    parser.add_argument(
        "--size",
        type=parse_size,
        action="append",
        metavar="WxH",
        help="in pixels; may be given several times (128x128 and 256x256)",
    )
    parser.add_argument(
        "--chunk-latents", type=int, help="latent frames of a chunk (what the VAE works off together)"
    )
    parser.add_argument("--chunks", type=int, default=50, help="chunks in each direction, at least 10 (50)")
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=float("inf"),
        help="end a direction after so long, with the chunks until then (no limit)",
    )
    _add_common(parser, "its sections Speed at WxH")
    parser.set_defaults(run=_run_bench)


def _add_compare(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "compare",
        help="quality and speed on the same clip",
        description="PSNR, SSIM, flicker, speed and memory of reconstructions, streamed chunk by chunk.",
        epilog=names_help() + "\nA+B decodes the latents of A with B.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("vaes", nargs="+", metavar="VAE", help="see below")
    parser.add_argument("--video", type=Path, help="video file or folder of png (a clip of the toy world)")
    parser.add_argument("--frames", type=int, default=33, help="first frames of it (33)")
    parser.add_argument(
        "--size", type=parse_size, metavar="WxH", help="scale the clip to this (the video's own, or 128x128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the toy world's clip (0)")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="write frames and errors side by side")
    _add_common(parser, "its section Quality")
    parser.set_defaults(run=_run_compare)


def _add_common(parser: argparse.ArgumentParser, section: str) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(by device)")
    parser.add_argument("--json", action="store_true", help="print json in place of the tables")
    parser.add_argument("--output", type=Path, help=f"also write to this markdown file, as {section}")


def _run_bench(arguments: argparse.Namespace) -> int:
    """Measure each VAE at each size, print and write the tables."""
    runs = list(itertools.product(arguments.vaes, arguments.size or _SIZES))
    from genstream.cli.pipeline import pick_device
    from genstream.cli.vae_benchmark import section_title, table

    if arguments.output is not None:
        check_section_file(arguments.output)
    pick_device(arguments.device)
    for name, size in runs:
        check_name(name)
        _bench_settings(arguments, size)

    failed: list[str] = []
    if len(runs) == 1:
        figures = [_measure_here(arguments, *runs[0])]
    else:
        figures, failed = _measure_apart(arguments, runs)
    titles = list(dict.fromkeys(section_title(row) for row in figures))
    tables = {title: table([row for row in figures if section_title(row) == title]) for title in titles}
    print(
        json.dumps([dataclasses.asdict(row) for row in figures])
        if arguments.json
        else "\n\n".join(tables.values())
    )
    if arguments.output is not None:
        for title, text in tables.items():
            write_section(arguments.output, title, text)
    if failed:
        raise ChildProcessError(f"could not measure {', '.join(failed)}; see above")
    return 0


def _measure_here(arguments: argparse.Namespace, name: str, size: tuple[int, int]) -> "VAEFigures":
    from genstream.cli.pipeline import pick_device, pick_dtype
    from genstream.cli.vae_benchmark import measure

    device = pick_device(arguments.device)
    vae = open_vae(name, pick_dtype(arguments.dtype, device), device)
    return measure(vae, name, _bench_settings(arguments, size))


def _bench_settings(arguments: argparse.Namespace, size: tuple[int, int]) -> "BenchSettings":
    from genstream.cli.vae_benchmark import BenchSettings

    return BenchSettings(
        width=size[0],
        height=size[1],
        chunk_latents=arguments.chunk_latents,
        chunks=arguments.chunks,
        max_seconds=arguments.max_seconds,
    )


def _measure_apart(
    arguments: argparse.Namespace, runs: list[tuple[str, tuple[int, int]]]
) -> tuple[list["VAEFigures"], list[str]]:
    """Figures of each run in a process of its own, whose memory is no other's, and the runs that failed."""
    from genstream.cli.vae_benchmark import VAEFigures

    figures, failed = [], []
    for name, (width, height) in runs:
        print(f"measuring {name} at {width}x{height}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "genstream.cli", "vae", "bench", name, "--size", f"{width}x{height}"]
        for option in ("chunk_latents", "chunks", "max_seconds", "device", "dtype"):
            if (value := getattr(arguments, option)) is not None:
                command += [f"--{option.replace('_', '-')}", str(value)]
        done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, env=_environment(), check=False)
        if done.returncode:
            failed.append(f"{name} at {width}x{height}")
        else:
            figures += [VAEFigures.from_json(row) for row in json.loads(done.stdout)]
    return figures, failed


def _environment() -> dict[str, str]:
    """So that a process started from any folder finds this very package."""
    package = Path(__file__).resolve().parents[2]
    paths = [str(package), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _run_compare(arguments: argparse.Namespace) -> int:
    """Send the clip through all VAEs, print the table, write the picture."""
    if arguments.output is not None:
        check_section_file(arguments.output)
    if arguments.picture is not None:
        _check_picture(arguments.picture)
    for name in arguments.vaes:
        for part in split_pair(name):
            check_name(part)
    clip, description = _clip(arguments)
    from genstream.cli.vae_comparison import picture, table

    rows, failed = _compared(arguments, clip)
    if rows:
        text = table(description, rows)
        print(json.dumps([row.as_json() for row in rows]) if arguments.json else text)
        if arguments.output is not None:
            write_section(arguments.output, "Quality", text)
        if arguments.picture is not None:
            picture(clip, rows).save(arguments.picture, format="PNG")
    if failed:
        raise ValueError(f"could not compare {'; '.join(failed)}")
    return 0


def _compared(arguments: argparse.Namespace, clip: "Frames") -> tuple[list["Reconstruction"], list[str]]:
    """What each VAE makes of the clip, and what was wrong with those that make nothing of it."""
    from genstream.cli.pipeline import pick_device, pick_dtype
    from genstream.cli.vae_comparison import reconstruct

    device = pick_device(arguments.device)
    dtype = pick_dtype(arguments.dtype, device)
    rows, errors = [], {}
    for name in arguments.vaes:
        print(f"comparing {name}", file=sys.stderr, flush=True)
        first, second = split_pair(name)
        told = f"{name} (random weights)" if is_random(first) or is_random(second) else name
        try:
            encoder = open_vae(first, dtype, device)
            decoder = encoder if first == second else open_decoder(second, encoder, dtype, device)
            rows.append(reconstruct(clip, told, encoder, decoder))
        except (OSError, ValueError) as error:
            if len(arguments.vaes) == 1:
                raise
            errors[name] = error
    return rows, [f"{name}: {error}" for name, error in errors.items()]


def _clip(arguments: argparse.Namespace) -> tuple["Frames", str]:
    """The clip uint8 [F, H, W, 3], and what it is."""
    if arguments.frames < 2:
        raise ValueError(f"frames (--frames) must be at least 2, got {arguments.frames}")
    if arguments.video is None:
        from genstream.data.toyworld import ToyWorld

        width, height = arguments.size or _CLIP_SIZE
        world = ToyWorld(width=width, height=height)
        clip = world.frames(world.scene(arguments.seed, "eval"), arguments.frames)
        source = f"toy world, evaluation scene {arguments.seed}"
    else:
        clip, source = _read_clip(arguments.video, arguments.frames, arguments.size), arguments.video.name
    return clip, f"{source}, {len(clip)} frames of {clip.shape[2]}x{clip.shape[1]}"


def _read_clip(path: Path, count: int, size: tuple[int, int] | None) -> "Frames":
    import numpy as np
    from PIL import Image

    from genstream.io.reader import read_video

    frames = list(itertools.islice(read_video(path), count))
    if len(frames) < count:
        raise ValueError(
            f"video {str(path)!r} must have {count} frames or more (--frames), got {len(frames)}"
        )
    if size is not None:
        scaled = (Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames)
        frames = [np.asarray(frame, np.uint8) for frame in scaled]
    return np.stack(frames)


def _check_picture(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ValueError(f"picture (--picture) must end in .png, got {str(path)!r}")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"picture (--picture) must be a file in a folder that exists, got {str(path)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"picture (--picture) must be a file that may be written, got {str(path)!r}")
