"""Clips that VAEs learn from: a folder of videos, or the toy world."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from genstream.data.toyworld import ToyWorld
from genstream.io.reader import VideoFile, find_videos, inspect_video, read_clip
from genstream.shapes import check_divides
from genstream.training.clips import to_tensor
from genstream.training.processes import process
from genstream.training.vae import LATEST_START_FRAME, crop_around_object
from genstream.training.vae_windows import ClipSource
from genstream.vae.protocol import VAESpec

_PROBLEMS_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """What a VAE learns from.

    Attributes:
        videos: folder, searched with all folders in it, of mp4, webm, gif and folders of png; None for the
            toy world.
        size_px: shorter side that videos are resized to; height and width of the toy world.
        crop_px: sides of the squares that are cut out of them, at random places; steps take them in turn.
        clip_latents: lengths of clips in latent frames, 1 for images; steps take them in turn, each with
            every one of `crop_px`.
        batch_pixels: pixels of all clips of a step together; a larger clip goes alone.
        evaluation_clips: clips of the greatest length that are never trained on, each from its own video.
        seed: of weights, clips and noise.
    """

    videos: str | None = None
    size_px: int = 128
    crop_px: tuple[int, ...] = (64,)
    clip_latents: tuple[int, ...] = (1, 5, 9)
    batch_pixels: int = 300_000
    evaluation_clips: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size_px", "batch_pixels", "evaluation_clips"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("crop_px", "clip_latents"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name} must be numbers of at least 1, got {list(values)}")
        if max(self.crop_px) > self.size_px:
            raise ValueError(f"crop_px must be at most size_px = {self.size_px}, got {list(self.crop_px)}")


class _Pool(Protocol):
    """Where clips are cut from."""

    def draw(self, count: int, side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        """A random training clip [count, side, side, 3]."""
        ...

    def held_out(self, index: int, count: int) -> NDArray[np.uint8]:
        """The start of an evaluation clip, [count, size_px, size_px, 3]."""
        ...


def clip_source(settings: ClipSettings, spec: VAESpec) -> ClipSource:
    """Clips for a VAE with these ratios; those of a step follow from its number and the seed.

    Raises:
        ValueError: names the videos that cannot be read or are shorter than the longest clip.
    """
    for name, side in [("size_px", settings.size_px), *(("crop_px", side) for side in settings.crop_px)]:
        check_divides(name, side, spec.spatial_ratio)
    lengths = [spec.first_frames + spec.temporal_ratio * (count - 1) for count in settings.clip_latents]
    pool = _ToyWorldPool(settings) if settings.videos is None else _VideoPool(settings, max(lengths))

    def training(step: int) -> Tensor:
        turn, place = divmod(step, len(settings.crop_px))
        side, count = settings.crop_px[place], lengths[turn % len(lengths)]
        batch_size = max(1, settings.batch_pixels // (count * side**2))
        first = batch_size * process().process_index
        seeds = [(settings.seed, step, first + index) for index in range(batch_size)]
        # Threads: most of the time goes by in ffmpeg and numpy.
        with ThreadPoolExecutor() as threads:
            clips = list(threads.map(lambda seed: pool.draw(count, side, np.random.default_rng(seed)), seeds))
        return to_tensor(np.stack(clips))

    return ClipSource(training=training, evaluation=_HeldOut(pool, settings.evaluation_clips, max(lengths)))


class _HeldOut(Sequence[Tensor]):
    """Evaluation clips, read when they are asked for so that they take no memory."""

    def __init__(self, pool: _Pool, clips: int, frames: int) -> None:
        self._pool = pool
        self._clips = clips
        self._frames = frames

    def __len__(self) -> int:
        return self._clips

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        numbers = range(self._clips)[index]
        if isinstance(numbers, range):
            return [self[number] for number in numbers]
        return to_tensor(self._pool.held_out(numbers, self._frames)[None])


class _ToyWorldPool:
    """Scenes of the toy world; crops are taken around objects."""

    def __init__(self, settings: ClipSettings) -> None:
        self._world = ToyWorld(height=settings.size_px, width=settings.size_px)

    def draw(self, count: int, side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        scene = self._world.scene(int(rng.integers(2**31)), "train")
        clip = self._world.frames(scene, count, int(rng.integers(LATEST_START_FRAME)))
        return crop_around_object(clip, scene.background, side, rng)

    def held_out(self, index: int, count: int) -> NDArray[np.uint8]:
        return self._world.frames(self._world.scene(index, "eval"), count)


class _VideoPool:
    """Videos of a folder. Those for evaluation are told by a digest of their name, in no order of theirs."""

    def __init__(self, settings: ClipSettings, longest: int) -> None:
        assert settings.videos is not None
        self._size = settings.size_px
        videos = _usable_videos(Path(settings.videos), longest)
        if len(videos) <= settings.evaluation_clips:
            raise ValueError(
                f"videos must hold more than evaluation_clips = {settings.evaluation_clips} videos, "
                f"got {len(videos)}"
            )
        root = Path(settings.videos)
        videos.sort(key=lambda video: _digest(video.path.relative_to(root)))
        self._evaluation = videos[: settings.evaluation_clips]
        self._training = videos[settings.evaluation_clips :]

    def draw(self, count: int, side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        video = self._training[rng.integers(len(self._training))]
        clip = read_clip(video, int(rng.integers(video.frames - count + 1)), count, self._size)
        top, left = (int(rng.integers(length - side + 1)) for length in clip.shape[1:3])
        return clip[:, top : top + side, left : left + side]

    def held_out(self, index: int, count: int) -> NDArray[np.uint8]:
        clip = read_clip(self._evaluation[index], 0, count, self._size)
        top, left = ((length - self._size) // 2 for length in clip.shape[1:3])
        return clip[:, top : top + self._size, left : left + self._size]


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode()).digest()


def _usable_videos(folder: Path, longest: int) -> list[VideoFile]:
    """All videos of a folder; an error names those that are no use."""
    paths = find_videos(folder)
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(_inspected, paths))
    videos = [video for video in found if isinstance(video, VideoFile)]
    problems = [str(error) for error in found if isinstance(error, ValueError)]
    problems += [
        f"video {str(video.path)!r} has {video.frames} frames, the longest clip {longest}"
        for video in videos
        if video.frames < longest
    ]
    if problems:
        named = "; ".join(problems[:_PROBLEMS_NAMED])
        raise ValueError(
            f"videos must all be usable, got {len(problems)} of {len(paths)} that are not: {named}"
        )
    return videos


def _inspected(path: Path) -> VideoFile | ValueError:
    try:
        return inspect_video(path)
    except ValueError as error:
        return error
