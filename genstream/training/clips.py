"""Clips that models learn from, as latents; those of the toy world, some of which change their scene."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from genstream.data.switch import Switch, switch_scene
from genstream.data.toyworld import ToyWorld
from genstream.shapes import frames_of, latent_frames_of
from genstream.training.precision import Precision, computing_in
from genstream.training.shards import in_shards
from genstream.vae.protocol import StreamingVAE
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.wrapping import module_of

logger = logging.getLogger(__name__)

SWITCHED_EVERY = 4
"""One clip in so many changes its scene in the middle."""
CAPTIONS = 16
"""Captions of one scene."""
_SHARD_CLIPS = 64
_SWITCHES_KEPT = 4096


class Clips(Protocol):
    """Training clips, each known by its number."""

    @property
    def count(self) -> int:
        """All of them."""
        ...

    @property
    def evaluation(self) -> int:
        """How many of them, the last ones, are never trained on."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """F, H and W of each."""
        ...

    @property
    def switch_chunk(self) -> int:
        """First chunk of the new scene in clips that change."""
        ...

    def switches(self, clip: int) -> bool:
        """Whether the clip changes its scene."""
        ...

    def is_hard(self, clip: int) -> bool:
        """Whether the clip shows what is learnt last."""
        ...

    def frames(self, clip: int) -> NDArray[np.uint8]:
        """[F, H, W, 3].

        Raises:
            ValueError: they cannot be read.
        """
        ...

    def caption_count(self, clip: int) -> int:
        """How many captions it has."""
        ...

    def caption(self, clip: int, variant: int) -> str:
        """One of them; of the first scene, if the clip changes it."""
        ...

    def caption_after_switch(self, clip: int, variant: int) -> str:
        """A caption of the scene that the clip changes to."""
        ...

    def identity(self) -> dict[str, object]:
        """What a clip's frames follow from besides its number, as json values."""
        ...


@dataclass(frozen=True, kw_only=True)
class ClipSet:
    """Clips of the toy world.

    Attributes:
        count: clips.
        chunks: chunks of a clip.
        chunk_frames: latent frames of a chunk.
        temporal_ratio: of the VAE.
        size_px: side of the toy world's frames.
        evaluation: how many of them, the last ones, are never trained on.
    """

    count: int
    chunks: int
    chunk_frames: int
    temporal_ratio: int
    size_px: int = 128
    evaluation: int = 0

    @property
    def world(self) -> ToyWorld:
        """Where the clips are from."""
        return ToyWorld(height=self.size_px, width=self.size_px)

    @property
    def shape(self) -> tuple[int, int, int]:
        """F, H and W of each."""
        return frames_of(self.chunks * self.chunk_frames, self.temporal_ratio), self.size_px, self.size_px

    @property
    def switch_chunk(self) -> int:
        """First chunk of the new scene in clips that change."""
        return self.chunks // 2

    def switches(self, clip: int) -> bool:
        """Whether the clip changes its scene."""
        return self.chunks > 1 and clip % SWITCHED_EVERY == SWITCHED_EVERY - 1

    def is_hard(self, clip: int) -> bool:
        """Whether the clip shows two objects or one that bounces: what is learnt last."""
        return _is_hard(clip)

    def frames(self, clip: int) -> NDArray[np.uint8]:
        """[F, H, W, 3]."""
        world = self.world
        count, _, _ = self.shape
        frames = world.frames(world.scene(clip), count)
        if self.switches(clip):
            kept = self._frames_before_switch
            frames[kept:] = world.frames(self._switch(clip).after, count - kept)
        return frames

    def caption_count(self, clip: int) -> int:
        """How many captions it has."""
        return CAPTIONS

    def caption(self, clip: int, variant: int) -> str:
        """A caption of the clip's first scene."""
        world = self.world
        return world.caption(world.scene(clip), variant)

    def caption_after_switch(self, clip: int, variant: int) -> str:
        """A caption of the scene that a clip changes to."""
        return self._switch(clip).caption(variant)

    def identity(self) -> dict[str, object]:
        """What a clip's frames follow from besides its number, as json values."""
        return {name: value for name, value in asdict(self).items() if name not in ("count", "evaluation")}

    @property
    def _frames_before_switch(self) -> int:
        return frames_of(self.switch_chunk * self.chunk_frames, self.temporal_ratio)

    def _switch(self, clip: int) -> Switch:
        return _switch(clip, self._frames_before_switch / self.world.fps)


