"""The pipeline with every kind of VAE: small ones of this library, and diffusers' through adapters."""

import copy
import json
from dataclasses import replace

import diffusers
import pytest
import torch
from small_vaes import adapter, own_vae

from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.streaming.controls import ResetControl
from genstream.streaming.settings import ContextPolicy
from genstream.vae.adapters.base import Adapter
from genstream.vae.protocol import StreamingVAE
from genstream.vae.tiling import TiledVAE, Tiling
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.wan import WanVideoVAE
from genstream.vae.wrapping import module_of

RED = "a red circle moving right"
SIZE = {"height": 64, "width": 64}
OWN = ["taehv", "taehv_super", "wan2.1", "wan2.2", "causal", "turbo", "turbo_windows", "tiled"]
ADAPTED = ["wan21", "cogvideox", "mochi", "ltx", "hunyuan", "kl"]
LATE = ["turbo_windows", "cogvideox", "hunyuan"]
"""They hold frames back."""


def single(name: str) -> StreamingVAE:
    """A small VAE in float32, like the transformer."""
    if name in OWN:
        vae = own_vae(name, [0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1.0, 1.5])
        module_of(vae).float()
        return vae
    source = adapter(name)
    return type(source)(copy.deepcopy(source.vae).float())


@pytest.fixture(params=[*OWN, *ADAPTED])
def name(request):
    return request.param


@pytest.fixture
def pipe(name, build_pipeline):
    return build_pipeline(vae=single(name))


def frames_for(pipe: CausalVideoPipeline, latents: int) -> int:
    return 1 + pipe.streaming_vae.spec.temporal_ratio * (latents - 1)


def streamed(pipe, state, chunks=None):
    found = []
    while not state.finished and (chunks is None or len(found) < chunks):
        found.append(pipe.step(state))
    return found


def decoded_at_once(pipe, latents):
    vae = pipe.streaming_vae
    state = vae.init_state("decode", latents.shape[0], SIZE["height"], SIZE["width"])
    return torch.cat([vae.decode_chunk(latents, state), vae.flush(state)], dim=2)


def test_a_past_that_is_encoded_again(name, build_pipeline):
    """A VAE that can show and encode the oldest frame in time does; another one is refused at the start."""
    pipe = build_pipeline(vae=single(name), context="recompute", sink_frames=0, window_frames=2)
    request = pipe.request([RED, RED], num_frames=frames_for(pipe, 12), **SIZE)
    if name in LATE or name == "turbo":
        with pytest.raises(ValueError, match=r"decodes every latent frame at once|without encoder"):
            pipe.start(request)
        return
    chunks = streamed(pipe, pipe.start(request))
    assert all(chunk.latents.isfinite().all() for chunk in chunks)
    settings = replace(request.settings, context=ContextPolicy.CLEAN)
    plain = streamed(pipe, pipe.start(replace(request, settings=settings)))
    same = [torch.allclose(a.latents, b.latents, atol=1e-5) for a, b in zip(chunks, plain, strict=True)]
    assert same == [True, False, False, False]


@torch.no_grad()
def test_a_stream_equals_its_latents_decoded_at_once(name, pipe):
    """The last chunk is cut: 8 latent frames fill 2 chunks of 3 and a part of the third."""
    count = frames_for(pipe, 8)
    chunks = streamed(pipe, pipe.start(pipe.request([RED, RED], num_frames=count, **SIZE)))
    frames = torch.cat([chunk.frames for chunk in chunks], dim=2)
    assert frames.shape == (2, 3, count, 64, 64)
    expected = decoded_at_once(pipe, torch.cat([chunk.latents for chunk in chunks], dim=2))
    torch.testing.assert_close(frames, expected[:, :, :count], rtol=0, atol=2e-5)
    shown = 0
    for chunk in chunks:
        assert chunk.first_frame == shown
        shown += chunk.frames.shape[2]
    in_time = [frames_for(pipe, 3), frames_for(pipe, 6) - frames_for(pipe, 3)]
    assert ([chunk.frames.shape[2] for chunk in chunks[:2]] != in_time) == (name in LATE)


@torch.no_grad()
def test_a_saved_stream_goes_on(pipe, tmp_path):
    request = pipe.request(RED, num_frames=frames_for(pipe, 7), **SIZE)
    expected = streamed(pipe, pipe.start(request))
    state = pipe.start(request)
    streamed(pipe, state, chunks=2)
    pipe.save_state(state, tmp_path / "stream.safetensors")
    fork = state.clone()
    for again in (pipe.load_state(tmp_path / "stream.safetensors"), fork, state):
        (chunk,) = streamed(pipe, again)
        torch.testing.assert_close(chunk.frames, expected[2].frames, rtol=0, atol=1e-6)
        assert chunk.first_frame == expected[2].first_frame


