"""The streaming protocol for diffusers' own video VAEs: `stream_vae`."""

from genstream.vae.adapters.base import Measured
from genstream.vae.adapters.probe import probe
from genstream.vae.adapters.registry import stream_vae

__all__ = ["Measured", "probe", "stream_vae"]
