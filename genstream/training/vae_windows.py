"""Long clips in training at constant memory: window by window, with the VAE's streaming state in between.

OD-VAE (2409.01199) works its temporal rollback windows off with an overlap that it throws away. A VAE that
streams exactly needs none: the windows of a clip give what the whole clip gives.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genstream.vae.causal import CausalVideoVAE, Posterior, detach_state
from genstream.vae.checks import check_frames


@dataclass(frozen=True, kw_only=True)
class ClipSource:
    """Clips [B, 3, 1 + r (T - 1), H, W] in [-1, 1].

    Attributes:
        training: the clips of a step, which follow from its number.
        evaluation: clips that are never trained on.
    """

    training: Callable[[int], Tensor]
    evaluation: Sequence[Tensor]

    def __post_init__(self) -> None:
        if not self.evaluation:
            raise ValueError("evaluation must hold at least one clip, got none")


@dataclass(frozen=True, kw_only=True)
class WindowSettings:
    """How a clip is cut.

    Attributes:
        window_frames: frames of a window, a multiple of the temporal ratio; a clip's first has one more.
        gradient_windows: windows in a row through which gradient flows; their memory is held together.
    """

    window_frames: int = 16
    gradient_windows: int = 1

    def __post_init__(self) -> None:
        for name in ("window_frames", "gradient_windows"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What a text-conditioned decoder is told: tokens [B, L, D], and a mask [B, L] that is 0 beside them."""

    text: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class Window:
    """Some frames of a clip and what became of them.

    Attributes:
        frames: [B, 3, F, H, W] in [-1, 1].
        posterior: of their latents.
        reconstruction: like `frames`, not clamped, from a draw of the latents.
    """

    frames: Tensor
    posterior: Posterior
    reconstruction: Tensor


class ClipStream:
    """One clip on its way through a VAE."""

    def __init__(self, vae: CausalVideoVAE, frames: Tensor, caption: Caption | None = None) -> None:
        batch_size, _, _, height, width = frames.shape
        self.vae = vae
        self.encoding = vae.init_state("encode", batch_size, height, width)
        self.decoding = vae.init_state("decode", batch_size, height, width)
        if caption is not None:
            vae.condition(self.decoding, caption.text, caption.mask)

    def advance(self, frames: Tensor) -> Window:
        """Encode and decode the next frames; gradient flows to the frames since the last `cut`."""
        posterior: Posterior = self.vae.encode_window(frames, self.encoding)
        reconstruction: Tensor = self.vae.decode_window(posterior.sample(), self.decoding)
        return Window(frames=frames, posterior=posterior, reconstruction=reconstruction)

    def cut(self) -> None:
        """Let no gradient flow to the frames so far, and release what was kept for it."""
        detach_state(self.encoding)
        detach_state(self.decoding)


def rollback_windows(
    vae: CausalVideoVAE, frames: Tensor, settings: WindowSettings, caption: Caption | None = None
) -> Iterator[Window]:
    """Work off a clip [B, 3, 1 + r (T - 1), H, W]; memory is that of `gradient_windows` windows.

    The caller takes the gradient of each window before it asks for the next one.
    """
    stream = ClipStream(vae, frames, caption)
    groups = _groups(vae, frames, settings)
    for group in groups:
        yield _joined([stream.advance(part) for part in group])
        stream.cut()


def last_window(
    vae: CausalVideoVAE, frames: Tensor, settings: WindowSettings, caption: Caption | None = None
) -> Window:
    """The end of a clip, for one training step: what comes before only warms up the state."""
    stream = ClipStream(vae, frames, caption)
    *warm_up, last = _groups(vae, frames, settings)
    with torch.no_grad():
        for group in warm_up:
            for part in group:
                stream.advance(part)
    return _joined([stream.advance(part) for part in last])


@torch.no_grad()
def reconstruct(vae: CausalVideoVAE, frames: Tensor, settings: WindowSettings) -> tuple[Tensor, Tensor]:
    """Latents [B, C, T, h, w] and frames of a clip [B, 3, 1 + r (T - 1), H, W], as `vae` gives them for all.

    Works window by window, so that a long clip takes the memory of one window besides its own.
    """
    batch_size, _, _, height, width = frames.shape
    encoding = vae.init_state("encode", batch_size, height, width)
    decoding = vae.init_state("decode", batch_size, height, width)
    latents, decoded = [], []
    for part in frames.split(settings.window_frames, dim=2):
        latents.append(vae.encode_chunk(part, encoding))
        decoded.append(vae.decode_chunk(latents[-1], decoding))
    return torch.cat(latents, dim=2), torch.cat(decoded, dim=2)


def _groups(vae: CausalVideoVAE, frames: Tensor, settings: WindowSettings) -> list[list[Tensor]]:
    """Windows of a clip, `gradient_windows` at a time."""
    ratio, length = vae.spec.temporal_ratio, settings.window_frames
    if length % ratio:
        raise ValueError(f"window_frames must be a multiple of {ratio} for this VAE, got {length}")
    check_frames(frames, vae.spec)
    count = frames.shape[2]
    starts = [0, *range(1 + length, count, length)]
    parts = [frames[:, :, start:stop] for start, stop in zip(starts, [*starts[1:], count], strict=True)]
    together = settings.gradient_windows
    return [parts[index : index + together] for index in range(0, len(parts), together)]


def _joined(windows: list[Window]) -> Window:
    log_variances = [
        window.posterior.log_variance for window in windows if window.posterior.log_variance is not None
    ]
    return Window(
        frames=torch.cat([window.frames for window in windows], dim=2),
        posterior=Posterior(
            mean=torch.cat([window.posterior.mean for window in windows], dim=2),
            log_variance=torch.cat(log_variances, dim=2) if log_variances else None,
        ),
        reconstruction=torch.cat([window.reconstruction for window in windows], dim=2),
    )
