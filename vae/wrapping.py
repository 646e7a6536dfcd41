"""VAEs around VAEs: which one streams, and whose weights it uses."""

from typing import Protocol, TypeGuard, runtime_checkable

from diffusers import ModelMixin
from torch import nn

from genstream.vae.protocol import StreamingVAE


@runtime_checkable
class VAEWrapper(Protocol):
    """Works through another VAE, as adapters and tilings do."""

    @property
    def vae(self) -> object:
        """The one inside."""
        ...


def module_of(vae: object) -> nn.Module:
    """The module that holds the weights of a VAE, through all that is wrapped around it."""
    while not isinstance(vae, nn.Module):
        if not isinstance(vae, VAEWrapper):
            raise ValueError(f"vae must be a module or be wrapped around one, got {type(vae).__name__}")
        vae = vae.vae
    return vae


def streams(vae: object) -> TypeGuard[StreamingVAE]:
    """Whether `vae` has the streaming protocol; unlike `isinstance`, this sees through `torch.compile`."""
    return hasattr(vae, "decode_chunk")


def as_streaming(vae: StreamingVAE | ModelMixin) -> StreamingVAE:
    """`vae` itself where it streams, else its adapter.

    Raises:
        ValueError: no adapter is known for it, or it cannot stream.
    """
    if streams(vae):
        return vae
    # Imported when needed: all of diffusers' VAEs take a second to import.
    from genstream.vae.adapters import stream_vae

    return stream_vae(vae)
