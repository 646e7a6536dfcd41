import random
import threading

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan

from genstream.vae.identity import describe
from genstream.vae.protocol import VAEState
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.wan import WanVideoVAE
from genstream.vae.wan_weights import load_wan_vae

HEIGHT, WIDTH = 16, 32
WIDTHS = {"encoder_widths": [4, 4, 6, 8, 8], "decoder_widths": [8, 8, 8, 6, 4]}
VERSIONS = {
    "2.1": WIDTHS | {"version": "2.1", "patch_size": 1},
    "2.2": WIDTHS | {"version": "2.2", "patch_size": 2, "encoder_widths": [4, 4, 8, 8, 8]},
}
STATISTICS = {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [0.5, 0.7, 1.2, 0.9]}


def build(name: str, **overrides) -> WanVideoVAE:
    torch.manual_seed(0)
    config = VERSIONS[name] | {"latent_channels": 4} | STATISTICS | overrides
    return WanVideoVAE(**config).double().eval().requires_grad_(requires_grad=False)


@pytest.fixture(params=VERSIONS, scope="module")
def vae(request):
    return build(request.param)


def random_frames(count: int, batch_size: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (batch_size, 3, count, HEIGHT, WIDTH)
    return torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1


def random_latents(vae: WanVideoVAE, count: int, batch_size: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ratio = vae.spec.spatial_ratio
    size = (batch_size, 4, count, HEIGHT // ratio, WIDTH // ratio)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def random_parts(length: int, seed: int) -> list[int]:
    rng, parts = random.Random(seed), []
    while sum(parts) < length:
        parts.append(rng.randint(0, min(5, length - sum(parts))))
    return parts


def cuts(length: int) -> list[list[int]]:
    """Chunks of 1, 2 and 3, uneven ones, and empty ones among them."""
    even = [[size] * (length // size) + [length % size] * (length % size > 0) for size in (1, 2, 3)]
    return [*even, random_parts(length, 0), random_parts(length, 1)]


def saved_and_loaded(state: VAEState, folder) -> VAEState:
    state.save(folder / "state.safetensors")
    return VAEState.load(folder / "state.safetensors")


@pytest.mark.parametrize("parts", cuts(5), ids=str)
def test_chunked_decode_equals_whole(vae, parts, tmp_path):
    latents = random_latents(vae, 5)
    whole = vae.decode(latents, chunk_latents=5)
    assert whole.shape == (2, 3, 17, HEIGHT, WIDTH)
    state = vae.init_state("decode", 2, HEIGHT, WIDTH)
    frames = []
    for part in latents.split(parts, dim=2):
        state = saved_and_loaded(state, tmp_path)
        frames.append(vae.decode_chunk(part, state))
    frames.append(vae.flush(state))
    torch.testing.assert_close(torch.cat(frames, dim=2), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("parts", cuts(13), ids=str)
def test_chunked_encode_equals_whole(vae, parts, tmp_path):
    frames = random_frames(13)
    whole = vae.encode(frames, chunk_latents=4)
    assert whole.shape[2] == 4
    state = vae.init_state("encode", 2, HEIGHT, WIDTH)
    latents = []
    for part in frames.split(parts, dim=2):
        state = saved_and_loaded(state, tmp_path)
        latents.append(vae.encode_chunk(part, state))
    latents.append(vae.flush(state))
    torch.testing.assert_close(torch.cat(latents, dim=2), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
def test_latent_by_latent_is_bit_exact_in_float32(version):
    vae = build(version).float()
    latents = random_latents(vae, 4).float()
    state = vae.init_state("decode", 2, HEIGHT, WIDTH)
    frames = []
    for latent in latents.split(1, dim=2):
        state = VAEState.restore(state.tensors(), state.meta())
        frames.append(vae.decode_chunk(latent, state))
    streamed = torch.cat(frames, dim=2)
    assert torch.equal(streamed, vae.decode(latents))
    torch.testing.assert_close(streamed, vae.decode(latents, chunk_latents=4), rtol=0, atol=1e-5)


def test_flush_fills_the_last_group_with_its_last_frame(vae):
    frames = random_frames(7, batch_size=1)
    state = vae.init_state("encode", 1, HEIGHT, WIDTH)
    latents = torch.cat([vae.encode_chunk(frames, state), vae.flush(state)], dim=2)
    filled = torch.cat([frames, frames[:, :, -1:], frames[:, :, -1:]], dim=2)
    torch.testing.assert_close(latents, vae.encode(filled), rtol=0, atol=1e-12)
    assert vae.flush(state).shape[2] == 0


def test_one_frame_is_an_image(vae):
    latents = vae.encode(random_frames(1))
    assert latents.shape[2] == 1
    assert vae.decode(latents).shape == (2, 3, 1, HEIGHT, WIDTH)


def test_decode_is_causal(vae):
    latents = random_latents(vae, 4, batch_size=1)
    changed = latents.clone()
    changed[:, :, 2] += 1
    before, after = vae.decode(latents, chunk_latents=4), vae.decode(changed, chunk_latents=4)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5], after[:, :, 5])


def test_encode_is_causal(vae):
    frames = random_frames(13, batch_size=1)
    changed = frames.clone()
    changed[:, :, 5] *= 0.5
    before, after = vae.encode(frames, chunk_latents=4), vae.encode(changed, chunk_latents=4)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2], after[:, :, 2])


def test_memory_is_as_long_as_the_spec_says(vae):
    ratio, memory = vae.spec.spatial_ratio, vae.spec.memory_latents
    latents = torch.randn((1, 4, memory + 2, 1, 1), dtype=torch.float64)
    changed = latents.clone()
    changed[:, :, 0] += 1000
    state, other = (vae.init_state("decode", 1, ratio, ratio) for _ in range(2))
    same = vae.decode_chunk_unclamped(latents, state) == vae.decode_chunk_unclamped(changed, other)
    assert bool(same[:, :, -vae.spec.temporal_ratio :].all())


def test_a_longer_memory_is_not_needed_a_shorter_is_not_enough(vae):
    """What is not a number spreads over all that depends on it, however little."""
    ratio, memory = vae.spec.spatial_ratio, vae.spec.memory_latents
    latents = torch.zeros((1, 4, memory + 2, 1, 1), dtype=torch.float64)
    latents[:, :, 1] = torch.nan
    state = vae.init_state("decode", 1, ratio, ratio)
    frames = vae.decode_chunk_unclamped(latents, state)
    assert frames[:, :, -vae.spec.temporal_ratio :].isnan().any()


def test_interleaved_streams_equal_separate_ones(vae):
    clips = [random_latents(vae, 3, seed=seed) for seed in range(2)]
    states = [vae.init_state("decode", 2, HEIGHT, WIDTH) for _ in clips]
    outputs: list[list[torch.Tensor]] = [[], []]
    for step in range(3):
        for clip, state, output in zip(clips, states, outputs, strict=True):
            output.append(vae.decode_chunk(clip[:, :, step : step + 1], state))
    for clip, output in zip(clips, outputs, strict=True):
        assert torch.equal(torch.cat(output, dim=2), vae.decode(clip))


def test_two_threads_share_one_vae(vae):
    clips = [random_latents(vae, 3, seed=seed) for seed in range(2)]
    results: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda index=index: results.update({index: vae.decode(clips[index])}))
        for index in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, clip in enumerate(clips):
        assert torch.equal(results[index], vae.decode(clip))


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_state_does_not_grow_and_holds_no_graph(direction):
    vae = build("2.2").requires_grad_()
    step = vae.encode_chunk if direction == "encode" else vae.decode_chunk
    data = random_frames(8, 1) if direction == "encode" else random_latents(vae, 2, 1)
    state = vae.init_state(direction, 1, HEIGHT, WIDTH)
    step(data[:, :, :1], state)
    size = state.nbytes
    for _ in range(3):
        assert step(data, state).requires_grad
        assert state.nbytes == size
        assert not any(slot.requires_grad for slot in state.slots.values())
        assert all(slot.untyped_storage().nbytes() == slot.nbytes for slot in state.slots.values())


def test_failed_step_leaves_the_state(vae, monkeypatch):
    latents = random_latents(vae, 2)
    state = vae.init_state("decode", 2, HEIGHT, WIDTH)
    vae.decode_chunk(latents, state)
    fork = state.clone()
    with monkeypatch.context() as patch:
        patch.setattr(type(vae.decoder.head[0]), "forward", None)
        with pytest.raises(TypeError):
            vae.decode_chunk(latents, state)
    assert torch.equal(vae.decode_chunk(latents, state), vae.decode_chunk(latents, fork))


def test_latents_are_normalised_once(vae):
    raw = WanVideoVAE(**dict(vae.config) | {"latents_mean": [0] * 4, "latents_std": [1] * 4}).double()
    raw.load_state_dict(vae.state_dict())
    mean = torch.tensor(STATISTICS["latents_mean"]).view(1, -1, 1, 1, 1)
    std = torch.tensor(STATISTICS["latents_std"]).view(1, -1, 1, 1, 1)
    frames = random_frames(5)
    latents = vae.encode(frames)
    torch.testing.assert_close(latents * std + mean, raw.encode(frames), rtol=0, atol=1e-6)
    torch.testing.assert_close(vae.decode(latents), raw.decode(latents * std + mean), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "version, channels, patch_size", [("2.1", 16, 1), ("2.2", 48, 2)], ids=["taew2_1", "taew2_2"]
)
def test_tiny_vae_previews_the_same_latents(version, channels, patch_size):
    """A preview and the final frames come from one latent stream, frame for frame."""
    final = build(version, latent_channels=channels, latents_mean=None, latents_std=None).float()
    preview = TinyVideoVAE(
        latent_channels=channels, patch_size=patch_size, encoder_width=4, decoder_widths=[4, 4, 4, 4]
    )
    latents = final.encode(random_frames(9).float())
    states = [vae.init_state("decode", 2, HEIGHT, WIDTH) for vae in (preview, final)]
    for part in latents.split([1, 2], dim=2):
        previewed, decoded = preview.decode_chunk(part, states[0]), final.decode_chunk(part, states[1])
        assert previewed.shape == decoded.shape


def test_save_pretrained_round_trip(tmp_path):
    vae = build("2.2").float()
    vae.save_pretrained(tmp_path)
    loaded = WanVideoVAE.from_pretrained(tmp_path)
    frames = random_frames(5).float()
    assert torch.equal(loaded.encode(frames), vae.encode(frames))


def test_works_when_loaded_in_half_precision(tmp_path):
    vae = build("2.2").float()
    vae.save_pretrained(tmp_path)
    half = WanVideoVAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    frames = random_frames(5).float()
    latents = half.encode(frames.bfloat16())
    decoded = half.decode(latents)
    assert latents.dtype == decoded.dtype == torch.bfloat16
    torch.testing.assert_close(latents.float(), vae.encode(frames), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_say_what_they_are(version, suffix, tmp_path):
    from safetensors.torch import save_file

    vae = build(version, temporal_strides=[2, 1, 2]).float()
    path = tmp_path / f"weights.{suffix}"
    torch.save(vae.state_dict(), path) if suffix == "pth" else save_file(vae.state_dict(), path)
    loaded = load_wan_vae(path, **STATISTICS)
    assert describe(loaded) == describe(vae)
    assert torch.equal(loaded.conv1.weight, vae.conv1.weight)


DIFFUSERS = {
    "Wan 2.1": (AutoencoderKLWan, {"base_dim": 4}),
    "Wan 2.2": (
        AutoencoderKLWan,
        {
            "base_dim": 4,
            "decoder_base_dim": 4,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
        },
    ),
    "Qwen-Image": (AutoencoderKLQwenImage, {"base_dim": 4}),
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_loads_and_equals_diffusers(name):
    torch.manual_seed(0)
    theirs_class, config = DIFFUSERS[name]
    theirs = theirs_class(z_dim=4, **config, **STATISTICS).double().eval().requires_grad_(requires_grad=False)
    ours = load_wan_vae(theirs.state_dict(), **STATISTICS).double().requires_grad_(requires_grad=False)
    mean = torch.tensor(STATISTICS["latents_mean"]).double().view(1, -1, 1, 1, 1)
    std = torch.tensor(STATISTICS["latents_std"]).double().view(1, -1, 1, 1, 1)
    frames = random_frames(9, batch_size=1)
    moments = theirs.encode(frames).latent_dist
    latents = (moments.mean - mean) / std
    torch.testing.assert_close(ours.encode(frames), latents, rtol=0, atol=1e-6)
    decoded = theirs.decode(latents * std + mean).sample
    torch.testing.assert_close(ours.decode(latents), decoded, rtol=0, atol=1e-6)


def test_state_of_another_stream_is_refused():
    vae, other = build("2.1"), build("2.1", decoder_widths=[8, 8, 8, 8, 4])
    latents = random_latents(vae, 1)
    with pytest.raises(ValueError, match=r"state must come from .*8, 6, 4\].* got one from .*8, 8, 4\]"):
        vae.decode_chunk(latents, other.init_state("decode", 2, HEIGHT, WIDTH))
    with pytest.raises(ValueError, match="state must be for 'decode', got one for 'encode'"):
        vae.decode_chunk(latents, vae.init_state("encode", 2, HEIGHT, WIDTH))
    with pytest.raises(ValueError, match=r"latents .*\[1, 4, any, 2, 4\], got \[2, 4, 1, 2, 4\]"):
        vae.decode_chunk(latents, vae.init_state("decode", 1, HEIGHT, WIDTH))
    with pytest.raises(ValueError, match=r"state must be torch.float64 .*, got torch.float32"):
        vae.decode_chunk(latents, build("2.1").float().init_state("decode", 2, HEIGHT, WIDTH))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"encoder_widths": [4, 4, 6, 8, 8]}, r"encoder_widths must be multiples .* got \[4, 4, 6, 8, 8\]"),
        (
            {"decoder_widths": [12, 8, 6, 20, 4]},
            r"decoder_widths must be multiples .* got \[12, 8, 6, 20, 4\]",
        ),
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, r"latents_std must be above 0 for every channel, got \[1"),
        ({"latents_mean": [0.0]}, "latents_mean must hold latent_channels = 4 numbers, got 1"),
    ],
)
def test_settings_of_version_2_2_that_do_not_fit_are_refused(wrong, error):
    with pytest.raises(ValueError, match=error):
        build("2.2", **wrong)


