"""Clips that VAEs learn from: a folder of videos, or the toy world."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from genstream.data.toyworld import ToyWorld
from genstream.io.reader import VideoFile, find_videos, read_clip
from genstream.shapes import check_divides
from genstream.training.clips import to_tensor
from genstream.training.processes import process
from genstream.training.vae import LATEST_START_FRAME, crop_around_object
from genstream.training.vae_windows import ClipSource
from genstream.training.videos import by_digest, long_enough, usable
from genstream.vae.protocol import VAESpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """What a VAE learns from.

    Attributes:
        videos: folder, searched with all folders in it, of video files (mp4, mov, mkv, webm, avi, gif) and
            folders of frame_*.png; None for the toy world. What cannot be read, or is shorter than the
            longest clip, is skipped and listed.
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

    Clips of the next step are read while a step is taken.

    Raises:
        ValueError: sizes do not fit the VAE, or too few videos can be used.
    """
    for name, side in [("size_px", settings.size_px), *(("crop_px", side) for side in settings.crop_px)]:
        check_divides(name, side, spec.spatial_ratio)
    lengths = [spec.first_frames + spec.temporal_ratio * (count - 1) for count in settings.clip_latents]
    pool = _ToyWorldPool(settings) if settings.videos is None else _VideoPool(settings, max(lengths))

    def read(step: int) -> Tensor:
        turn, place = divmod(step, len(settings.crop_px))
        side, count = settings.crop_px[place], lengths[turn % len(lengths)]
        batch_size = max(1, settings.batch_pixels // (count * side**2))
        first = batch_size * process().process_index
        seeds = [(settings.seed, step, first + index) for index in range(batch_size)]
        # Threads: most of the time goes by in ffmpeg and numpy.
        with ThreadPoolExecutor() as threads:
            clips = list(threads.map(lambda seed: pool.draw(count, side, np.random.default_rng(seed)), seeds))
        return to_tensor(np.stack(clips))

    evaluation = _HeldOut(pool, settings.evaluation_clips, max(lengths))
    return ClipSource(training=_Ahead(read), evaluation=evaluation)


class _Ahead:
    """Reads the clips of step after step, the next ones while the caller works with these."""

    def __init__(self, read: Callable[[int], Tensor]) -> None:
        self._read = read
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._coming: dict[int, Future[Tensor]] = {}

    def __call__(self, step: int) -> Tensor:
        ready = self._coming.pop(step, None) or self._reader.submit(self._read, step)
        self._coming = {step + 1: self._reader.submit(self._read, step + 1)}
        return ready.result()


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
        self._broken: set[Path] = set()
        root = Path(settings.videos)
        videos = usable(find_videos(root), partial(long_enough, frames=longest))
        videos.sort(key=lambda video: by_digest(video.path.relative_to(root).as_posix()))
        whole = (video for video in videos if self._clip(video, 0, longest) is not None)
        self._evaluation = list(islice(whole, settings.evaluation_clips))
        self._training = [video for video in videos if video not in self._evaluation]
        if len(self._training) == len(self._broken):
            raise ValueError(
                f"videos must hold more than evaluation_clips = {settings.evaluation_clips} videos of at "
                f"least {longest} frames, got {len(videos) - len(self._broken)}"
            )

    def draw(self, count: int, side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        clip = None
        while clip is None:
            video = self._training[rng.integers(len(self._training))]
            clip = self._clip(video, int(rng.integers(video.frames - count + 1)), count)
            if clip is None and len(self._broken) == len(self._training):
                raise ValueError(f"videos must hold one that can be decoded, got {len(self._broken)} broken")
        top, left = (int(rng.integers(length - side + 1)) for length in clip.shape[1:3])
        return clip[:, top : top + side, left : left + side]

    def _clip(self, video: VideoFile, start: int, count: int) -> NDArray[np.uint8] | None:
        """Frames of a video; None where it is broken, which is told once."""
        try:
            return read_clip(video, start, count, self._size)
        except ValueError as error:
            if video.path not in self._broken:
                logger.warning("skipped: %s", error)
            self._broken.add(video.path)
            return None

    def held_out(self, index: int, count: int) -> NDArray[np.uint8]:
        clip = read_clip(self._evaluation[index], 0, count, self._size)
        top, left = ((length - self._size) // 2 for length in clip.shape[1:3])
        return clip[:, top : top + self._size, left : left + self._size]
