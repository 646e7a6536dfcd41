"""Video VAEs small enough to be built for every test, in float64; their pictures mean nothing."""

import logging
from collections.abc import Sequence
from functools import cache

import diffusers
import torch

from genstream.vae.adapters import stream_vae
from genstream.vae.adapters.base import Adapter
from genstream.vae.causal import CausalVideoVAE
from genstream.vae.protocol import StreamingVAE
from genstream.vae.tiling import TiledVAE, Tiling
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.turbo import TurboVAED
from genstream.vae.wan import WanVideoVAE

CHANNELS = 4

STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 2.0, 1.0, 1.5]}
COSMOS_MEAN = torch.linspace(-0.3, 0.3, 4 * 3).tolist()
COSMOS_STD = torch.linspace(0.5, 1.5, 4 * 3).tolist()
WAN = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, **STATISTICS}
SMALL = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
LTX = {
    "latent_channels": 4,
    "block_out_channels": (4, 4, 8, 8),
    "decoder_block_out_channels": (4, 4, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "patch_size": 2,
}
LTX_NEW = {
    "latent_channels": 4,
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_block_out_channels": (16, 32, 64),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "patch_size": 2,
    "decoder_causal": True,
    "spatial_compression_ratio": 16,
    "temporal_compression_ratio": 8,
}
ADAPTED = {
    "wan21": (diffusers.AutoencoderKLWan, WAN),
    "wan22": (
        diffusers.AutoencoderKLWan,
        WAN
        | {
            "decoder_base_dim": 6,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        },
    ),
    "qwen_image": (diffusers.AutoencoderKLQwenImage, WAN),
    "cogvideox": (
        diffusers.AutoencoderKLCogVideoX,
        {
            "block_out_channels": (2, 2, 4, 4),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
    ),
    "kvae": (
        diffusers.AutoencoderKLKVAEVideo,
        {"ch": 32, "ch_mult": (1, 1, 1), "num_res_blocks": 1, "z_channels": 4},
    ),
    "magvit": (
        diffusers.AutoencoderKLMagvit,
        {
            "latent_channels": 4,
            "block_out_channels": [4, 4, 4, 4],
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
    ),
    "mochi": (
        diffusers.AutoencoderKLMochi,
        {
            "encoder_block_out_channels": (32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32),
            "latent_channels": 4,
            "layers_per_block": (1, 1, 1, 1),
            "temporal_expansions": (2, 3),
            "spatial_expansions": (2, 2),
            "add_attention_block": (False, True, True, True),
            **STATISTICS,
        },
    ),
    "ltx": (diffusers.AutoencoderKLLTXVideo, LTX | {"decoder_causal": True}),
    "ltx_conditioned": (
        diffusers.AutoencoderKLLTXVideo,
        LTX_NEW
        | {
            "block_out_channels": (4, 8, 8, 8, 8),
            "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
            "spatio_temporal_scaling": (True,) * 4,
            "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
            "decoder_spatio_temporal_scaling": (True, True, True),
            "decoder_inject_noise": (False,) * 4,
            "upsample_residual": (True,) * 3,
            "upsample_factor": (2, 2, 2),
            "timestep_conditioning": True,
        },
    ),
    "ltx2": (diffusers.AutoencoderKLLTX2Video, LTX_NEW | {"block_out_channels": (4, 8, 8, 8)}),
    "cosmos": (
        diffusers.AutoencoderKLCosmos,
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (4, 4, 8, 8),
            "decode_block_out_channels": (4, 4, 8, 8),
            "attention_resolutions": (8,),
            "resolution": 32,
            "num_layers": 1,
            "patch_size": 2,
            "latents_mean": COSMOS_MEAN,
            "latents_std": COSMOS_STD,
            "temporal_compression_ratio": 4,
        },
    ),
    "hunyuan15": (
        diffusers.AutoencoderKLHunyuanVideo15,
        {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8, 8), "layers_per_block": 1},
    ),
    "ltx_released": (diffusers.AutoencoderKLLTXVideo, LTX),
    "hunyuan": (
        diffusers.AutoencoderKLHunyuanVideo,
        {
            "latent_channels": 4,
            "block_out_channels": (4, 4, 4, 4),
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
    ),
    "kl": (
        diffusers.AutoencoderKL,
        {
            "block_out_channels": (4, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 2,
            "shift_factor": 0.1,
        },
    ),
    "tiny": (
        diffusers.AutoencoderTiny,
        {
            "encoder_block_out_channels": (4, 4, 4),
            "decoder_block_out_channels": (4, 4, 4),
            "num_encoder_blocks": (1, 1, 1),
            "num_decoder_blocks": (1, 1, 1),
        },
    ),
}
CLAMPING = ["wan21", "wan22", "qwen_image"]
# These compute their norms or Fourier features in float32, so rounding stays in float64 too.
SINGLE_PRECISION = ["ltx", "ltx_conditioned", "ltx_released", "mochi"]


@cache
def model(name: str) -> diffusers.ModelMixin:
    """The diffusers model in float64; one for all tests, because adapters must never change it."""
    torch.manual_seed(0)
    kind, config = ADAPTED[name]
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    vae = kind(**config).double().eval().requires_grad_(requires_grad=False)
    if name in CLAMPING:
        vae.decoder.conv_out.weight.mul_(0.1)
    if "latents_mean" in dict(vae.named_buffers()):
        vae.latents_mean.copy_(torch.tensor(STATISTICS["latents_mean"]))
        vae.latents_std.copy_(torch.tensor(STATISTICS["latents_std"]))
    return vae


@cache
def adapter(name: str) -> Adapter:
    return stream_vae(model(name))


WIDTHS = {"encoder_widths": (4, 4, 8, 8, 8), "decoder_widths": (8, 8, 8, 6, 4)}
CAUSAL = {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
TURBO = {
    "decoder_block_out_channels": (4, 4, 6, 6),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "decoder_spatio_only": (True, False, False, False),
    "decoder_dw_kernel_size": 3,
}
# Narrower ones can come out with all their rectifiers closed.
TINY = {"encoder_width": 8, "decoder_widths": (12, 10, 8, 8)}
OWN = {
    "tiny_video": (TinyVideoVAE, TINY | {"patch_size": 2, "first_frame_copies": 3}),
    "tiny_still": (
        TinyVideoVAE,
        TINY | {"first_frame_copies": 3, "encoder_start": "still", "decoder_blocks": (1, 3, 2)},
    ),
    "tiny_folding": (
        TinyVideoVAE,
        TINY | {"first_frame_copies": 3, "decoder_spatial_strides": (2, 2, 1), "decoder_patch_size": 2},
    ),
    "taehv": (TinyVideoVAE, TINY),
    "taehv_super": (TinyVideoVAE, TINY | {"decoder_block": "super"}),
    "taehv_wide": (TinyVideoVAE, TINY | {"encoder_block": "wide", "decoder_block": "wide"}),
    "wan2.1": (WanVideoVAE, WIDTHS),
    "wan2.2": (WanVideoVAE, WIDTHS | {"version": "2.2", "patch_size": 2}),
    "causal": (CausalVideoVAE, CAUSAL),
    # The root mean square of fewer channels comes near zero at some pixels and magnifies their rounding.
    "causal_channel": (
        CausalVideoVAE,
        CAUSAL | {"norm": "channel", "latents": "deterministic", "block_out_channels": (8, 8, 8, 8)},
    ),
    "turbo": (TurboVAED, TURBO | {"decoder_causal": True, "depthwise_causal": True}),
    "turbo_windows": (TurboVAED, TURBO | {"context_latents": 2, "chunk_latents": 2, "lookahead_latents": 1}),
    "tiled": (TinyVideoVAE, TINY | {"patch_size": 2, "first_frame_copies": 3}),
}
DECODERS = ["turbo", "turbo_windows"]
NOT_CAUSAL = ["turbo_windows"]


def own_vae(name: str, mean: Sequence[float], std: Sequence[float]) -> StreamingVAE:
    """One of this library's VAEs, in float64; the same weights for any statistics of its latents."""
    torch.manual_seed(0)
    kind, config = OWN[name]
    statistics = {} if kind is TurboVAED else {"latents_mean": list(mean), "latents_std": list(std)}
    vae = kind(latent_channels=CHANNELS, **config, **statistics).double().eval()
    vae.requires_grad_(requires_grad=False)
    if kind is TurboVAED:
        vae.latents_mean.copy_(torch.tensor(mean))
        vae.latents_std.copy_(torch.tensor(std))
    if kind is CausalVideoVAE:
        # Its blends start as ones that pass a frame on, which would hide mistakes in their memory.
        for weight in vae.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return TiledVAE(vae, Tiling(height_px=32, width_px=32, overlap_px=16)) if name == "tiled" else vae


@cache
def small_vae(name: str) -> StreamingVAE:
    """Any VAE of `OWN` or `ADAPTED` in float64."""
    if name in ADAPTED:
        return adapter(name)
    return own_vae(name, STATISTICS["latents_mean"], STATISTICS["latents_std"])
