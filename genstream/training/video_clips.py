"""Clips that models learn from, cut out of a folder of videos with their captions beside them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from genstream.conditioning.text import check_prompts
from genstream.io.png import FRAME_PATTERN
from genstream.io.reader import VideoFile, find_videos, read_cropped
from genstream.training.processes import process
from genstream.training.text import tell_unknown_words
from genstream.training.videos import by_digest, long_enough, usable

logger = logging.getLogger(__name__)

CAPTION_SUFFIX = ".txt"
_SAME_RATE = 0.5


@dataclass(frozen=True, kw_only=True)
class CaptionedVideo:
    """A video with what it shows in words.

    Attributes:
        file: to read from.
        name: its path in the folder of all videos.
        captions: at least one, each of the whole video.
        stamp: size in bytes and time of the last change in ns, which tell it from another one of that name.
    """

    file: VideoFile
    name: str
    captions: tuple[str, ...]
    stamp: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class VideoClip:
    """A clip in a video.

    Attributes:
        video: that it is cut out of.
        start: frames in front of it.
    """

    video: CaptionedVideo
    start: int


@dataclass(frozen=True, kw_only=True)
class ClipGeometry:
    """What all clips have in common.

    Attributes:
        chunks: chunks of a clip.
        frames: frames of a clip.
        height: pixels.
        width: pixels.
    """

    chunks: int
    frames: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class VideoClips:
    """Clips of videos, at the videos' own frame rates; none changes its scene, and all count alike.

    Attributes:
        clips: to train on, and behind them those for evaluation.
        evaluation: number of the latter, from videos that are never trained on.
        geometry: of all of them.
    """

    clips: tuple[VideoClip, ...]
    evaluation: int
    geometry: ClipGeometry

    @property
    def count(self) -> int:
        """All of them."""
        return len(self.clips)

    @property
    def shape(self) -> tuple[int, int, int]:
        """F, H and W of each."""
        return self.geometry.frames, self.geometry.height, self.geometry.width

    @property
    def videos(self) -> list[CaptionedVideo]:
        """That the clips are from, each once."""
        return list({clip.video.name: clip.video for clip in self.clips}.values())

    @property
    def switch_chunk(self) -> int:
        """Behind the last chunk: there is no switch."""
        return self.geometry.chunks

    def switches(self, clip: int) -> bool:
        """Never."""
        return False

    def is_hard(self, clip: int) -> bool:
        """Nobody knows."""
        return False

    def frames(self, clip: int) -> NDArray[np.uint8]:
        """[F, H, W, 3].

        Raises:
            ValueError: they cannot be read.
        """
        place = self.clips[clip]
        return read_cropped(place.video.file, place.start, *self.shape)

    def caption_count(self, clip: int) -> int:
        """How many captions its video has."""
        return len(self.clips[clip].video.captions)

    def caption(self, clip: int, variant: int) -> str:
        """One of them."""
        return self.clips[clip].video.captions[variant]

    def caption_after_switch(self, clip: int, variant: int) -> str:
        """The same, since nothing changes."""
        return self.caption(clip, variant)

    def identity(self) -> dict[str, object]:
        """What the frames follow from, as json values."""
        clips = [(clip.video.name, *clip.video.stamp, clip.start) for clip in self.clips]
        return {"shape": self.shape, "videos": clips}

    def check_captions(self, readers: Sequence[tuple[PreTrainedTokenizerBase, int]]) -> None:
        """Raise ValueError for a caption that is longer than a text encoder takes; tell of unknown words.

        Args:
            readers: the tokenizer of each text encoder, and its longest prompt in tokens.
        """
        videos = self.videos
        for video in videos:
            try:
                for tokenizer, tokens in readers:
                    check_prompts(video.captions, tokenizer, tokens)
            except ValueError as error:
                raise ValueError(f"caption file {str(_caption_file(video.file.path))!r}: {error}") from error
        captions = [caption for video in videos for caption in video.captions]
        tell_unknown_words("captions", captions, [tokenizer for tokenizer, _ in readers])

    def tell(self, fps: float) -> None:
        """Say how many there are, and warn where their frame rates are not the `fps` of the model."""
        held_out = replace(self, clips=self.clips[self.count - self.evaluation :])
        logger.info(
            "%d clips of %d videos to train on, %d clips of %d others for evaluation",
            self.count - self.evaluation,
            len(self.videos) - len(held_out.videos),
            self.evaluation,
            len(held_out.videos),
        )
        rates = [video.file.fps for video in self.videos if video.file.fps > 0]
        if others := sorted({rate for rate in rates if abs(rate - fps) > _SAME_RATE}):
            told = " to ".join(dict.fromkeys(f"{rate:g}" for rate in (others[0], others[-1])))
            logger.warning(
                "videos of %s frames per second are learnt as they are; the model shows %g", told, fps
            )

    def readable(self, latents: Tensor) -> tuple[VideoClips, Tensor]:
        """The clips, and their latents, without those whose latents are NaN because they could not be read.

        Args:
            latents: of all clips, `[clips, C, T, h, w]`.

        Raises:
            ValueError: none are left to train on, or none for evaluation.
        """
        is_read = (~latents[:, 0, 0, 0, 0].isnan()).tolist()
        if all(is_read):
            return self, latents
        if process().is_main_process:
            logger.warning("%d of %d clips left out that cannot be read", is_read.count(False), self.count)
        evaluation = sum(is_read[self.count - self.evaluation :])
        if not 0 < evaluation < sum(is_read):
            raise ValueError(
                "videos must hold clips to train on and others for evaluation that can be decoded, got "
                f"{sum(is_read) - evaluation} and {evaluation}"
            )
        clips = tuple(clip for clip, kept in zip(self.clips, is_read, strict=True) if kept)
        return replace(self, clips=clips, evaluation=evaluation), latents[is_read]


def find_clips(folder: str, geometry: ClipGeometry, most: int, evaluation: int) -> VideoClips:
    """Cut the videos of a folder into clips, one behind the other; those that are no use are listed.

    Args:
        folder: searched with all folders in it. The captions of `clip.mp4` are the lines of `clip.txt` beside
            it, those of a folder of frames the lines of the file of that name and .txt beside that.
        geometry: of the clips.
        most: of all clips to train on as many are taken, from all videos.
        evaluation: clips that are never trained on, nor any other of their videos.

    Raises:
        ValueError: there are too few.
    """
    root, frames = Path(folder), geometry.frames
    paths = find_videos(root, companions=[CAPTION_SUFFIX])
    videos = usable(paths, partial(_captioned, root=root, frames=frames))
    if not videos:
        raise ValueError(
            f"videos must hold one of at least {frames} frames with its caption beside it, "
            f"got none in {folder!r}"
        )
    held_out: list[VideoClip] = []
    training: list[VideoClip] = []
    for video in sorted(videos, key=lambda video: by_digest(video.name)):
        (held_out if len(held_out) < evaluation else training).extend(_cut(video, frames))
    if len(held_out) < evaluation or not training:
        raise ValueError(
            f"videos must hold evaluation_clips = {evaluation} clips of {frames} frames, and others to train "
            f"on in videos of their own, got {len(held_out) + len(training)} clips in {len(videos)} videos"
        )
    training.sort(key=lambda clip: by_digest(f"{clip.start} {clip.video.name}"))
    clips = (*training[:most], *held_out[:evaluation])
    return VideoClips(clips=clips, evaluation=evaluation, geometry=geometry)


def _cut(video: CaptionedVideo, frames: int) -> Sequence[VideoClip]:
    starts = range(0, video.file.frames - frames + 1, frames)
    return [VideoClip(video=video, start=start) for start in starts]


def _captioned(path: Path, root: Path, frames: int) -> CaptionedVideo:
    """A video with its captions.

    Raises:
        ValueError: it cannot be read, is shorter than a clip or has no caption.
    """
    video = long_enough(path, frames)
    name = path.relative_to(root).as_posix()
    return CaptionedVideo(file=video, name=name, captions=_captions(path), stamp=_stamp(path))


def _captions(video: Path) -> tuple[str, ...]:
    path = _caption_file(video)
    if not path.is_file():
        raise ValueError(f"video {str(video)!r} has no caption in {path.name!r} beside it")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"caption file {str(path)!r} cannot be read: {error}") from error
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise ValueError(f"caption file {str(path)!r} is empty")
    return captions


def _caption_file(video: Path) -> Path:
    # A folder's name may have a dot in it which begins no suffix.
    return (
        video.with_name(video.name + CAPTION_SUFFIX) if video.is_dir() else video.with_suffix(CAPTION_SUFFIX)
    )


def _stamp(video: Path) -> tuple[int, int]:
    files = list(video.glob(FRAME_PATTERN)) if video.is_dir() else [video]
    states = [file.stat() for file in files]
    return sum(state.st_size for state in states), max(state.st_mtime_ns for state in states)
