"""Planned memory against that of pipelines which were loaded and ran."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from sparse_models import write_wan

from genstream.io.model_folder import find_model
from genstream.pipelines.allocation import peak_bytes
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.pipelines.memory import MemoryPlanner, StreamPlan, TextEncoderOffload
from genstream.pipelines.quantization import WeightFormat, quantization
from genstream.streaming.presets import PRESETS, EngineKind
from genstream.streaming.settings import ContextPolicy, RecachePolicy, StreamSettings
from genstream.transformer.causal_dit import CausalDiT

RED = "a red circle moving right"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plan(pipe, folder):
    return StreamPlan(folder=folder, height=32, width=48, settings=pipe.settings, dtype=torch.float32)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The 1.3B model at its own size, without data."""
    folder = write_wan(tmp_path_factory.mktemp("published"))
    settings = StreamSettings(sink_frames=3, window_frames=9)
    return StreamPlan(folder=folder, height=480, width=832, settings=settings)


def nbytes(module):
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_those_that_are_loaded(folder, plan, dtype):
    pipe = CausalVideoPipeline.from_pretrained(folder, dtype=dtype)
    found = MemoryPlanner().estimate(replace(plan, dtype=dtype))
    assert found.transformer_bytes == nbytes(pipe.transformer)
    assert found.vae_bytes == nbytes(pipe.vae)
    assert found.text_encoder_bytes == nbytes(pipe.text_encoder)


@pytest.mark.parametrize("weights", list(WeightFormat))
def test_eight_bit_weights_are_those_that_are_loaded(folder, plan, weights):
    config = quantization(weights)
    pipe = CausalVideoPipeline.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    stored = 0
    for parameter in pipe.transformer.parameters():
        names = getattr(parameter, "tensor_data_names", None)
        stored += (
            parameter.nbytes if names is None else sum(getattr(parameter, name).nbytes for name in names)
        )
    assert MemoryPlanner().estimate(replace(plan, weights=weights)).transformer_bytes == stored


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_stream_takes_what_was_planned(pipe, plan, batch, guidance):
    settings = replace(pipe.settings, guidance_scale=guidance)
    request = pipe.request([RED] * batch, height=32, width=48, settings=settings)
    state = pipe.start(request)
    for _ in range(4):
        pipe.step(state)
    texts = [text for text in (state.text, state.negative_text) if text is not None]
    found = MemoryPlanner().estimate(replace(plan, batch_size=batch, settings=settings))
    assert found.kv_cache_bytes == state.kv.nbytes + state.history.nbytes
    assert found.text_cache_bytes == sum(x.nbytes for text in texts for pair in text.text for x in pair)
    assert found.vae_state_bytes == state.vae.nbytes


