"""The published architecture, against numbers its own code produced. Sets are found, not listed."""

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genstream.vae.taehv import load_taehv
from genstream.vae.tiny import TinyVideoVAE

ENCODE_ATOL = 3e-5
DECODE_ATOL = 1e-5
STATE_ATOL = 3e-5
OFF = (1, 1, 1)


def parity_folder() -> Path:
    beside_checkout = Path(__file__).resolve().parents[4] / "shared" / "parity"
    return Path(os.environ.get("GENSTREAM_PARITY_DIR", beside_checkout))


def parity_sets() -> list[str]:
    return sorted(path.name.removesuffix(".io.json") for path in parity_folder().glob("taehv_*.io.json"))


def hashed_weights(salt: int, gain: float) -> dict[str, torch.Tensor]:
    """Weights at the official widths, made from their names and shapes."""
    spec = importlib.util.spec_from_file_location("hash_weights", parity_folder() / "hash_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    weights = module.hash_state_dict(TinyVideoVAE().state_dict(), salt, gain)
    weights["decoder.22.weight"] *= 2**-6
    weights["decoder.22.bias"] += 0.5
    return weights


@dataclass
class Case:
    info: dict
    weights: dict[str, torch.Tensor]
    data: dict[str, torch.Tensor]
    vae: TinyVideoVAE


def load_case(name: str) -> Case:
    info = json.loads((parity_folder() / f"{name}.io.json").read_text())
    path = parity_folder() / f"{name}.weights.safetensors"
    weights = load_file(path) if path.is_file() else hashed_weights(info["salt"], info["gain"])
    data = load_file(parity_folder() / f"{name}.io.safetensors")
    return Case(info, weights, data, load_taehv(weights).requires_grad_(requires_grad=False))


if not parity_sets():
    pytest.skip("no parity folder: set GENSTREAM_PARITY_DIR", allow_module_level=True)


@pytest.fixture(params=parity_sets(), scope="module")
def case(request):
    return load_case(request.param)


def to_library(video: torch.Tensor) -> torch.Tensor:
    return video.transpose(1, 2)  # [N, T, C, H, W] -> [B, C, T, H, W]


def assert_frames(frames: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close((frames + 1) / 2, to_library(expected), rtol=0, atol=DECODE_ATOL)


def decode_reduced(case: Case, **strides) -> torch.Tensor:
    return (
        load_taehv(case.weights, **strides)
        .requires_grad_(requires_grad=False)
        .decode(to_library(case.data["dec.z"]))
    )


def test_variant_is_read_off_the_tensors(case):
    spec = case.vae.spec
    assert spec.temporal_ratio == case.info["t_upscale"] == case.info["t_downscale"]
    assert spec.spatial_ratio == case.info["spatial_compression"]
    assert spec.latent_channels == case.info["latent_channels"]


@pytest.mark.parametrize(
    "frames, latents",
    [("enc.x", "enc.y_parallel"), ("enc.x", "enc.y_sequential"), ("enc_odd.x", "enc_odd.y")],
)
def test_encode(case, frames, latents):
    if latents not in case.data:
        pytest.skip(f"the set holds no {latents}")
    result = case.vae.encode(to_library(case.data[frames]) * 2 - 1)
    torch.testing.assert_close(result, to_library(case.data[latents]), rtol=0, atol=ENCODE_ATOL)


@pytest.mark.parametrize(
    "latents, frames", [("dec.z", "dec.y_parallel"), ("dec.z", "dec.y_sequential"), ("dec1.z", "dec1.y")]
)
def test_decode(case, latents, frames):
    if frames not in case.data:
        pytest.skip(f"the set holds no {frames}")
    assert_frames(case.vae.decode(to_library(case.data[latents])), case.data[frames])


@pytest.mark.parametrize("chunk", [1, 3])
def test_streams(case, chunk):
    vae, data = case.vae, case.data
    frames, latents = to_library(data["enc.x"]) * 2 - 1, to_library(data["dec.z"])
    state = vae.init_state("encode", frames.shape[0], *frames.shape[3:])
    encoded = torch.cat([vae.encode_chunk(part, state) for part in frames.split(chunk, dim=2)], dim=2)
    torch.testing.assert_close(encoded, to_library(data["enc.y_stream"]), rtol=0, atol=ENCODE_ATOL)
    state = vae.init_state("decode", frames.shape[0], *frames.shape[3:])
    decoded = torch.cat([vae.decode_chunk(part, state) for part in latents.split(chunk, dim=2)], dim=2)
    assert_frames(decoded, data["dec.y_stream"])


def test_remembers_what_the_reference_remembers(case):
    prefix = "dec.state_after_2_latents.block"
    remembered = {name: value for name, value in case.data.items() if name.startswith(prefix)}
    if not remembered:
        pytest.skip("the set holds no states")
    # Memories are large numbers: in float64 the stored ones are the only that are rounded.
    vae = load_taehv(case.weights).requires_grad_(requires_grad=False).double()
    latents = to_library(case.data["dec.z"]).double()
    state = vae.init_state("decode", latents.shape[0], *case.data["dec.y_parallel"].shape[3:])
    vae.decode_chunk(latents[:, :, :2], state)
    assert len(remembered) == len(state.slots)
    for name, value in remembered.items():
        slot = state.slots[name.removeprefix(prefix).removesuffix(".past")]
        torch.testing.assert_close(slot.float(), value, rtol=0, atol=STATE_ATOL)


def test_reduced_in_time(case):
    assert_frames(decode_reduced(case, decoder_temporal_strides=OFF), case.data["dec_notime.y"])


def test_reduced_in_space(case):
    if "dec_nospace.y" not in case.data:
        with pytest.raises(ValueError, match=r"decoder.4.weight must be \["):
            load_taehv(case.weights, decoder_spatial_strides=OFF)
        return
    assert_frames(decode_reduced(case, decoder_spatial_strides=OFF), case.data["dec_nospace.y"])
    both = decode_reduced(case, decoder_temporal_strides=OFF, decoder_spatial_strides=OFF)
    assert_frames(both, case.data["dec_notime_nospace.y"])
