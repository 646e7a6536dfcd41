"""The queue engine, through the public pipeline, against numbers that the published code produced."""

import pytest
import torch
from rollouts import FOLDER, converted, sets, tensors

from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.streaming.noise import GivenNoise
from genstream.streaming.queue_engine import QueueEngine
from genstream.streaming.request import StreamRequest
from genstream.vae.tiny import TinyVideoVAE

ATOL = 1e-4
SETS = sets("rolling_forcing")
if not SETS:
    pytest.skip(f"no parity sets in {FOLDER}: set GENSTREAM_PARITY_DIR", allow_module_level=True)


def pipeline(name: str) -> CausalVideoPipeline:
    values, folder = SETS[name], converted(name, "rolling-forcing")
    channels = values["model_config"]["out_dim"]
    vae = TinyVideoVAE(encoder_width=4, decoder_widths=(4, 4, 4, 4), latent_channels=channels).eval()
    pipe = CausalVideoPipeline.from_pretrained(folder, vae=vae)
    assert isinstance(pipe.engine, QueueEngine)
    assert list(pipe.scheduler.config.steps) == values["denoising_step_list"]
    assert pipe.settings.layout(None).capacity_frames == values["kv_cache_frames"]
    assert pipe.settings.layout(None).ring_frames == values["max_attention_frames"]
    return pipe


def renoise(values: dict, io: dict, level: int) -> torch.Tensor:
    """The samples that took all blocks from one level to the next, in windows that follow one another."""
    samples = [
        io[f"window{block + level:02d}.renoise.block{block:02d}"] for block in range(values["num_blocks"])
    ]
    return torch.cat(samples, dim=1).transpose(1, 2)


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


def request_of(pipe: CausalVideoPipeline, values: dict, io: dict) -> StreamRequest:
    height, width = (8 * side for side in values["latent_shape_CHW"][1:])
    levels = range(len(values["denoising_step_list"]) - 1)
    return pipe.request(
        prompt_embeds=io["prompt_embeds"],
        num_frames=1 + 4 * (io["noise"].shape[1] - 1),
        height=height,
        width=width,
        noise=GivenNoise(io["noise"].transpose(1, 2), tuple(renoise(values, io, level) for level in levels)),
        decode=False,
    )


@pytest.mark.parametrize("name", SETS)
def test_rollout(name):
    values, io = SETS[name], tensors(name)
    pipe = pipeline(name)
    request = request_of(pipe, values, io)
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


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, ATOL), (torch.float16, 0.03), (torch.bfloat16, 0.1)]
)
@pytest.mark.parametrize("name", SETS)
def test_rollout_of_a_saved_model(name, dtype, atol, tmp_path):
    values, io = SETS[name], tensors(name)
    pipeline(name).save_pretrained(tmp_path)
    pipe = CausalVideoPipeline.from_pretrained(tmp_path, dtype=dtype)
    assert pipe.transformer.dtype == dtype
    chunks = [chunk.latents for chunk in pipe.run(pipe.start(request_of(pipe, values, io)))]
    latents = torch.cat(chunks, dim=2).transpose(1, 2)
    torch.testing.assert_close(latents.float(), io["output"], rtol=0, atol=atol)


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