def test_data_that_does_not_fit_is_refused():
    vae = build("2.1")
    with pytest.raises(ValueError, match=r"width must be a positive multiple of 8, got 20"):
        vae.init_state("encode", 1, 16, 20)
    with pytest.raises(ValueError, match=r"frames must be 1 \+ 4n along dimension 2, got 8"):
        vae.encode(random_frames(8))
    with pytest.raises(ValueError, match=r"latents .*\[1, 4, any, 2, 2\], got \[1, 5, 1, 2, 2\]"):
        vae.decode(torch.zeros((1, 5, 1, 2, 2), dtype=torch.float64))
    with pytest.raises(ValueError, match=r"frames must be \[B, C, T, h, w\], got \[3, 16, 16\]"):
        vae.encode(torch.zeros((3, 16, 16), dtype=torch.float64))
    with pytest.raises(ValueError, match=r"latents must be \[B, C, T, h, w\], got \[4, 2, 2\]"):
        vae.decode(torch.zeros((4, 2, 2), dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"latents must be torch.float64 on cpu like the VAE, got torch.float32"
    ):
        vae.decode(random_latents(vae, 1).float())


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"latents_mean": None}, "latents_mean must be given for latent_channels = 4"),
        ({"latents_std": [1, 1]}, "latents_std must hold latent_channels = 4 numbers, got 2"),
        ({"encoder_widths": [4, 4]}, r"encoder_widths must be 5 numbers, got \[4, 4\]"),
        ({"temporal_strides": [1, 2, 3]}, r"temporal_strides must be 3 numbers of 1 or 2, got \[1, 2, 3\]"),
        ({"version": "3"}, "version must be '2.1' or '2.2', got '3'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        build("2.1", **overrides)


def test_weights_of_something_else_are_refused():
    weights = build("2.1").state_dict()
    with pytest.raises(ValueError, match=r"source must hold 'conv2.weight', got 1 tensors without it"):
        load_wan_vae({"x": torch.zeros(1)})
    renamed = {"other" if name == "conv1.bias" else name: weight for name, weight in weights.items()}
    with pytest.raises(ValueError, match=r"1 missing \['conv1.bias'\], 1 unexpected \['other'\]"):
        load_wan_vae(renamed, **STATISTICS)
    weights["decoder.upsamples.1.residual.2.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"upsamples.1.residual.2.bias must be \[8\] in .* got \[3\]"):
        load_wan_vae(weights, **STATISTICS)
