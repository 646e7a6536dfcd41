"""`genstream plan`: does a stream fit into a graphics card, and what would make it fit?

Nothing is loaded: configurations and the headers of the weight files tell it all.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genstream.cli.clip import parse_size
from genstream.cli.units import gpu_memory
from genstream.io.model_folder import INDEX_NAME, find_model, read_card, read_object
from genstream.shapes import frames_for_seconds
from genstream.streaming.presets import PRESETS, EngineKind, Preset, find_preset
from genstream.streaming.settings import StreamSettings

if TYPE_CHECKING:
    from genstream.pipelines.memory import MemoryEstimate, Proposal, StreamPlan

_GIB = 2**30
_RESERVE_GIB = 1.0
_SETTINGS = ("sink_frames", "window_frames", "chunk_frames", "guidance_scale")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "plan", help="tell the memory that a stream takes", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--model", default="toyworld", help="installed model, model folder or run (toyworld)")
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="size in pixels (the model's own)")
    parser.add_argument("--vram", type=float, metavar="GIB", help="memory of the card")
    parser.add_argument("--seconds", type=float, help="length, where all frames are kept (endless)")
    parser.add_argument("--preset", choices=PRESETS, help="how it is run (as the model's folder says)")
    parser.add_argument("--sink", dest="sink_frames", type=int, help="latent frames that are kept for ever")
    parser.add_argument("--window", dest="window_frames", type=int, help="latest latent frames that are kept")
    parser.add_argument("--chunk", dest="chunk_frames", type=int, help="latent frames generated together")
    parser.add_argument("--guidance-scale", type=float, help="of classifier-free guidance; 1 is off")
    parser.add_argument("--batch", type=int, default=1, help="streams that advance together (1)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="(bfloat16)"
    )
    parser.add_argument("--quantize", choices=("int8", "fp8"), help="eight-bit weights in the transformer")
    parser.add_argument(
        "--offload",
        choices=("none", "model", "group"),
        default="none",
        help="keep the text encoder off the card and bring it whole, or layer by layer, to encode (none)",
    )
    parser.add_argument(
        "--transform", action="store_true", help="for a stream that follows a video, which is encoded too"
    )
    parser.add_argument(
        "--lora",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="LoRA that is loaded, a .safetensors file or a folder; may be given several times",
    )
    parser.add_argument("--tiny-vae", action="store_true", help="decode with TAEHV (the model's own VAE)")
    parser.add_argument(
        "--reserve",
        type=float,
        default=_RESERVE_GIB,
        metavar="GIB",
        help=f"left to the driver, to workspaces of libraries and to gaps ({_RESERVE_GIB:g})",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as json, in bytes")
    parser.epilog = (
        "generate takes --size, --preset, --sink, --window, --guidance-scale, --dtype, --quantize and "
        "--offload; genstream convert FOLDER --vae taew2_1.safetensors -o NEW_FOLDER makes a model with "
        "TAEHV. In Python chunk and batch belong to a request."
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what the stream takes and what would take less."""
    for name, least in (("vram", 0), ("reserve", -1), ("batch", 0)):
        value = getattr(arguments, name)
        if value is not None and not least < value < math.inf:
            raise ValueError(f"{name} (--{name}) must be a number above {max(least, 0)}, got {value}")
    folder = find_model(arguments.model)
    from genstream.pipelines.memory import MemoryPlanner

    plan, planner = make_plan(arguments, folder), MemoryPlanner()
    estimate, reserve_bytes = planner.estimate(plan), int(arguments.reserve * _GIB)
    if arguments.json:
        found = planner.proposals(plan)
        print(json.dumps(_figures(estimate, reserve_bytes, found, arguments.vram), indent=2))
        return 0
    lines = [_title(arguments, plan), *_lines(estimate, reserve_bytes)]
    lines += _verdict(estimate, reserve_bytes, arguments.vram)
    if arguments.vram is None or estimate.peak_bytes + reserve_bytes > arguments.vram * _GIB:
        lines += _table(planner.proposals(plan), reserve_bytes, arguments.vram)
    print("\n".join(lines))
    return 0


def make_plan(arguments: argparse.Namespace, folder: Path) -> "StreamPlan":
    """What the command line asks for; the model's folder fills in the rest."""
    import torch

    from genstream.pipelines.memory import StreamPlan, TextEncoderOffload
    from genstream.pipelines.quantization import WeightFormat

    card = read_card(folder)
    width, height = arguments.size or (card.width, card.height)
    if width is None or height is None:
        raise ValueError(f"size must be given (--size): model {card.name!r} does not say its own")
    num_frames = None
    if arguments.seconds is not None:
        if card.fps is None:
            raise ValueError(f"--seconds needs a frame rate, which model {card.name!r} does not say")
        num_frames = frames_for_seconds(arguments.seconds, card.fps)
    engine, levels = _engine(arguments, folder)
    return StreamPlan(
        folder=folder,
        height=height,
        width=width,
        settings=_settings(arguments, folder),
        num_frames=num_frames,
        engine=engine,
        levels=levels,
        dtype=getattr(torch, arguments.dtype),
        weights=None if arguments.quantize is None else WeightFormat(arguments.quantize),
        offload=TextEncoderOffload(arguments.offload),
        tiny_vae=arguments.tiny_vae,
        batch_size=arguments.batch,
        transform=arguments.transform,
        loras=tuple(arguments.lora),
    )


