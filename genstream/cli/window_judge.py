"""Streams judged window by window, while they are made."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from genstream.cli.pipeline import to_uint8
from genstream.data.prompts import EvaluationPrompt
from genstream.data.scene import Scene
from genstream.evaluation.judge import ClipScore, judge_clip
from genstream.pipelines.causal_video import CausalVideoPipeline

_TOGETHER = 16


class WindowJudge:
    """Judges a stream of any length, one window after the other; holds no more than a window."""

    def __init__(self, window_frames: int, expected: Scene, fps: int) -> None:
        self.scores: list[ClipScore] = []
        self._window_frames = window_frames
        self._expected = expected
        self._fps = fps
        self._waiting = np.empty((0, 0, 0, 3), dtype=np.uint8)

    def add(self, frames: NDArray[np.uint8]) -> None:
        """Take the next frames, uint8 [F, H, W, 3]."""
        self._waiting = np.concatenate([self._waiting, frames]) if len(self._waiting) else frames
        while len(self._waiting) >= self._window_frames:
            window, self._waiting = np.split(self._waiting, [self._window_frames])
            self.scores.append(judge_clip(window, self._expected, self._fps))


def judge_together(
    pipe: CausalVideoPipeline, prompts: Sequence[EvaluationPrompt], seconds: float, window_s: float, seed: int
) -> list[list[ClipScore]]:
    """Scores of a stream for each prompt, window by window, many streams at a time; no stream is timed."""
    fps = pipe.config.default_fps
    scores: list[list[ClipScore]] = []
    for first in range(0, len(prompts), _TOGETHER):
        batch = prompts[first : first + _TOGETHER]
        judges = [WindowJudge(round(window_s * fps), prompt.scene, fps) for prompt in batch]
        captions = [prompt.caption for prompt in batch]
        for chunk in pipe.stream(prompt=captions, seconds=seconds, seed=seed + first):
            assert chunk.frames is not None
            for judge, frames in zip(judges, chunk.frames, strict=True):
                judge.add(to_uint8(frames[None]))
        scores += [judge.scores for judge in judges]
    return scores