@pytest.mark.parametrize("name", ["wan2.1", "causal", "taehv", "turbo", "wan21", "kl"], indirect=True)
def test_folders_keep_the_vae(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    module = module_of(pipe.vae)
    assert index["vae"] == [type(module).__module__.partition(".")[0], type(module).__name__]
    loaded = CausalVideoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.vae) is type(module)
    arguments = {"num_frames": frames_for(pipe, 4), "output_type": "pt", **SIZE}
    torch.testing.assert_close(
        loaded(RED, **arguments).frames, pipe(RED, **arguments).frames, rtol=0, atol=1e-5
    )


@pytest.fixture(scope="module")
def wan():
    return single("wan2.1")


@torch.no_grad()
def test_preview_with_the_tiny_decoder_and_final_with_the_full_one(wan, build_pipeline):
    """The stream shows the tiny decoder's frames; its latents make the final video, at once or in chunks."""
    pipe = build_pipeline(vae=single("taehv"))
    preview, latents = [], []
    for chunk in pipe.stream(RED, num_frames=21, seed=3, **SIZE):
        preview.append(chunk.frames)
        latents.append(chunk.latents)
    final = wan.decode(torch.cat(latents, dim=2))
    assert torch.cat(preview, dim=2).shape == final.shape == (1, 3, 21, 64, 64)
    state = wan.init_state("decode", 1, **SIZE)
    chunks = [wan.decode_chunk(chunk, state) for chunk in latents]
    torch.testing.assert_close(torch.cat(chunks, dim=2), final, rtol=0, atol=1e-5)
    full = build_pipeline(vae=wan)(RED, num_frames=21, seed=3, output_type="pt", **SIZE).frames
    torch.testing.assert_close(full.transpose(1, 2) * 2 - 1, final, rtol=0, atol=1e-5)
    again = pipe(RED, num_frames=21, seed=3, output_type="latent", **SIZE).frames
    torch.testing.assert_close(again, torch.cat(latents, dim=2), rtol=0, atol=1e-6)


def test_a_vae_may_be_replaced(wan, build_pipeline):
    pipe = build_pipeline()
    before = pipe(RED, num_frames=5, output_type="latent", **SIZE).frames
    tiled = TiledVAE(wan, Tiling(height_px=32, width_px=32, overlap_px=16))
    for vae in (wan, single("wan21"), single("wan21").vae, tiled):
        pipe.vae = vae
        assert pipe(RED, num_frames=5, output_type="pt", **SIZE).frames.shape == (1, 5, 3, 64, 64)
        torch.testing.assert_close(pipe(RED, num_frames=5, output_type="latent", **SIZE).frames, before)


@pytest.mark.parametrize("kind", ["tiled", "adapter"])
def test_of_a_vae_that_is_wrapped_the_one_inside_is_saved(kind, build_pipeline, tmp_path):
    pipe = build_pipeline()
    before = pipe.vae
    wrapped = (
        TiledVAE(before, Tiling(height_px=32, width_px=32, overlap_px=16))
        if kind == "tiled"
        else single("wan21")
    )
    pipe.vae = wrapped
    assert pipe.streaming_vae is wrapped and pipe.vae is module_of(wrapped)
    pipe.save_pretrained(tmp_path)
    again = CausalVideoPipeline.from_pretrained(tmp_path)
    assert type(again.vae) is type(module_of(wrapped))
    pipe.vae = before
    assert pipe.streaming_vae is before


def test_adapters_are_made_once(build_pipeline):
    pipe = build_pipeline(vae=single("wan21").vae)
    assert isinstance(pipe.vae, diffusers.AutoencoderKLWan)
    assert isinstance(pipe.streaming_vae, Adapter)
    assert pipe.streaming_vae.spec.exactness == "exact"
    assert pipe.streaming_vae is pipe.streaming_vae
    given = single("wan21")
    assert build_pipeline(vae=given).streaming_vae is given


def test_only_what_is_inside_is_moved(build_pipeline):
    pipe = build_pipeline(vae=single("tiled")).to(torch.float64)
    assert isinstance(pipe.streaming_vae, TiledVAE)
    assert pipe(RED, num_frames=5, output_type="pt", **SIZE).frames.dtype == torch.float64