def test_a_clip_that_keeps_everything(pipe, plan):
    settings = replace(pipe.settings, window_frames=None)
    for num_frames in (1, 9, 45, 64):
        request = pipe.request(RED, height=32, width=48, seconds=num_frames, fps=1, settings=settings)
        state = pipe.start(request)
        found = MemoryPlanner().estimate(replace(plan, settings=settings, num_frames=num_frames))
        history = state.history.shape[1] * 4 * 6 * state.kv.layout.capacity_frames * 4
        assert found.kv_cache_bytes == state.kv.nbytes + history
    with pytest.raises(ValueError, match="window_frames must be a number for an endless stream"):
        MemoryPlanner().estimate(replace(plan, settings=settings))


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if not preset.takes_image])
def test_every_preset(build_pipeline, plan, name):
    preset = PRESETS[name]
    pipe = build_pipeline()
    pipe.apply_preset(name)
    state = pipe.start(pipe.request(RED, height=32, width=48))
    for _ in range(state.kv.layout.capacity_frames // preset.settings.chunk_frames + 1):
        pipe.step(state)
    changed = replace(plan, settings=preset.settings, engine=preset.engine, levels=len(preset.steps))
    found = MemoryPlanner().estimate(changed)
    sources = [x.nbytes for x in (state.history, state.pixels, state.queue) if x is not None]
    assert found.kv_cache_bytes == state.kv.nbytes + sum(sources)
    assert found.vae_state_bytes == state.vae.nbytes
    assert found.denoise_bytes > 0
    assert (found.recache_bytes == 0) == (preset.settings.recache is RecachePolicy.NOTHING)


def test_passes_grow_with_what_they_hold(plan):
    def estimate(**settings):
        return MemoryPlanner().estimate(replace(plan, settings=replace(plan.settings, **settings)))

    clean, fused = estimate(), estimate(context=ContextPolicy.FUSED)
    assert fused.denoise_bytes > 1.8 * clean.denoise_bytes
    rebuilt = estimate(context=ContextPolicy.RECOMPUTE, sink_frames=0)
    assert rebuilt.denoise_bytes > clean.denoise_bytes  # a frame is encoded again
    assert estimate(recache=RecachePolicy.NOTHING).recache_bytes == 0
    queue = MemoryPlanner().estimate(
        replace(plan, engine=EngineKind.QUEUE, levels=4, settings=replace(plan.settings, window_frames=12))
    )
    assert queue.denoise_bytes > 3 * clean.denoise_bytes


def test_one_block_stands_for_all(build_pipeline, pipe, plan):
    """Blocks run one after another, so a pass takes the same whatever their number."""
    transformer = build_pipeline(layers=5).transformer.to("meta")
    layout = pipe.settings.layout(None)
    with torch.no_grad():
        kv = transformer.kv_cache(layout, 1, 4, 6)
        text = transformer.text_cache(torch.empty(1, 12, 16, device="meta"))
    latents = torch.empty(1, 4, 3, 4, 6, device="meta")
    timesteps = torch.empty(1, dtype=torch.float64, device="meta")
    given = [*transformer.parameters(), *kv.tensors().values(), *(x for pair in text.text for x in pair)]
    whole = peak_bytes(
        lambda: transformer(latents, timesteps, frame_positions=range(9, 12), kv_cache=kv, text_cache=text),
        given,
    )
    assert MemoryPlanner().estimate(plan).denoise_bytes == whole + latents.nbytes


def test_where_the_text_encoder_waits(plan):
    here, whole, pieces = (
        MemoryPlanner().estimate(replace(plan, offload=offload))
        for offload in (TextEncoderOffload.NONE, TextEncoderOffload.MODEL, TextEncoderOffload.GROUP)
    )
    assert whole.text_encoder_bytes == pieces.text_encoder_bytes == 0
    assert whole.encode_bytes == here.encode_bytes + here.text_encoder_bytes
    assert here.encode_bytes < pieces.encode_bytes < whole.encode_bytes
    assert whole.streaming_bytes == pieces.streaming_bytes == here.streaming_bytes - here.text_encoder_bytes


def test_the_published_size(published):
    """1.42 billion weights; a latent frame has 1560 tokens, and a token 1536 channels in 30 layers."""
    found = MemoryPlanner().estimate(published)
    assert found.transformer_bytes == pytest.approx(2 * 1.42e9, rel=0.01)
    assert found.text_encoder_bytes == pytest.approx(2 * 5.68e9, rel=0.01)
    slots = 2 * 15 + 3  # keys and values of all frames, and the sinks' keys once more
    frame = 30 * 1560 * 1536 * 2
    assert found.kv_cache_bytes == slots * frame + 16 * 15 * 60 * 104 * 2
    assert found.text_cache_bytes == 2 * 30 * 512 * 1536 * 2


def test_proposals_take_less_each_and_together(published, tmp_path):
    folder = write_wan(tmp_path / "shallow", num_layers=2)
    plan = replace(published, folder=folder, dtype=torch.float32)
    planner = MemoryPlanner()
    before = planner.estimate(plan).peak_bytes
    found = planner.proposals(plan)
    options = ["--dtype", "--offload", "--quantize", "--tiny-vae", "--window", "--size"]
    assert [proposal.option.split()[0] for proposal in found] == options
    for above, proposal in itertools.pairwise([None, *found]):
        assert proposal.peak_bytes < before
        assert proposal.together_bytes < (before if above is None else above.together_bytes)
    # Found by a planner that has seen other plans, and by one that has not.
    assert found[-1].peak_bytes == MemoryPlanner().estimate(found[-1].plan).peak_bytes


def test_what_cannot_shrink_is_not_proposed(plan):
    small = replace(
        plan,
        height=16,
        width=16,
        settings=replace(plan.settings, window_frames=3),
        offload=TextEncoderOffload.GROUP,
        weights=WeightFormat.INT8,
    )
    assert MemoryPlanner().proposals(replace(small, dtype=torch.bfloat16)) == []


def test_a_vae_of_diffusers(plan, tmp_path, pipe):
    """Its adapter is planned without measuring it, which would take its weights."""
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, **statistics).eval()
    parts = {**pipe.components, "vae": vae}
    wrapped = CausalVideoPipeline(**parts, sink_frames=3, window_frames=3, positions="window", text_tokens=12)
    wrapped.save_pretrained(tmp_path)
    found = MemoryPlanner().estimate(replace(plan, folder=tmp_path))
    state = wrapped.start(wrapped.request(RED, height=32, width=48))
    for _ in range(3):
        wrapped.step(state)
    assert found.vae_bytes == nbytes(vae)
    assert found.vae_state_bytes == state.vae.nbytes
    assert found.decode_bytes > 3 * 12 * 32 * 48 * 4


