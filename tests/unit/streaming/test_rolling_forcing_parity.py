"""The queue engine, through the public pipeline, against numbers that the published code produced."""

import pytest
import torch
from rollouts import FOLDER, QueueRollout, sets, tensors

from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.streaming.queue_engine import QueueEngine

ATOL = 1e-4
SETS = sets("rolling_forcing")
if not SETS:
    pytest.skip(f"no parity sets in {FOLDER}: set GENSTREAM_PARITY_DIR", allow_module_level=True)


def pipeline(name: str) -> CausalVideoPipeline:
    values, pipe = SETS[name], QueueRollout(name).pipeline()
    assert isinstance(pipe.engine, QueueEngine)
    assert list(pipe.scheduler.config.steps) == values["denoising_step_list"]
    assert pipe.settings.layout(None).capacity_frames == values["kv_cache_frames"]
    assert pipe.settings.layout(None).ring_frames == values["max_attention_frames"]
    return pipe


def queue_behind(window: int, values: dict, io: dict, sigmas: tuple[float, ...]) -> torch.Tensor:
    """The noisy chunks that a window hands on to the next one."""
    first, last = values["trace"][window]["blocks"]
    chunk = values["frames_per_block"]
    clean = io[f"window{window:02d}.x0_pred"][:, chunk:]
    blocks = [
        (1 - sigmas[window - block + 1]) * x
        + sigmas[window - block + 1] * io[f"window{window:02d}.renoise.block{block:02d}"]
        for block, x in zip(range(first + 1, last + 1), clean.split(chunk, dim=1), strict=False)
    ]
    return torch.cat([clean[:, :0], *blocks], dim=1).transpose(1, 2)


@pytest.mark.parametrize("name", SETS)
def test_rollout(name):
    values, io = SETS[name], tensors(name)
    pipe = pipeline(name)
    request = QueueRollout(name).request(pipe)
    used = torch.tensor(values["denoising_timesteps_used"])
    torch.testing.assert_close(torch.tensor(request.schedule.timesteps), used, rtol=0, atol=1e-3)
    state, found = pipe.start(request), []
    for window in range(len(used) - 1, len(values["trace"])):
        found.append(pipe.step(state).latents)
        expected = queue_behind(window, values, io, request.schedule.sigmas)
        torch.testing.assert_close(state.queue, expected, rtol=0, atol=ATOL)
    assert state.finished
    latents = torch.cat(found, dim=2).transpose(1, 2)
    torch.testing.assert_close(latents, io["output"], rtol=0, atol=ATOL)
    check_cache(state, io)


@pytest.mark.parametrize("name", SETS)
def test_rollout_of_a_saved_model(name, tmp_path):
    rollout = QueueRollout(name)
    rollout.pipeline().save_pretrained(tmp_path)
    latents, _ = rollout.run(CausalVideoPipeline.from_pretrained(tmp_path))
    torch.testing.assert_close(latents, rollout.expected, rtol=0, atol=ATOL)


def check_cache(state, io):
    """The kept keys and values at the end: un-rotated sinks, then the window in order of time."""
    layout, per_frame = state.kv.layout, state.kv.shape.tokens_per_frame
    sinks = layout.sink_frames * per_frame
    rows = torch.cat(
        [
            torch.arange(layout.slot(frame) * per_frame, (layout.slot(frame) + 1) * per_frame)
            for frame in [*range(layout.sink_frames), *range(state.frame - layout.ring_frames, state.frame)]
        ]
    )
    for layer in range(state.kv.shape.layers):
        keys = state.kv.keys[layer][:, rows].clone()
        keys[:, :sinks] = state.kv.sinks[layer]
        expected = io[f"final_kv.layer{layer}.k"]
        torch.testing.assert_close(keys, expected, rtol=0, atol=ATOL)
        torch.testing.assert_close(
            state.kv.values[layer][:, rows], io[f"final_kv.layer{layer}.v"], rtol=0, atol=ATOL
        )
