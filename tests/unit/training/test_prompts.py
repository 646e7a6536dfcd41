import numpy as np
import torch

from genstream.training.clips import ClipSet
from genstream.training.prompts import ClipPieces


def test_pieces_begin_anywhere_or_where_chunks_do():
    clips = ClipSet(count=3, chunks=4, chunk_frames=3, temporal_ratio=4)
    latents = torch.arange(12.0).expand(3, 1, 12)[..., None, None]
    for grid, begun in ((1, range(7)), (3, [0, 3, 6])):
        pieces = ClipPieces(clips, latents, 6, range(3), grid=grid).draw(200, np.random.default_rng(0)).pieces
        assert sorted(set(pieces[:, 0, 0, 0, 0].tolist())) == list(begun)
        assert torch.equal(pieces[:, 0, -1], pieces[:, 0, 0] + 5)
