"""Which clean and noisy frames stand in one training sequence, and who sees whom: integers only.

Teacher forcing: the context of a noisy chunk is the clean video. Several noisy chunks share the clean frames
of one sequence; a frame mask gives each the context that it has while streaming. Diffusion forcing
(arXiv 2407.01392): the context is noisy too, every chunk at a level of its own, and all of it is learnt.

The context is exactly a stream's until that drops frames. From then on the keys in its cache still carry what
the kept frames saw of the dropped ones, and a sequence does not: velocities of the embedded model differ by 3
to 12 %, from its fifth chunk on. Only context "recompute" leaves nothing of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import numpy as np

from genstream.cache.layout import PositionPolicy
from genstream.streaming.presets import EngineKind
from genstream.streaming.settings import ContextPolicy, StreamSettings

FORCED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "engine": (EngineKind.CACHE,),
        "independent_first_frame": (False,),
        "context": (ContextPolicy.CLEAN, ContextPolicy.FUSED, ContextPolicy.RECOMPUTE),
        "context_timestep": (0.0,),
        "past_weight": (1.0,),
    }
)
"""Of each setting of a stream the values for which a sequence shows a chunk what the stream does."""


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
class Context:
    """How a model streams: what a chunk sees of its past.

    Attributes:
        chunk_frames: latent frames of a chunk.
        window_chunks: chunks kept besides the sink.
        sink: the first chunk is kept for ever.
    """

    chunk_frames: int
    window_chunks: int
    sink: bool = True

    @classmethod
    def of(cls, settings: StreamSettings) -> Self:
        """That of a model.

        Raises:
            ValueError: it streams in another way than students are trained in.
        """
        size, sinks, window = settings.chunk_frames, settings.sink_frames, settings.window_frames
        if sinks not in (0, size):
            raise ValueError(f"sink_frames must be 0 or {size}, a chunk, got {sinks}")
        if window is None or window % size:
            raise ValueError(
                f"window_frames must be a multiple of {size}, the frames of a chunk, got {window}"
            )
        if sinks and settings.positions is not PositionPolicy.WINDOW:
            raise ValueError(f"positions must be 'window' with sinks, got {str(settings.positions)!r}")
        return cls(size, window // size, sinks > 0)

    def stream(self, guidance_scale: float = 1.0) -> StreamSettings:
        """How a model streams that sees so much."""
        size = self.chunk_frames
        return StreamSettings(
            chunk_frames=size,
            sink_frames=size if self.sink else 0,
            window_frames=self.window_chunks * size,
            positions=PositionPolicy.WINDOW,
            guidance_scale=guidance_scale,
        )

    @property
    def longest_chunks(self) -> int:
        """Chunks that are seen together at most, the current one among them."""
        return self.sink + self.window_chunks + 1


def draw_context(rng: np.random.Generator, sizes: Sequence[int], window_frames: int) -> Context:
    """A random way to stream, for models that can be run in all of them.

    Args:
        rng: random numbers.
        sizes: of chunks, in latent frames.
        window_frames: the longest window; there is one of at least one chunk.
    """
    size = int(rng.choice(sizes))
    return Context(size, int(rng.integers(1, window_frames // size + 1)), bool(rng.integers(2)))


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


def from_start(chunks: Sequence[int], window_chunks: int, *, sink: bool = True) -> ForcedSequence:
    """Every chunk of a clip's beginning as a target, in the context it has in a stream.

    Args:
        chunks: latent frames of each chunk.
        window_chunks: chunks kept besides the sink.
        sink: the first chunk is kept for ever.
    """
    starts = [sum(chunks[:index]) for index in range(len(chunks))]
    spans = [range(start, start + length) for start, length in zip(starts, chunks, strict=True)]
    sees = [
        tuple(index for index in range(chunk) if (sink and index == 0) or index >= chunk - window_chunks)
        for chunk in range(len(chunks))
    ]
    pieces = [Piece(span, span, seen) for span, seen in zip(spans, sees, strict=True)]
    return ForcedSequence(tuple(pieces[:-1]), tuple(pieces))


def from_middle(starts: Sequence[int], chunk_frames: int, copies: int, recached: int = 1) -> ForcedSequence:
    """One chunk far from the start as a target, several times, at different noise levels.

    Frames between the chunks are gone; the chunks stand directly one behind the other.

    Args:
        starts: first latent frame of the sink if there is one, of each chunk of the window, and of the
            target.
        chunk_frames: latent frames of a chunk.
        copies: times that the target stands in the sequence.
        recached: leading chunks that see each other, as after the re-cache of a prompt switch.
    """
    spans = [range(start, start + chunk_frames) for start in starts]
    places = [range(place * chunk_frames, (place + 1) * chunk_frames) for place in range(len(starts))]
    clean = tuple(
        Piece(span, place, tuple(range(max(index, recached))))
        for index, (span, place) in enumerate(zip(spans[:-1], places[:-1], strict=True))
    )
    target = Piece(spans[-1], places[-1], tuple(range(len(clean))))
    return ForcedSequence(clean, (target,) * copies)


def in_stream(chunk: int, context: Context) -> ForcedSequence:
    """Chunk number `chunk` of a stream as a target, in the context that it has there."""
    kept = range(max(0, chunk - context.window_chunks), chunk)
    sinks = [0] if context.sink and chunk > context.window_chunks else []
    starts = [place * context.chunk_frames for place in (*sinks, *kept, chunk)]
    return from_middle(starts, context.chunk_frames, copies=1)


def with_noisy_context(sequence: ForcedSequence) -> ForcedSequence:
    """The same chunks, each once and each a target: its context is not clean (diffusion forcing)."""
    return ForcedSequence((), (*sequence.clean, sequence.noisy[-1]))