def test_the_vae_may_have_another_dtype_than_the_transformer(wan, build_pipeline):
    pipe = build_pipeline(vae=wan)
    pipe.transformer.to(torch.bfloat16)
    chunk = next(pipe.stream(RED, num_frames=5, **SIZE))
    assert (chunk.latents.dtype, chunk.frames.dtype) == (torch.bfloat16, torch.float32)
    image = torch.zeros(1, 3, 64, 64)
    assert next(pipe.stream(RED, num_frames=5, image=image, **SIZE)).frames.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["turbo_windows", "wan2.1"], indirect=True)
def test_a_reset_loses_no_frames(pipe, tmp_path):
    state = pipe.start(pipe.request(RED, num_frames=frames_for(pipe, 9), **SIZE))
    first = streamed(pipe, state, chunks=1)
    state.submit(ResetControl(seed=5))
    pipe.save_state(state, tmp_path / "stream.safetensors")
    chunks = [*first, *streamed(pipe, state)]
    frames = torch.cat([chunk.frames for chunk in chunks], dim=2)
    assert frames.shape[2] == frames_for(pipe, 9)
    before = decoded_at_once(pipe, first[0].latents)
    after = decoded_at_once(pipe, torch.cat([chunk.latents for chunk in chunks[1:]], dim=2))
    expected = torch.cat([before, after], dim=2)[:, :, : frames.shape[2]]
    torch.testing.assert_close(frames, expected, rtol=0, atol=2e-5)
    restored = [chunk.frames for chunk in streamed(pipe, pipe.load_state(tmp_path / "stream.safetensors"))]
    torch.testing.assert_close(torch.cat([first[0].frames, *restored], dim=2), frames, rtol=0, atol=1e-6)


def test_vaes_that_do_not_fit_are_refused(build_pipeline):
    other = WanVideoVAE(encoder_widths=(4,) * 5, decoder_widths=(4,) * 5)
    with pytest.raises(ValueError, match="vae must have 4 latent channels like the transformer, got 16"):
        next(build_pipeline(vae=other).stream(RED, num_frames=5, **SIZE))
    with pytest.raises(ValueError, match="vae must be a module or be wrapped around one, got str"):
        build_pipeline(vae="wan")
    with pytest.raises(ValueError, match="Linear cannot stream: no adapter is known"):
        next(build_pipeline(vae=torch.nn.Linear(1, 1)).stream(RED, num_frames=5, **SIZE))


def moving(count):
    """Frames `[3, 64, 64]` of a bar that moves over a slope."""
    frames = torch.linspace(-0.9, 0.5, 64).expand(count, 3, 64, 64).clone()
    for index in range(count):
        frames[index, :, :, index % 50 : index % 50 + 10] = 0.8
    return list(frames)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in [*OWN, *ADAPTED] if "turbo" not in name], indirect=True)
def test_video_to_video(name, pipe):
    """As many frames as the source has, near to their reconstruction; a reset loses none of them."""
    for latents, missing in ((5, 1), (6, 0)):
        frames = moving(frames_for(pipe, latents) - missing)
        request = pipe.request(RED, strength=1e-6, **SIZE)
        chunks = list(pipe.run(pipe.start(request, source=frames)))
        made = torch.cat([chunk.frames for chunk in chunks], dim=2)
        assert made.shape[2] == len(frames)
        plain = decoded_at_once(pipe, torch.cat([chunk.latents for chunk in chunks], dim=2))
        torch.testing.assert_close(made, plain[:, :, : len(frames)], rtol=0, atol=2e-5)
    source = encoded_at_once(pipe, frames)
    made = torch.cat([chunk.latents for chunk in chunks], dim=2)
    torch.testing.assert_close(made, source, rtol=0, atol=1e-4 * max(1.0, float(source.abs().max())))
    state = pipe.start(request, source=frames)
    while state.chunk_index == 0:
        pipe.step(state)
    state.submit(ResetControl())
    list(pipe.run(state))
    assert state.frames_out == len(frames)


def encoded_at_once(pipe, frames):
    """Latents of a clip whose first frame is a latent frame of its own."""
    vae, clip = pipe.streaming_vae, torch.stack(frames, dim=1)[None]
    copies = 3 if isinstance(vae, TinyVideoVAE) and vae.config.first_frame_copies == 0 else 0
    clip = torch.cat([clip[:, :, :1].expand(-1, -1, copies, -1, -1), clip], dim=2)
    state = vae.init_state("encode", 1, SIZE["height"], SIZE["width"])
    return torch.cat([vae.encode_chunk(clip, state), vae.flush(state)], dim=2)
