"""`genstream convert`: published weights to a model folder that genstream loads, or to diffusers' Wan."""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from genstream.streaming.presets import PRESETS

if TYPE_CHECKING:
    from genstream.cli.conversion import Conversion

_DESCRIPTION = """\
SOURCE is one of
  a torch file (.pt, .pth) of Self Forcing, CausVid, LongLive, Rolling Forcing and their relatives,
    read as data in a process of its own: it cannot run code
  a safetensors file, or the folder of its shards, of Wan 2.1 or such a student
  a folder of diffusers' WanTransformer3DModel, or a whole pipeline, whose other parts are taken over
  a folder that this command made, to add parts or to turn it into diffusers' format

Every tensor is accounted for. What was taken, decided and left out is printed, and written into the card."""
_GIGA = 1e9


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "convert",
        help="turn published weights into a model folder",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="file or folder, see above")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="new folder")
    parser.add_argument(
        "--to",
        dest="kind",
        choices=("genstream", "diffusers"),
        default="genstream",
        help="format (genstream)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(as in the source)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="size of a weight file in GB (5)")
    parser.add_argument("--license", metavar="NAME", help="of the weights (what stands beside the source)")
    parser.add_argument("--json", action="store_true", help="print json in place of the notes")
    _add_transformer_options(parser)
    _add_part_options(parser)
    parser.set_defaults(run=run)


def _add_transformer_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("transformer")
    group.add_argument(
        "--weights",
        metavar="NAME",
        help="which of the weights in a torch file (generator_ema if it is there, else generator)",
    )
    group.add_argument(
        "--config", type=Path, metavar="FILE", help="json that describes it (config.json beside the source)"
    )
    group.add_argument("--heads", type=int, help="attention heads (width / 128, if no configuration tells)")
    group.add_argument("--lora", type=Path, metavar="FILE", help="LoRA weights to merge or to keep")
    group.add_argument("--lora-alpha", type=float, help="of a LoRA that does not tell, 256 for LongLive")
    group.add_argument("--lora-mode", choices=("merge", "adapter"), default="merge", help="(merge)")
    group.add_argument(
        "--preset", metavar="NAME", help=f"how it streams: {', '.join(PRESETS)} (self-forcing)"
    )


def _add_part_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("other parts, by default what SOURCE holds besides the transformer")
    group.add_argument(
        "--text-encoder",
        type=Path,
        metavar="PATH",
        help="a diffusers pipeline or component folder, the folder of Wan 2.1, or its models_t5*.pth",
    )
    group.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="(beside the text encoder; google/umt5-xxl of Wan)"
    )
    group.add_argument(
        "--vae",
        type=Path,
        metavar="PATH",
        help="a diffusers or genstream folder, or a file such as Wan2.1_VAE.pth or taew2_1.safetensors",
    )
    group.add_argument(
        "--image-encoder",
        type=Path,
        metavar="PATH",
        help="CLIP for image-to-video models: a diffusers pipeline or component folder, or the "
        "models_clip*.pth of Wan 2.1",
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert, and say what was done."""
    start_s = time.perf_counter()
    from genstream.cli.conversion import ConversionSettings, convert

    names = [field.name for field in dataclasses.fields(ConversionSettings)]
    conversion = convert(ConversionSettings(**{name: getattr(arguments, name) for name in names}))
    elapsed_s = time.perf_counter() - start_s
    print(_as_json(conversion, elapsed_s) if arguments.json else _as_text(conversion, elapsed_s))
    return 0


def _as_text(conversion: "Conversion", elapsed_s: float) -> str:
    size = f"{conversion.tensors} tensors, {conversion.size_bytes / _GIGA:.2f} GB"
    return "\n".join([*conversion.notes, f"wrote {conversion.folder}: {size}, {elapsed_s:.1f} s"])


def _as_json(conversion: "Conversion", elapsed_s: float) -> str:
    content = {**dataclasses.asdict(conversion), "folder": str(conversion.folder), "elapsed_s": elapsed_s}
    return json.dumps(content)