def _settings(arguments: argparse.Namespace, folder: Path) -> StreamSettings:
    index = read_object(folder / INDEX_NAME)
    if arguments.preset is not None:
        settings = _preset(arguments.preset, folder, index, transform=arguments.transform).settings
    else:
        fields = dataclasses.fields(StreamSettings)
        values: dict[str, Any] = {field.name: index[field.name] for field in fields if field.name in index}
        settings = StreamSettings(**values)
    given = {name: getattr(arguments, name) for name in _SETTINGS if getattr(arguments, name) is not None}
    return dataclasses.replace(settings, **given)


def _preset(name: str, folder: Path, index: Mapping[str, Any], *, transform: bool) -> Preset:
    """The preset of that name, if the model can be run that way; `transform` tells of a video to follow."""
    from genstream.pipelines.memory import transformer_config

    preset = find_preset(name)
    if transform:
        preset.check_source(name)
    preset.check_scheduler(name, index["scheduler"][1])
    preset.check_chunk(name, index.get("chunk_frames", StreamSettings.chunk_frames))
    config = transformer_config(folder)
    preset.check_channels(name, config["in_channels"], config.get("out_channels", config["in_channels"]))
    return preset


def _engine(arguments: argparse.Namespace, folder: Path) -> tuple[EngineKind, int]:
    """What generates the chunks, and the noise levels of the schedule."""
    if arguments.preset is not None:
        preset = find_preset(arguments.preset)
        return preset.engine, len(preset.steps)
    steps = read_object(folder / "scheduler" / "scheduler_config.json").get("steps", ())
    return EngineKind(read_object(folder / INDEX_NAME).get("engine", "cache")), max(len(steps), 1)


def _title(arguments: argparse.Namespace, plan: "StreamPlan") -> str:
    settings = plan.settings
    kept = "all frames" if settings.window_frames is None else f"window {settings.window_frames}"
    return (
        f"{arguments.model}, {plan.width}x{plan.height}, {arguments.dtype}; latent frames: "
        f"chunk {settings.chunk_frames}, sinks {settings.sink_frames}, {kept}"
    )


def _lines(estimate: "MemoryEstimate", reserve_bytes: int) -> Iterator[str]:
    rows = (
        ("weights", "transformer", estimate.transformer_bytes),
        ("", "LoRA", estimate.lora_bytes),
        ("", "VAE", estimate.vae_bytes),
        ("", "text encoder", estimate.text_encoder_bytes),
        ("", "image encoder", estimate.image_encoder_bytes),
        ("stream", "KV cache", estimate.kv_cache_bytes),
        ("", "text cache", estimate.text_cache_bytes),
        ("", "VAE state", estimate.vae_state_bytes),
        ("", "video to follow", estimate.intake_bytes),
        ("for a while", "denoise a chunk", estimate.denoise_bytes),
        ("", "decode a chunk", estimate.decode_bytes),
        ("", "encode a chunk", estimate.intake_pass_bytes),
        ("", "encode a new prompt", estimate.encode_bytes),
        ("", "rebuild the cache with it", estimate.recache_bytes),
        ("kept free", "", reserve_bytes),
        ("most at once", "one prompt", estimate.streaming_bytes + reserve_bytes),
        ("", "prompts that change", estimate.peak_bytes + reserve_bytes),
    )
    for group, name, size_bytes in rows:
        if not size_bytes:
            continue
        yield f"  {group:<13}{name:<27}{gpu_memory(size_bytes):>11}"


def _verdict(estimate: "MemoryEstimate", reserve_bytes: int, vram: float | None) -> Iterator[str]:
    """Whether it fits into `vram` GiB."""
    if vram is None:
        return
    free_bytes = vram * _GIB - estimate.peak_bytes - reserve_bytes
    if free_bytes >= 0:
        yield f"It fits into {vram:g} GiB: {gpu_memory(free_bytes)} to spare."
    else:
        yield f"It does not fit into {vram:g} GiB: {gpu_memory(-free_bytes)} too much."


def _table(found: list["Proposal"], reserve_bytes: int, vram: float | None) -> Iterator[str]:
    """What would take less, alone and together with what stands above."""
    enough_bytes = -1.0 if vram is None else vram * _GIB

    def cell(size_bytes: int) -> str:
        return f"{gpu_memory(size_bytes)} {'*' if size_bytes <= enough_bytes else ' '}"

    if found:
        fitting = "" if vram is None else "  (* fits)"
        yield f"Less would take{'alone':>26}{'and all above':>16}{fitting}"
    for proposal in found:
        alone, together = proposal.peak_bytes + reserve_bytes, proposal.together_bytes + reserve_bytes
        yield f"  {proposal.option:<25}{cell(alone):>14}{cell(together):>16}".rstrip()
    if vram is not None and all(proposal.together_bytes + reserve_bytes > enough_bytes for proposal in found):
        yield "None of it is enough."


def _figures(
    estimate: "MemoryEstimate", reserve_bytes: int, found: list["Proposal"], vram: float | None
) -> dict[str, object]:
    """In bytes; what `fits` is told where the memory of the card is known."""

    def verdict(name: str, size_bytes: int) -> dict[str, bool]:
        return {} if vram is None else {name: size_bytes + reserve_bytes <= vram * _GIB}

    return {
        **dataclasses.asdict(estimate),
        "reserve_bytes": reserve_bytes,
        "streaming_bytes": estimate.streaming_bytes + reserve_bytes,
        "peak_bytes": estimate.peak_bytes + reserve_bytes,
        **verdict("fits", estimate.peak_bytes),
        "proposals": [
            {
                "option": proposal.option,
                "peak_bytes": proposal.peak_bytes + reserve_bytes,
                "together_bytes": proposal.together_bytes + reserve_bytes,
                **verdict("fits", proposal.peak_bytes),
                **verdict("together_fits", proposal.together_bytes),
            }
            for proposal in found
        ],
    }