@pytest.mark.parametrize("wrapped", [False, True], ids=["own", "of diffusers"])
def test_a_stream_that_follows_a_video(plan, tmp_path, pipe, wrapped):
    parts = dict(pipe.components)
    if wrapped:
        statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
        parts["vae"] = AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, **statistics
        ).eval()
    following = CausalVideoPipeline(
        **parts, sink_frames=3, window_frames=3, positions="window", text_tokens=12
    )
    following.save_pretrained(tmp_path)
    plan = replace(plan, folder=tmp_path, transform=True)
    found = MemoryPlanner().estimate(plan)
    request = following.request(RED, height=32, width=48, strength=0.7)
    clip = [np.zeros((32, 48, 3), np.uint8)] * 45
    state = following.start(request, source=clip)
    following.step(state)
    intake = state.intake
    frame = 3 * 32 * 48 * 4
    assert found.intake_bytes == intake.vae.nbytes + 13 * frame + 3 * 4 * 4 * 6 * 4
    assert found.intake_pass_bytes > 12 * frame  # its first layer alone makes more of them
    without = MemoryPlanner().estimate(replace(plan, transform=False))
    assert (without.intake_bytes, without.intake_pass_bytes) == (0, 0)
    assert found.resting_bytes == without.resting_bytes + found.intake_bytes
    assert found.streaming_bytes >= found.resting_bytes + found.intake_pass_bytes


@pytest.mark.parametrize(("height", "width"), [(40, 48), (32, 50), (0, 48)])
def test_bad_size(plan, height, width):
    with pytest.raises(ValueError, match="must be a positive multiple of 16"):
        MemoryPlanner().estimate(replace(plan, height=height, width=width))


def test_files_that_contradict_each_other(pipe, plan, tmp_path):
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 3}))
    with pytest.raises(ValueError, match=r"checkpoint lacks 'blocks\.2\."):
        MemoryPlanner().estimate(replace(plan, folder=tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_holds_what_was_planned():
    pipe = CausalVideoPipeline.from_pretrained("toyworld", dtype=torch.bfloat16).to("cuda")
    plan = StreamPlan(folder=find_model("toyworld"), height=512, width=512, settings=pipe.settings)
    found = MemoryPlanner().estimate(plan)
    state = pipe.start(pipe.request(RED, height=512, width=512))
    for _ in range(4):
        pipe.step(state)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    pipe.step(state)
    assert torch.cuda.max_memory_allocated() == pytest.approx(found.streaming_bytes, rel=0.15)


def test_a_model_that_starts_from_an_image(pipe, plan, tmp_path):
    """Its image's tokens are in the text cache, its image's channels stay beside the latents."""
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 12, "out_channels": 4}
    image = {"image_dim": 8, "added_kv_proj_dim": 24}
    transformer = CausalDiT(**config, **image, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2)
    parts = {**pipe.components, "transformer": transformer.eval()}
    settings = {"sink_frames": 3, "window_frames": 3, "text_tokens": 12}
    wide = CausalVideoPipeline(**parts, **settings, positions="window")
    wide.save_pretrained(tmp_path)
    found = MemoryPlanner().estimate(replace(plan, folder=tmp_path))
    channels, tokens = torch.zeros(1, 8, 2, 4, 6), torch.zeros(1, 257, 8)
    request = wide.request(RED, height=32, width=48, image_channels=channels, image_embeds=tokens)
    state = wide.start(request)
    for _ in range(3):
        wide.step(state)
    assert found.kv_cache_bytes == state.kv.nbytes + state.history.nbytes + channels.nbytes
    pairs = (*state.text.text, *state.text.image)
    assert found.text_cache_bytes == sum(tensor.nbytes for pair in pairs for tensor in pair)
    assert found.image_encoder_bytes == 0