@cache
def _is_hard(clip: int) -> bool:
    objects = ToyWorld().scene(clip).objects
    return len(objects) > 1 or any(item.motion == "bouncing" for item in objects)


@lru_cache(_SWITCHES_KEPT)
def _switch(clip: int, at_s: float) -> Switch:
    return switch_scene(ToyWorld().scene(clip), at_s, clip)


def encode_clips(
    clips: Clips, vae: StreamingVAE, folder: Path, precision: Precision = "fp32", start: int = 0
) -> Tensor:
    """Latents of all clips [clips, C, T, h, w], float16, in shards that are encoded only once.

    Those of a clip that cannot be read, of which it is told, are NaN. Shards of another VAE or of other clips
    lie in another folder and are left alone.

    Args:
        clips: to encode.
        vae: that encodes.
        folder: for the shards.
        precision: to encode in.
        start: number of the first of the clips.
    """
    folder = folder / f"{_fingerprint(clips, vae)}_{precision}"

    def make(numbers: range) -> tuple[Tensor, list[str]]:
        latents = torch.stack([_encode(clips, number, vae, precision) for number in numbers])
        logger.info("encoded clip %d of %d", numbers.stop - start, clips.count)
        return latents, []

    latents, _ = in_shards("latents", make, range(start, start + clips.count), _SHARD_CLIPS, folder)
    return latents


def to_tensor(clips: NDArray[np.uint8]) -> Tensor:
    """[B, F, H, W, 3] bytes to [B, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def _encode(clips: Clips, number: int, vae: StreamingVAE, precision: Precision) -> Tensor:
    """Latents `[C, T, h, w]` of a clip."""
    try:
        frames = clips.frames(number)
    except ValueError as error:
        logger.warning("skipped: %s", error)
        return torch.full(_latent_shape(clips, vae), torch.nan, dtype=torch.float16)
    module: Any = module_of(vae)  # of diffusers
    pixels = to_tensor(frames[None]).to(module.device, module.dtype)  # [1, 3, F, H, W]
    with computing_in(precision, module.device.type):
        latents = vae.encode(pixels)[0].half().cpu()
    if not bool(latents.isfinite().all()):
        raise FloatingPointError(f"the VAE makes NaN or infinity of clip {number}")
    return latents


def _latent_shape(clips: Clips, vae: StreamingVAE) -> tuple[int, int, int, int]:
    spec = vae.spec
    count, height, width = clips.shape
    frames = latent_frames_of(count, spec.temporal_ratio)
    return spec.latent_channels, frames, height // spec.spatial_ratio, width // spec.spatial_ratio


def _fingerprint(clips: Clips, vae: StreamingVAE) -> str:
    settings, encoder = _encoder(vae)
    digest = hashlib.sha256(json.dumps({**clips.identity(), **settings}, default=str).encode())
    for name, weight in encoder.state_dict().items():
        digest.update(name.encode() + weight.cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _encoder(vae: StreamingVAE) -> tuple[dict[str, object], nn.Module]:
    """What latents follow from: settings, and a module with weights. Of most VAEs this is all there is."""
    if isinstance(vae, TinyVideoVAE):
        return {
            name: vae.config[name] for name in ("encoder_start", "latents_mean", "latents_std")
        }, vae.encoder
    module: Any = module_of(vae)  # of diffusers
    settings = {name: value for name, value in module.config.items() if not name.startswith("_")}
    return {"vae": type(module).__name__, **settings}, module
