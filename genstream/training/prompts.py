"""What distillation asks the student for: prompts alone, or prompts with the clips that they describe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from genstream.conditioning.text import check_prompts
from genstream.data.toyworld import ToyWorld
from genstream.training.clips import CAPTIONS, Clips
from genstream.training.denoiser import Denoiser
from genstream.training.text import tell_unknown_words

_SCENES = 2**31


@dataclass(frozen=True)
class Asked:
    """A batch of prompts.

    Attributes:
        captions: one for each stream.
        pieces: real latents that they describe, `[B, C, T, h, w]`; None where there are none.
    """

    captions: list[str]
    pieces: Tensor | None = None
    _told: dict[tuple[int, int, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    def embedded(self, reader: Denoiser) -> Tensor:
        """What a frozen text encoder makes of the captions; it is asked once, whoever shares it."""
        key = (id(reader.text_encoder), id(reader.tokenizer), reader.text_tokens)
        if key not in self._told:
            self._told[key] = reader.embed(self.captions)
        return self._told[key]


class PromptSource(Protocol):
    """Where prompts come from."""

    def draw(self, count: int, rng: np.random.Generator) -> Asked:
        """A random batch."""


class ScenePrompts:
    """Captions of random scenes of the toy world."""

    def draw(self, count: int, rng: np.random.Generator) -> Asked:
        """A random batch."""
        world = ToyWorld()
        scenes = [world.scene(int(seed), "train") for seed in rng.integers(_SCENES, size=count)]
        return Asked([world.caption(scene, int(rng.integers(CAPTIONS))) for scene in scenes])


class TextPrompts:
    """The lines of a text file; empty ones are left out, and so is a byte-order mark.

    Args:
        path: of the file.
        readers: all that will embed the prompts.

    Raises:
        ValueError: the file cannot be read as text, holds no prompt, or one that a reader does not take.
    """

    def __init__(self, path: Path, readers: Sequence[Denoiser] = ()) -> None:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompts must be a text file, got {str(path)!r}: {error}") from error
        # splitlines would cut at characters, too, that end no line in an editor.
        numbered = {number: line.strip() for number, line in enumerate(text.split("\n"), 1) if line.strip()}
        if not numbered:
            raise ValueError(f"prompts must hold a prompt on each line, got {str(path)!r}, which is empty")
        for reader in readers:
            for number, line in numbered.items():
                try:
                    check_prompts([line], reader.tokenizer, reader.text_tokens)
                except ValueError as error:
                    raise ValueError(f"prompts {str(path)!r}, line {number}: {error}") from error
        self.lines = list(numbered.values())
        tell_unknown_words("prompts", self.lines, [reader.tokenizer for reader in readers])

    def draw(self, count: int, rng: np.random.Generator) -> Asked:
        """A random batch."""
        return Asked([self.lines[place] for place in rng.integers(len(self.lines), size=count)])


def prompts_from(path: str | None, readers: Iterable[Denoiser]) -> PromptSource:
    """The lines of a text file, which all `readers` must take, or captions of random scenes when None."""
    return ScenePrompts() if path is None else TextPrompts(Path(path), list(readers))


class ClipPieces:
    """Pieces of training clips with their captions; in none does the scene change.

    Args:
        clips: all of them.
        latents: of all clips, `[clips, C, T, h, w]`.
        frames: latent frames of a piece.
        among: numbers of the clips to draw from.
        starts: share of pieces that are the start of a clip; the others are from anywhere.
        grid: latent frames; pieces begin at a multiple of them.
    """

    def __init__(
        self,
        clips: Clips,
        latents: Tensor,
        frames: int,
        among: Sequence[int],
        *,
        starts: float = 0.0,
        grid: int = 1,
    ) -> None:
        self.clips = clips
        self.latents = latents
        self.frames = frames
        self.among = [clip for clip in among if not clips.switches(clip)]
        self.starts = starts
        self.grid = grid

    def draw(self, count: int, rng: np.random.Generator) -> Asked:
        """A random batch, with its pieces."""
        places = (self.latents.shape[2] - self.frames) // self.grid + 1
        pieces, captions = [], []
        for place in rng.integers(len(self.among), size=count):
            clip = self.among[place]
            start = 0 if rng.random() < self.starts else self.grid * int(rng.integers(places))
            pieces.append(self.latents[clip, :, start : start + self.frames].float())
            captions.append(self.clips.caption(clip, int(rng.integers(self.clips.caption_count(clip)))))
        return Asked(captions, torch.stack(pieces))
