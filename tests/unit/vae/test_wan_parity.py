"""The Wan VAEs against numbers their original code produced. Sets are found, not listed."""

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genstream.vae.wan import WanVideoVAE
from genstream.vae.wan_weights import load_wan_vae

ATOL = 1e-5


def parity_folder() -> Path:
    beside_checkout = Path(__file__).resolve().parents[4] / "shared" / "parity"
    return Path(os.environ.get("GENSTREAM_PARITY_DIR", beside_checkout))


def parity_sets() -> list:
    """Sets without weights are of the released size."""
    sets = []
    for path in sorted(parity_folder().glob("wan2*.io.json")):
        name = path.name.removesuffix(".io.json")
        has_weights = (parity_folder() / f"{name}.weights_encoder.safetensors").is_file()
        sets.append(pytest.param(name, marks=[] if has_weights else [pytest.mark.slow]))
    return sets


def hashed_weights(salt: int, gain: float) -> dict[str, torch.Tensor]:
    """Weights of Wan 2.1's released size, made from their names and shapes."""
    spec = importlib.util.spec_from_file_location("hash_weights", parity_folder() / "hash_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.device("meta"):
        shapes = WanVideoVAE().state_dict()
    weights = module.hash_state_dict(shapes, salt, gain)
    weights["decoder.head.2.weight"] *= 0.5
    return weights


@dataclass
class Case:
    info: dict
    weights: dict[str, torch.Tensor]
    data: dict[str, torch.Tensor]
    vae: WanVideoVAE


def load_case(name: str) -> Case:
    info = json.loads((parity_folder() / f"{name}.io.json").read_text())
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(parity_folder().glob(f"{name}.weights_*.safetensors")):
        weights |= load_file(path)
    weights = weights or hashed_weights(info["salt"], info["gain"])
    data = load_file(parity_folder() / f"{name}.io.safetensors")
    return Case(info, weights, data, load_wan_vae(weights).requires_grad_(requires_grad=False))


if not parity_sets():
    pytest.skip("no parity folder: set GENSTREAM_PARITY_DIR", allow_module_level=True)


@pytest.fixture(params=parity_sets(), scope="module")
def case(request):
    return load_case(request.param)


def assert_equals(result: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(result, expected, rtol=0, atol=ATOL)


def encode_raw(case: Case, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of what is complete; the rest waits in the state."""
    state = case.vae.init_state("encode", frames.shape[0], *frames.shape[3:])
    mean, log_variance = case.vae.encode_chunk_moments(frames, state).chunk(2, dim=1)
    return mean, log_variance


def test_statistics_are_the_published_ones(case):
    assert torch.equal(case.vae._latents_mean, torch.tensor(case.info["latents_mean"]))
    assert torch.equal(case.vae._latents_std, torch.tensor(case.info["latents_std"]))


@pytest.mark.parametrize("chunk_latents", [1, 3])
def test_encode(case, chunk_latents):
    assert_equals(case.vae.encode(case.data["enc.x"], chunk_latents), case.data["enc.mu_scaled"])


def test_encode_raw(case):
    mean, log_variance = encode_raw(case, case.data["enc.x"])
    assert_equals(mean, case.data["enc.mu_unscaled"])
    assert_equals(log_variance, case.data["enc.logvar_unscaled"])


@pytest.mark.parametrize("cut", ["enc_T1", "enc_T7"])
def test_encode_gives_only_whole_groups(case, cut):
    mean, _ = encode_raw(case, case.data[f"{cut}.x"])
    assert_equals(mean, case.data[f"{cut}.mu_unscaled"])


@pytest.mark.parametrize("chunk_latents", [1, 3])
def test_decode(case, chunk_latents):
    frames = case.vae.decode(case.data["dec.z"], chunk_latents)
    assert_equals(frames, case.data["dec.y_scaled_clamped"])


def test_decode_unclamped(case):
    state = case.vae.init_state("decode", 1, *case.data["dec.y_scaled"].shape[3:])
    assert_equals(case.vae.decode_chunk_unclamped(case.data["dec.z"], state), case.data["dec.y_scaled"])


def test_decode_one(case):
    z, expected = case.data["dec.z"][:, :, :1], case.data["dec_T1.y_scaled"]
    state = case.vae.init_state("decode", 1, *expected.shape[3:])
    assert_equals(case.vae.decode_chunk_unclamped(z, state), expected)


def test_decode_raw(case):
    raw = case.data["dec.z"] - case.vae._latents_mean.view(1, -1, 1, 1, 1)
    raw = raw / case.vae._latents_std.view(1, -1, 1, 1, 1)
    state = case.vae.init_state("decode", 1, *case.data["dec.y_scaled"].shape[3:])
    assert_equals(case.vae.decode_chunk_unclamped(raw, state), case.data["dec.y_unscaled"])


def test_remembers_what_the_reference_remembers(case):
    if "dec.cache_after_latent1.slot00" not in case.data:
        pytest.skip("the set holds no caches")
    state = case.vae.init_state("decode", 1, *case.data["dec.y_scaled"].shape[3:])
    case.vae.decode_chunk(case.data["dec.z"][:, :, :2], state)
    assert_slots(state.tensors(), case.data, "dec.cache_after_latent1.slot")
    state = case.vae.init_state("encode", 1, *case.data["enc.x"].shape[3:])
    case.vae.encode_chunk(case.data["enc.x"][:, :, :5], state)
    assert_slots(state.tensors(), case.data, "enc.cache_after_chunk1.slot")


def assert_slots(slots: dict[str, torch.Tensor], data: dict[str, torch.Tensor], prefix: str):
    """The reference numbers its caches in the order of the convolutions."""
    ours = list(slots.values())
    theirs = {name: value for name, value in data.items() if name.startswith(prefix)}
    for name, value in theirs.items():
        assert_equals(ours[int(name.removeprefix(prefix))], value)


def test_layers_give_what_those_of_the_reference_give(case):
    prefix = "dec.tap_latent1."
    taps = {name: value for name, value in case.data.items() if name.startswith(prefix)}
    if not taps:
        pytest.skip("the set holds no layers")
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str):
        # Convolutions put out what they remember, too.
        return lambda module, inputs, output: outputs.update(
            {name: output[0] if isinstance(output, tuple) else output}
        )

    layers = dict(case.vae.decoder.named_modules())
    hooks = [layers[name.removeprefix(prefix)].register_forward_hook(keep(name)) for name in taps]
    state = case.vae.init_state("decode", 1, *case.data["dec.y_scaled"].shape[3:])
    for latent in case.data["dec.z"][:, :, :2].split(1, dim=2):
        case.vae.decode_chunk(latent, state)
    for hook in hooks:
        hook.remove()
    for name, value in taps.items():
        torch.testing.assert_close(outputs[name], value, rtol=ATOL, atol=ATOL)
