"""The streaming protocol for diffusers' own video VAEs: `stream_vae`.

What the probe finds of the published ones; `spec.exactness` has it for the weights at hand:

exact: Wan 2.1 and 2.2, Qwen-Image, EasyAnimate, Mochi, Cosmos, HunyuanVideo 1.5, LTX and LTX-2 with causal
    decoders, and image VAEs, which work frame by frame. The states of Cosmos and HunyuanVideo 1.5 grow with
    the stream, as does Mochi's for encoding: their attention sees all of it.
partition: CogVideoX in pieces of 3, 2, 2, ... latent frames, KVAE in pieces of 5, 4, 4, ...
approximate: HunyuanVideo 1.0 in its own windows, LTX and LTX-2 as released in windows of this library;
    `measured` says how far they are from the whole clip.
refused: Allegro, VidTok, MiniMax-H3 and Stable Video Diffusion, each with its reason.
"""

from genstream.vae.adapters.base import Measured
from genstream.vae.adapters.probe import probe
from genstream.vae.adapters.registry import stream_vae

__all__ = ["Measured", "probe", "stream_vae"]
