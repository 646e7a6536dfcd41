"""Turbo-VAED against numbers its own code produced. Sets and cases are found, not listed."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genstream.vae.turbo_weights import load_turbo_vaed

ATOL = 1e-4
VARIANTS = {"dec_dcae": {"is_video_dc_ae": True}, "dec_causalflag": {"decoder_causal": True}}


def parity_folder() -> Path:
    beside_checkout = Path(__file__).resolve().parents[4] / "shared" / "parity"
    return Path(os.environ.get("GENSTREAM_PARITY_DIR", beside_checkout))


def parity_cases() -> list[tuple[str, str]]:
    """Every output of every set."""
    return [
        (path.name.removesuffix(".io.json"), name)
        for path in sorted(parity_folder().glob("turbovaed_*.io.json"))
        for name in json.loads(path.read_text())["tensors"]
        if not name.endswith(".z")
    ]


if not parity_cases():
    pytest.skip("no parity folder: set GENSTREAM_PARITY_DIR", allow_module_level=True)


@pytest.mark.parametrize("name", sorted({name for name, _ in parity_cases()}))
def test_variant_is_read_off_the_tensors(name):
    ctor = json.loads((parity_folder() / f"{name}.io.json").read_text())["ctor"]
    config = load_turbo_vaed(parity_folder() / f"{name}.weights.safetensors").config
    known = {key: value for key, value in ctor.items() if key in config}
    assert {key: config[key] for key in known} == known


@pytest.mark.parametrize(("name", "case"), parity_cases())
def test_decode(name, case):
    data = load_file(parity_folder() / f"{name}.io.safetensors")
    group, _, output = case.partition(".")
    variant = VARIANTS.get(group, {})
    vae = load_turbo_vaed(parity_folder() / f"{name}.weights.safetensors", **variant)
    vae.requires_grad_(requires_grad=False)
    outputs = {}
    for layer, module in {
        "mid_block": vae.decoder.mid_block,
        **{f"up_block_{index}": block for index, block in enumerate(vae.decoder.up_blocks)},
    }.items():
        module.register_forward_hook(
            lambda module, inputs, value, layer=layer: outputs.update({f"feature.{layer}": value})
        )
    outputs["y"] = vae.decode_unclamped(data.get(f"{group}.z", data["dec.z"]))
    torch.testing.assert_close(outputs[output], data[case], rtol=0, atol=ATOL)
