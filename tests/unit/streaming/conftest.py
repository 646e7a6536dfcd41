import pytest
import torch

PROMPT, OTHER = "a red circle moving right", "a blue square moving left"


@pytest.fixture
def ask(pipe):
    """`ask(num_frames=..., ...)`: a request to the shared pipeline."""

    def ask(prompt=PROMPT, **arguments):
        return pipe.request(prompt, **arguments)

    return ask


@pytest.fixture
def collect(pipe):
    """`collect(state)`: all frames that are left, one tensor."""

    def collect(state, chunks=None):
        found = []
        while not state.finished and (chunks is None or len(found) < chunks):
            found.append(pipe.step(state).frames)
        return torch.cat([frames for frames in found if frames is not None], dim=2)

    return collect
