import pytest
import torch

PROMPT, OTHER = "a red circle moving right", "a blue square moving left"
WINDOW_FRAMES = {"cache": 3, "queue": 9}


@pytest.fixture(scope="module", params=WINDOW_FRAMES)
def pipe(request, build_pipeline):
    """A pipeline with each of the engines, shared by the tests of a file."""
    return build_pipeline(engine=request.param, window_frames=WINDOW_FRAMES[request.param])


@pytest.fixture
def ask(pipe):
    """`ask(num_frames=..., ...)`: a request to the shared pipeline."""

    def ask(prompt=PROMPT, **arguments):
        return pipe.request(prompt, **arguments)

    return ask


@pytest.fixture
def collect_in_turn(pipe):
    """`collect_in_turn(states)`: all frames of each of several streams, which take turns."""

    def collect(states):
        frames = [[] for _ in states]
        while not all(state.finished for state in states):
            for state, own in zip(states, frames, strict=True):
                own.append(pipe.step(state).frames)
        return [torch.cat(own, dim=2) for own in frames]

    return collect


@pytest.fixture
def collect(pipe):
    """`collect(state)`: all frames that are left, one tensor."""

    def collect(state, chunks=None):
        found = []
        while not state.finished and (chunks is None or len(found) < chunks):
            found.append(pipe.step(state).frames)
        return torch.cat([frames for frames in found if frames is not None], dim=2)

    return collect
