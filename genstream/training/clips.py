"""The clips a student learns from: scenes of the toy world, some of which change as after a prompt switch."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from genstream.data.switch import Switch, switch_scene
from genstream.data.toyworld import ToyWorld
from genstream.shapes import frames_of
from genstream.training.precision import Precision, computing_in
from genstream.training.processes import own_share, process
from genstream.vae.tiny import TinyVideoVAE

logger = logging.getLogger(__name__)

SWITCHED_EVERY = 4
"""One clip in so many changes its scene in the middle."""
_SHARD_CLIPS = 64
_SWITCHES_KEPT = 4096


@dataclass(frozen=True, kw_only=True)
class ClipSet:
    """Training clips, each known by its number.

    Attributes:
        count: clips.
        chunks: chunks of a clip.
        chunk_frames: latent frames of a chunk.
        temporal_ratio: of the VAE.
        size_px: side of the toy world's frames.
    """

    count: int
    chunks: int
    chunk_frames: int
    temporal_ratio: int
    size_px: int = 128

    @property
    def world(self) -> ToyWorld:
        """Where the clips are from."""
        return ToyWorld(height=self.size_px, width=self.size_px)

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
        count = frames_of(self.chunks * self.chunk_frames, self.temporal_ratio)
        frames = world.frames(world.scene(clip), count)
        if self.switches(clip):
            kept = self._frames_before_switch
            frames[kept:] = world.frames(self._switch(clip).after, count - kept)
        return frames

    def caption(self, clip: int, variant: int) -> str:
        """A caption of the clip's first scene."""
        world = self.world
        return world.caption(world.scene(clip), variant)

    def caption_after_switch(self, clip: int, variant: int) -> str:
        """A caption of the scene that a clip changes to."""
        return self._switch(clip).caption(variant)

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
    clips: ClipSet, vae: TinyVideoVAE, folder: Path, precision: Precision = "fp32", start: int = 0
) -> Tensor:
    """Latents of all clips [clips, C, T, h, w], float16, in shards that are encoded only once.

    Shards of another VAE, or of clips of another length, lie in another folder and are left alone.

    Args:
        clips: to encode.
        vae: that encodes.
        folder: for the shards.
        precision: to encode in.
        start: number of the first of the clips.
    """
    folder = folder / f"{_fingerprint(clips, vae)}_{precision}"
    folder.mkdir(parents=True, exist_ok=True)
    shards = {}
    end = start + clips.count
    for first in range(start, end, _SHARD_CLIPS):
        numbers = range(first, min(first + _SHARD_CLIPS, end))
        shards[folder / f"{numbers.start:06d}-{numbers.stop:06d}.safetensors"] = numbers
    for path, numbers in own_share(list(shards.items())):
        if not path.is_file():
            encoded = [_encode(vae, clips.frames(number), precision) for number in numbers]
            save_file({"latents": torch.cat(encoded)}, path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)
            logger.info("encoded clip %d of %d", numbers.stop - start, clips.count)
    process().wait_for_everyone()
    return torch.cat([load_file(path)["latents"] for path in shards])


def to_tensor(clips: NDArray[np.uint8]) -> Tensor:
    """[B, F, H, W, 3] bytes to [B, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def _encode(vae: TinyVideoVAE, clip: NDArray[np.uint8], precision: Precision) -> Tensor:
    pixels = to_tensor(clip[None])
    with computing_in(precision, vae.device.type):
        return vae.encode(pixels.to(vae.device)).half().cpu()


def _fingerprint(clips: ClipSet, vae: TinyVideoVAE) -> str:
    values = {name: value for name, value in asdict(clips).items() if name != "count"}
    values |= {name: vae.config[name] for name in ("encoder_start", "latents_mean", "latents_std")}
    digest = hashlib.sha256(json.dumps(values).encode())
    for name, weight in vae.encoder.state_dict().items():
        digest.update(name.encode() + weight.cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]
