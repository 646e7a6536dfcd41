"""Components small enough to be built for every test; their pictures mean nothing."""

import signal

import pytest
import torch

from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.training.text import tiny_text_encoder, word_tokenizer
from genstream.transformer.causal_dit import CausalDiT
from genstream.vae.tiny import TinyVideoVAE

# A shell that starts the tests in the background makes them deaf to Ctrl-C, and what they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = ("a", "red", "blue", "circle", "square", "moving", "right", "left")


def _build(*, layers=2, scheduler=None, weights_seed=0, vae=None, **settings) -> CausalVideoPipeline:
    torch.manual_seed(weights_seed)
    tokenizer = word_tokenizer(WORDS)
    encoder = tiny_text_encoder(len(tokenizer), width=16, layers=1).eval()
    transformer = CausalDiT(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
    )
    own_vae = TinyVideoVAE(
        latent_channels=4, encoder_width=8, decoder_widths=(8, 8, 8, 8), first_frame_copies=3
    )
    settings = {"sink_frames": 3, "window_frames": 3, "positions": "window", **settings}
    pipe = CausalVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        transformer=transformer.eval(),
        vae=own_vae.eval() if vae is None else vae,
        scheduler=scheduler or FewStepScheduler(steps=(1000.0, 500.0)),
        text_tokens=12,
        default_height=32,
        default_width=32,
        **settings,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def build_pipeline():
    """`build_pipeline(chunk_frames=..., ...)`: a pipeline of fresh random weights for 32x32 clips."""
    return _build


@pytest.fixture(scope="module")
def pipe():
    """A pipeline with one sink chunk and a window of one chunk, shared by the tests of a file."""
    return _build()


_NAMINGS = {
    "peft": ("base_model.model.", "lora_A", "lora_B"),
    "diffusers": ("transformer.", "lora_A", "lora_B"),
    "original": ("diffusion_model.", "lora_down", "lora_up"),
}
_WAN_LINEAR = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def _lora(transformer, *, naming="peft", seed=0, ranks=(2, 2), alpha=None) -> dict[str, torch.Tensor]:
    """Random LoRA tensors; block `i` has the rank `ranks[i]`."""
    generator = torch.Generator().manual_seed(seed)
    prefix, down, up = _NAMINGS[naming]
    tensors = {}
    for block, rank in enumerate(ranks):
        for ours, wan in _WAN_LINEAR.items():
            linear = transformer.blocks[block].get_submodule(ours)
            layer = f"{prefix}blocks.{block}.{ours if naming == 'diffusers' else wan}"
            shapes = {down: (rank, linear.in_features), up: (linear.out_features, rank)}
            for part, shape in shapes.items():
                tensors[f"{layer}.{part}.weight"] = torch.randn(shape, generator=generator) / 2
            if alpha is not None:
                tensors[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return tensors


@pytest.fixture(scope="session")
def build_lora():
    """`build_lora(transformer, naming=..., seed=...)`: tensors of a LoRA that changes pictures visibly."""
    return _lora
