"""Which clean and noisy frames stand in one training sequence, and who sees whom: integers only.

Teacher forcing: the context of a noisy chunk is the clean video. Several noisy chunks share the clean frames
of one sequence; a frame mask gives each exactly the context that it has while streaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Frames that are attended to together.

    Attributes:
        frames: latent frames of the clip.
        positions: their temporal positions.
        sees: indices of the clean pieces in its context.
    """

    frames: range
    positions: range
    sees: tuple[int, ...]


@dataclass(frozen=True)
class ForcedSequence:
    """Clean pieces, then noisy ones."""

    clean: tuple[Piece, ...]
    noisy: tuple[Piece, ...]

    @property
    def positions(self) -> list[int]:
        """Temporal position of every latent frame of the sequence."""
        return [position for piece in (*self.clean, *self.noisy) for position in piece.positions]

    @property
    def clean_frames(self) -> list[int]:
        """Frames of the clip that stand in the sequence as context."""
        return [frame for piece in self.clean for frame in piece.frames]

    @property
    def noisy_frames(self) -> list[int]:
        """Frames of the clip that stand in the sequence as targets."""
        return [frame for piece in self.noisy for frame in piece.frames]

    def mask(self) -> list[list[bool]]:
        """`[T][T]`, True where the row's frame sees the column's frame."""
        owners = [index for index, piece in enumerate((*self.clean, *self.noisy)) for _ in piece.frames]
        visible = [{index, *piece.sees} for index, piece in enumerate((*self.clean, *self.noisy))]
        return [[column in visible[row] for column in owners] for row in owners]


def from_start(chunks: Sequence[int], window_chunks: int) -> ForcedSequence:
    """Every chunk of a clip's beginning as a target, in the context it has in a stream.

    Args:
        chunks: latent frames of each chunk.
        window_chunks: chunks kept besides the first, which is the sink.
    """
    starts = [sum(chunks[:index]) for index in range(len(chunks))]
    spans = [range(start, start + length) for start, length in zip(starts, chunks, strict=True)]
    sees = [
        tuple(index for index in range(chunk) if index == 0 or index >= chunk - window_chunks)
        for chunk in range(len(chunks))
    ]
    pieces = [Piece(span, span, seen) for span, seen in zip(spans, sees, strict=True)]
    return ForcedSequence(tuple(pieces[:-1]), tuple(pieces))


def from_middle(first: int, chunk_frames: int, window_chunks: int, copies: int) -> ForcedSequence:
    """One chunk far from the start as a target, several times, at different noise levels.

    The frames between sink and window are gone; the sink stands directly in front of the window.

    Args:
        first: first chunk of the window, above 1.
        chunk_frames: latent frames of a chunk.
        window_chunks: chunks of the window.
        copies: times that the target stands in the sequence.
    """
    chunks = [0, *range(first, first + window_chunks)]
    clean = tuple(
        Piece(_span(chunk, chunk_frames), _span(place, chunk_frames), tuple(range(place)))
        for place, chunk in enumerate(chunks)
    )
    target = Piece(
        _span(first + window_chunks, chunk_frames),
        _span(len(chunks), chunk_frames),
        tuple(range(len(chunks))),
    )
    return ForcedSequence(clean, (target,) * copies)


def _span(chunk: int, chunk_frames: int) -> range:
    return range(chunk * chunk_frames, (chunk + 1) * chunk_frames)
