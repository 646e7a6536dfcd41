"""Model folders of any size whose weight files hold no data: a header, and a hole as long as the weights."""

import json
import struct
from pathlib import Path

import torch
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from genstream.transformer.causal_dit import CausalDiT
from genstream.vae.wan import WanVideoVAE

UMT5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
INDEX = {
    "_class_name": "CausalVideoPipeline",
    "transformer": ["genstream", "CausalDiT"],
    "vae": ["genstream", "WanVideoVAE"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": [None, None],
    "scheduler": ["genstream", "FewStepScheduler"],
    "sink_frames": 3,
    "window_frames": 9,
    "text_tokens": 512,
    "default_height": 480,
    "default_width": 832,
}


def write_weights(path: Path, module: nn.Module, skipped: tuple[str, ...] = ()) -> None:
    """A bfloat16 safetensors file of the module's tensors, all of them zero and none of them on the disk."""
    header, end = {}, 0
    for name, tensor in module.state_dict().items():
        if name not in skipped:
            start, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write_wan(folder: Path, **transformer: object) -> Path:
    """A model of the published size, 1.3B unless `transformer` says otherwise, with its text encoder."""
    for name in ("transformer", "vae", "text_encoder", "scheduler"):
        (folder / name).mkdir(parents=True)
    with torch.device("meta"):
        parts = {"transformer": CausalDiT(**transformer), "vae": WanVideoVAE()}
        config = UMT5Config(**UMT5_XXL, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        encoder = UMT5EncoderModel(config)
    for name, part in parts.items():
        part.save_config(folder / name)
        write_weights(folder / name / "diffusion_pytorch_model.safetensors", part)
    config.save_pretrained(folder / "text_encoder")
    write_weights(folder / "text_encoder" / "model.safetensors", encoder, ("encoder.embed_tokens.weight",))
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder
