"""The published architecture, against numbers its own code produced. Sets are found, not listed."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genstream.vae.tiny import TinyVideoVAE

ENCODE_ATOL = 3e-5
DECODE_ATOL = 1e-5


def parity_folder() -> Path:
    beside_checkout = Path(__file__).resolve().parents[4] / "shared" / "parity"
    return Path(os.environ.get("GENSTREAM_PARITY_DIR", beside_checkout))


def parity_sets() -> list[str]:
    """Names of the base-variant sets that come with weights."""
    names = []
    for path in sorted(parity_folder().glob("taehv_*.io.json")):
        name = path.name.removesuffix(".io.json")
        variant = json.loads(path.read_text()).get("ctor", {}).get("arch_variant", "base")
        if variant == "base" and (parity_folder() / f"{name}.weights.safetensors").is_file():
            names.append(name)
    return names


def load_vae(name: str) -> TinyVideoVAE:
    ctor = json.loads((parity_folder() / f"{name}.io.json").read_text())["ctor"]
    encoder_strides = [2 if down else 1 for down in ctor.get("encoder_time_downscale", (True, True, False))]
    decoder_strides = [2 if up else 1 for up in ctor.get("decoder_time_upscale", (False, True, True))]
    vae = TinyVideoVAE(
        latent_channels=ctor["latent_channels"],
        patch_size=ctor["patch_size"],
        encoder_width=ctor["enc_w"],
        decoder_widths=ctor["dec_w"],
        encoder_temporal_strides=encoder_strides,
        decoder_temporal_strides=decoder_strides,
    )
    vae.load_state_dict(load_file(parity_folder() / f"{name}.weights.safetensors"))
    return vae.eval().requires_grad_(requires_grad=False)


if not parity_sets():
    pytest.skip("no parity folder: set GENSTREAM_PARITY_DIR", allow_module_level=True)


@pytest.fixture(params=parity_sets(), scope="module")
def case(request):
    return load_vae(request.param), load_file(parity_folder() / f"{request.param}.io.safetensors")


def to_library(video: torch.Tensor) -> torch.Tensor:
    return video.transpose(1, 2)  # [N, T, C, H, W] -> [B, C, T, H, W]


@pytest.mark.parametrize("frames, latents", [("enc.x", "enc.y_parallel"), ("enc_odd.x", "enc_odd.y")])
def test_encode(case, frames, latents):
    vae, data = case
    result = vae.encode(to_library(data[frames]) * 2 - 1)
    torch.testing.assert_close(result, to_library(data[latents]), rtol=0, atol=ENCODE_ATOL)


@pytest.mark.parametrize("latents, frames", [("dec.z", "dec.y_parallel"), ("dec1.z", "dec1.y")])
def test_decode(case, latents, frames):
    vae, data = case
    result = (vae.decode(to_library(data[latents])) + 1) / 2
    torch.testing.assert_close(result, to_library(data[frames]), rtol=0, atol=DECODE_ATOL)


def test_streams(case):
    vae, data = case
    frames, latents = to_library(data["enc.x"]) * 2 - 1, to_library(data["dec.z"])
    state = vae.init_state("encode", frames.shape[0], *frames.shape[3:])
    encoded = torch.cat([vae.encode_chunk(frame, state) for frame in frames.split(1, dim=2)], dim=2)
    torch.testing.assert_close(encoded, to_library(data["enc.y_stream"]), rtol=0, atol=ENCODE_ATOL)
    state = vae.init_state("decode", frames.shape[0], *frames.shape[3:])
    decoded = torch.cat([vae.decode_chunk(latent, state) for latent in latents.split(1, dim=2)], dim=2)
    expected = to_library(data["dec.y_stream"])
    torch.testing.assert_close((decoded + 1) / 2, expected, rtol=0, atol=DECODE_ATOL)
