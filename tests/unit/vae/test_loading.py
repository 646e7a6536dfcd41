import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from genstream.vae.adapters.base import Adapter
from genstream.vae.causal import CausalVideoVAE
from genstream.vae.loading import load_vae
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.turbo import TurboVAED
from genstream.vae.wan import WanVideoVAE

TINY = {"latent_channels": 4, "encoder_width": 8, "decoder_widths": (8, 8, 8, 8), "latents_std": [2.0] * 4}
SMALL = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
VAES = {
    "tiny": (TinyVideoVAE, TINY),
    "causal": (
        CausalVideoVAE,
        SMALL
        | {
            "temporal_levels": (True,),
            "encoder_temporal_kernels": (1, 3),
            "decoder_temporal_kernels": (1, 3),
        },
    ),
    "turbo": (
        TurboVAED,
        {
            "latent_channels": 4,
            "decoder_block_out_channels": (8, 8),
            "decoder_layers_per_block": (1, 1, 1),
            "decoder_is_dw_conv": (False, True, True),
            "spatio_temporal_scaling": (True, False),
            "decoder_spatio_only": (False, False),
        },
    ),
    "wan": (
        WanVideoVAE,
        {
            "latent_channels": 4,
            "encoder_widths": (4, 4, 4, 4, 4),
            "decoder_widths": (4, 4, 4, 4, 4),
            "latents_mean": [0.5] * 4,
            "latents_std": [2.0] * 4,
        },
    ),
    "image": (
        diffusers.AutoencoderKL,
        SMALL | {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
    ),
}


def build(name):
    torch.manual_seed(0)
    kind, config = VAES[name]
    return kind(**config).eval()


def tiny_folder(tmp_path):
    build("tiny").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", VAES)
def test_what_was_saved_is_loaded(name, tmp_path):
    vae = build(name)
    vae.save_pretrained(tmp_path)
    loaded = load_vae(tmp_path)
    module = loaded.vae if isinstance(loaded, Adapter) else loaded
    assert type(module) is type(vae)
    assert not module.training
    assert loaded.spec.latent_channels == 4
    for weight_name, weight in vae.state_dict().items():
        assert torch.equal(module.state_dict()[weight_name], weight)


@torch.no_grad()
def test_weights_in_half_precision_are_used_in_the_one_asked_for(tmp_path):
    build("tiny").half().save_pretrained(tmp_path)
    vae = load_vae(tmp_path, torch.float64)
    frames = vae.decode(torch.zeros(1, 4, 2, 2, 2, dtype=torch.float64))
    assert (frames.dtype, list(frames.shape)) == (torch.float64, [1, 3, 5, 16, 16])


@torch.no_grad()
@pytest.mark.parametrize("name", VAES)
def test_every_kind_works_in_half_precision(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    vae = load_vae(tmp_path, torch.bfloat16)
    ratio = vae.spec.spatial_ratio
    latents = torch.zeros(1, 4, 2, 2, 2, dtype=torch.bfloat16)
    assert vae.decode(latents).dtype == torch.bfloat16
    if name != "turbo":
        frames = torch.zeros(1, 3, 1 + vae.spec.temporal_ratio, 2 * ratio, 2 * ratio, dtype=torch.bfloat16)
        assert vae.encode(frames).dtype == torch.bfloat16


def test_a_folder_without_configuration_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"must hold a VAE, in config.json or vae/config.json, got .*nothing"
    ):
        load_vae(tmp_path / "nothing")


def test_weights_of_another_format_are_named(tmp_path):
    build("tiny").save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match=r"got \['diffusion_pytorch_model.fp16.safetensors'\] in .* renamed"):
        load_vae(tmp_path)
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold .*\.safetensors, got no weights"):
        load_vae(tmp_path)


def test_a_file_is_told_from_a_folder(tmp_path):
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"got the file .*Wan2.1_VAE.pth': published weight files are for"):
        load_vae(tmp_path / "Wan2.1_VAE.pth")


def test_the_vae_of_an_installed_model_goes_by_its_name():
    assert load_vae("toyworld").spec.spatial_ratio == 16


def test_the_vae_of_a_model_or_a_run_is_found(tmp_path):
    build("tiny").save_pretrained(tmp_path / "vae")
    found = load_vae(tmp_path).state_dict()
    assert all(
        torch.equal(weight, found[name]) for name, weight in load_vae(tmp_path / "vae").state_dict().items()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype must be a floating-point torch.dtype, got 'float16'"),
        ({"dtype": torch.int32}, "dtype must be a floating-point torch.dtype, got torch.int32"),
        ({"device": "gpu"}, "device must be one of this machine, got 'gpu'"),
        ({"device": "meta"}, "device must be one of this machine, got 'meta'"),
    ],
)
def test_what_weights_cannot_be_loaded_to_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_vae(tiny_folder(tmp_path), **options)


@pytest.mark.parametrize("name", ["AutoencoderOfNobody", "UNet2DModel", None])
def test_a_class_that_is_no_vae_is_refused(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=f"_class_name.*{name}"):
        load_vae(tmp_path)


def test_a_configuration_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid json"):
        load_vae(tmp_path)


def test_missing_weights_are_named(tmp_path):
    path = tiny_folder(tmp_path) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.0.bias"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 missing \['encoder.0.bias'\]"):
        load_vae(tmp_path)


def test_weights_of_another_configuration_are_named(tmp_path):
    path = tiny_folder(tmp_path) / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "encoder.99.bias": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"0 missing \[\], 1 unexpected \['encoder.99.bias'\]"):
        load_vae(tmp_path)


def test_weights_that_are_cut_off_are_refused(tmp_path):
    path = tiny_folder(tmp_path) / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        load_vae(tmp_path)
