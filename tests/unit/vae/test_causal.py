import random
import threading

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from genstream.vae.adapters import stream_vae
from genstream.vae.causal import CausalVideoVAE
from genstream.vae.protocol import VAEState

VARIANTS = {
    "kl": {},
    "deterministic": {"latents": "deterministic", "latent_channels": 16},
    "channel": {"norm": "channel", "encoder_temporal_kernels": (3, 3, 3, 3)},
    "plain": {"mid_block_add_attention": False, "decoder_temporal_kernels": (1, 3, 1, 3)},
    "text": {"text_dim": 6, "text_heads": 2, "use_quant_conv": True, "use_post_quant_conv": True},
}


def small_vae(**overrides) -> CausalVideoVAE:
    torch.manual_seed(0)
    config = {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2} | overrides
    channels = config.get("latent_channels", 4)
    statistics = {"latents_mean": [0.25] * channels, "latents_std": [0.5] * channels}
    vae = CausalVideoVAE(**{**statistics, **config}).double().eval().requires_grad_(requires_grad=False)
    for weight in vae.parameters():
        # The blends start as ones that pass a frame on, which would hide mistakes in their memory.
        weight.add_(torch.randn_like(weight) * 0.1)
    return vae


@pytest.fixture(params=VARIANTS, scope="module")
def vae(request):
    return small_vae(**VARIANTS[request.param])


def clip(frames: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((2, 3, frames, 16, 24), generator=generator, dtype=torch.float64) * 2 - 1


def some_latents(vae: CausalVideoVAE, count: int, batch_size: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    shape = (batch_size, vae.config.latent_channels, count, 2, 3)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def partitions(length: int) -> list[list[int]]:
    """Chunks of 1, 2, 3, the whole, and uneven ones with empty chunks among them."""
    even = [[size] * (length // size) + [length % size] for size in (1, 2, 3, length)]
    rng, uneven = random.Random(length), []
    while sum(uneven) < length:
        uneven.append(rng.randint(0, min(5, length - sum(uneven))))
    return [*even, uneven]


def in_chunks(step, data: torch.Tensor, parts: list[int], state: VAEState) -> torch.Tensor:
    """The results of a stream whose state is taken apart and put together between chunks."""
    results = []
    for part in data.split(parts, dim=2):
        state = VAEState.restore(state.clone().tensors(), state.meta())
        results.append(step(part, state))
    return torch.cat(results, dim=2)


def test_chunked_encode_equals_whole(vae):
    frames = clip(17)
    whole = vae.encode(frames)
    assert whole.shape == (2, vae.config.latent_channels, 5, 2, 3)
    for parts in partitions(17):
        chunked = in_chunks(vae.encode_chunk, frames, parts, vae.init_state("encode", 2, 16, 24))
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-11)


def test_chunked_decode_equals_whole(vae):
    latents = some_latents(vae, 7)
    whole = vae.decode(latents)
    assert whole.shape == (2, 3, 25, 16, 24)
    for parts in partitions(7):
        chunked = in_chunks(vae.decode_chunk, latents, parts, vae.init_state("decode", 2, 16, 24))
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("chunk_latents", [1, 2])
def test_long_clips_take_the_memory_of_a_chunk(vae, chunk_latents):
    frames = clip(13)
    latents = vae.encode(frames)
    whole = vae.decode(latents)
    seen = []
    hook = vae.decoder.conv_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    decoded = vae.decode(latents, chunk_latents)
    hook.remove()
    assert max(seen) <= 4 * chunk_latents
    torch.testing.assert_close(decoded, whole, rtol=0, atol=1e-11)
    torch.testing.assert_close(vae.encode(frames, chunk_latents), latents, rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="chunk_latents must be at least 1, got 0"):
        vae.decode(latents, 0)


def test_later_input_changes_no_earlier_output(vae):
    frames, latents = clip(13), some_latents(vae, 4)
    other_frames, other_latents = frames.clone(), latents.clone()
    other_frames[:, :, 9] *= 0.5
    other_latents[:, :, 2] += 1
    before, after = vae.encode(frames), vae.encode(other_frames)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3], after[:, :, 3])
    before, after = vae.decode_unclamped(latents), vae.decode_unclamped(other_latents)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5], after[:, :, 5])


@pytest.mark.parametrize("kernels", [(1, 1, 1, 1), (1, 3, 1, 1)])
def test_memory_is_as_long_as_the_spec_says(kernels):
    vae = small_vae(decoder_temporal_kernels=kernels, norm="channel", mid_block_add_attention=False)
    memory, ratio = vae.spec.memory_latents, vae.spec.temporal_ratio
    latents = some_latents(vae, memory + 2, 1)
    changed = latents.clone()
    changed[:, :, 0] += 100
    same = (
        (vae.decode_unclamped(latents) == vae.decode_unclamped(changed)).all(dim=1).flatten(2).all(dim=2)[0]
    )
    assert bool(same[-ratio:].all())
    assert not bool(same[-2 * ratio : -ratio].all())


def test_interleaved_streams_and_threads_equal_separate_ones(vae):
    clips = [some_latents(vae, 5), some_latents(vae, 5) * 0.5]

    def alone(latents: torch.Tensor) -> torch.Tensor:
        state = vae.init_state("decode", 2, 16, 24)
        return torch.cat([vae.decode_chunk(latent, state) for latent in latents.split(1, dim=2)], dim=2)

    expected = [alone(latents) for latents in clips]
    states = [vae.init_state("decode", 2, 16, 24) for _ in clips]
    mixed = [[], []]
    for step in range(5):
        for index, latents in enumerate(clips):
            mixed[index].append(vae.decode_chunk(latents[:, :, step : step + 1], states[index]))
    threaded = [None, None]

    def work(index: int) -> None:
        threaded[index] = alone(clips[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert torch.equal(torch.cat(mixed[index], dim=2), expected[index])
        assert torch.equal(threaded[index], expected[index])


def image_vae(latent_channels: int = 4, **overrides) -> AutoencoderKL:
    torch.manual_seed(0)
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": (4, 4, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": latent_channels,
    }
    return AutoencoderKL(**{**config, **overrides}).double().eval().requires_grad_(requires_grad=False)


@pytest.mark.parametrize(
    ("image", "kernels"),
    [
        (image_vae(), (1, 1, 3, 3)),
        (image_vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.5), (3, 3, 3, 3)),
        (image_vae(mid_block_add_attention=False), (1, 1, 1, 1)),
    ],
)
def test_one_frame_is_what_the_image_vae_makes_of_it(image, kernels):
    vae = CausalVideoVAE.from_image_vae(image, encoder_temporal_kernels=kernels, text_dim=6).eval()
    frames = clip(1)
    mode = image.encode(frames[:, :, 0]).latent_dist.mode()
    expected = (mode - (image.config.shift_factor or 0)) * image.config.scaling_factor
    # The factor is kept in single precision.
    latents = vae.encode(frames)
    torch.testing.assert_close(latents[:, :, 0], expected, rtol=1e-6, atol=1e-7)
    decoded = vae.decode_unclamped(latents)
    torch.testing.assert_close(decoded[:, :, 0], image.decode(mode).sample, rtol=0, atol=1e-6)
    still = vae.decode_unclamped(vae.encode(frames.expand(-1, -1, 9, -1, -1)))
    torch.testing.assert_close(still, decoded.expand(-1, -1, 9, -1, -1), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "statistics",
    [{"shift_factor": 0.5}, {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [0.5, 1, 2, 4]}],
)
def test_latents_are_those_that_diffusion_models_expect_of_the_image_vae(statistics):
    image = image_vae(**statistics)
    latents = CausalVideoVAE.from_image_vae(image).eval().encode(clip(1))
    torch.testing.assert_close(latents, stream_vae(image).encode(clip(1)), rtol=1e-6, atol=1e-7)


def test_image_vaes_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"image_vae must have act_fn = silu, got relu"):
        CausalVideoVAE.from_image_vae(image_vae(act_fn="relu"))
    with pytest.raises(ValueError, match="image_vae must be an AutoencoderKL, got AutoencoderTiny"):
        CausalVideoVAE.from_image_vae(AutoencoderTiny())


def test_latents_are_normalised_once():
    raw = small_vae(latents_mean=None, latents_std=None)
    vae = small_vae(latents_mean=[0.5, -1, 0, 2], latents_std=[0.5, 2, 1, 4])
    vae.load_state_dict(raw.state_dict())
    mean, std = (torch.tensor(values).view(1, 4, 1, 1, 1) for values in ([0.5, -1, 0, 2], [0.5, 2, 1, 4]))
    frames = clip(5)
    latents = vae.encode(frames)
    torch.testing.assert_close(latents * std + mean, raw.encode(frames), rtol=0, atol=1e-12)
    torch.testing.assert_close(vae.decode(latents), raw.decode(latents * std + mean), rtol=0, atol=1e-12)
    posterior = vae.encode_window(frames, vae.init_state("encode", 2, 16, 24))
    of_raw = raw.encode_window(frames, raw.init_state("encode", 2, 16, 24))
    spread = (posterior.log_variance / 2).exp() * std
    torch.testing.assert_close(spread, (of_raw.log_variance / 2).exp(), rtol=0, atol=1e-12)


def test_samples_have_the_spread_of_the_posterior():
    vae = small_vae()
    posterior = vae.encode_window(clip(1), vae.init_state("encode", 2, 16, 24))
    draws = torch.stack([posterior.sample(torch.Generator().manual_seed(seed)) for seed in range(400)])
    torch.testing.assert_close(draws.mean(dim=0), posterior.mean, rtol=0, atol=0.5)
    ratio = draws.std(dim=0) / (posterior.log_variance / 2).exp()
    assert bool(((ratio > 0.8) & (ratio < 1.2)).all())
    exact = small_vae(latents="deterministic")
    posterior = exact.encode_window(clip(1), exact.init_state("encode", 2, 16, 24))
    assert posterior.log_variance is None
    assert torch.equal(posterior.sample(), posterior.mean)


def test_text_steers_the_decoder_from_the_next_chunk_on():
    vae = small_vae(**VARIANTS["text"])
    latents, text = some_latents(vae, 4), torch.randn((2, 3, 6), dtype=torch.float64)
    state, silent = (vae.init_state("decode", 2, 16, 24) for _ in range(2))
    vae.condition(silent, text[:, :0], torch.ones(2, 0))
    plain = vae.decode(latents)
    assert torch.equal(vae.decode_chunk(latents, silent), plain)
    first = vae.decode_chunk(latents[:, :, :2], state)
    torch.testing.assert_close(first, plain[:, :, :5], rtol=0, atol=1e-11)
    vae.condition(state, text, torch.ones(2, 3))
    told = vae.decode_chunk(latents[:, :, 2:], state)
    assert (told - plain[:, :, 5:]).abs().max() > 1e-3


def test_masked_tokens_are_not_seen():
    vae = small_vae(**VARIANTS["text"])
    latents, text = some_latents(vae, 2), torch.randn((2, 5, 6), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    results = []
    for tokens, seen in ((text, mask), (text[:, :3], mask[:, :3])):
        state = vae.init_state("decode", 2, 16, 24)
        vae.condition(state, tokens, seen)
        results.append(vae.decode_chunk(latents, state))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


def test_a_new_text_module_changes_nothing():
    with_text, without = (CausalVideoVAE.from_image_vae(image_vae(), text_dim=dim) for dim in (6, None))
    latents = some_latents(without, 2)
    state = with_text.init_state("decode", 2, 16, 24)
    with_text.condition(state, torch.randn((2, 3, 6), dtype=torch.float64), torch.ones(2, 3))
    assert torch.equal(with_text.decode_chunk(latents, state), without.decode(latents))


def test_a_vae_without_time_works_frame_by_frame():
    flat = (1, 1, 1, 1)
    vae = small_vae(
        temporal_levels=(False,) * 3, encoder_temporal_kernels=flat, decoder_temporal_kernels=flat
    )
    assert (vae.spec.temporal_ratio, vae.spec.memory_latents) == (1, 0)
    frames = clip(3)
    latents = torch.cat([vae.encode(frame) for frame in frames.split(1, dim=2)], dim=2)
    torch.testing.assert_close(vae.encode(frames), latents, rtol=0, atol=1e-11)
    state = vae.init_state("decode", 2, 16, 24)
    decoded = torch.cat([vae.decode_chunk(latent, state) for latent in latents.split(1, dim=2)], dim=2)
    torch.testing.assert_close(vae.decode(latents), decoded, rtol=0, atol=1e-11)


def test_flush_completes_the_last_group(vae):
    frames = clip(7)
    state = vae.init_state("encode", 2, 16, 24)
    latents = torch.cat([vae.encode_chunk(frames, state), vae.flush(state), vae.flush(state)], dim=2)
    padded = torch.cat([frames, frames[:, :, -1:].expand(-1, -1, 2, -1, -1)], dim=2)
    torch.testing.assert_close(latents, vae.encode(padded), rtol=0, atol=1e-11)
    state = vae.init_state("decode", 2, 16, 24)
    assert vae.flush(state).shape == (2, 3, 0, 16, 24)


def test_saved_state_continues_the_same_stream(vae, tmp_path):
    for direction, data in (("encode", clip(7)), ("decode", some_latents(vae, 3))):
        step = vae.encode_chunk if direction == "encode" else vae.decode_chunk
        for started in (0, 2):
            state = vae.init_state(direction, 2, 16, 24)
            step(data[:, :, :started], state)
            state.save(tmp_path / "state.safetensors")
            loaded = VAEState.load(tmp_path / "state.safetensors")
            assert torch.equal(step(data[:, :, started:], loaded), step(data[:, :, started:], state))


def test_state_does_not_grow():
    vae = small_vae()
    state = vae.init_state("decode", 2, 16, 24)
    sizes = set()
    for _ in range(6):
        vae.decode_chunk(some_latents(vae, 2), state)
        sizes.add(state.nbytes)
    assert len(sizes) == 1
    assert all(slot.grad_fn is None for slot in state.slots.values())


def test_failed_step_leaves_the_state(monkeypatch):
    vae = small_vae()
    state = vae.init_state("decode", 2, 16, 24)
    latents = some_latents(vae, 2)
    vae.decode_chunk(latents, state)
    fork = state.clone()
    with monkeypatch.context() as patch:
        patch.setattr(vae.decoder.conv_out, "forward", None)
        with pytest.raises(TypeError):
            vae.decode_chunk(latents, state)
    assert torch.equal(vae.decode_chunk(latents, state), vae.decode_chunk(latents, fork))


def test_save_pretrained_round_trip(tmp_path):
    vae = small_vae(**VARIANTS["text"]).float()
    vae.save_pretrained(tmp_path)
    loaded = CausalVideoVAE.from_pretrained(tmp_path)
    frames = clip(5).float()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in vae.state_dict().items())
    torch.testing.assert_close(loaded(frames), vae(frames), rtol=0, atol=1e-5)
    assert dict(loaded.config)["latents_mean"] == [0.25] * 4
    state = vae.init_state("decode", 2, 16, 24)
    latents = some_latents(vae, 1).float()
    torch.testing.assert_close(loaded.decode_chunk(latents, state), vae.decode(latents), rtol=0, atol=1e-5)


def test_bad_input_is_refused():
    vae = small_vae()
    encoding, decoding = (vae.init_state(direction, 2, 16, 24) for direction in ("encode", "decode"))
    latents = some_latents(vae, 1)
    other = small_vae(block_out_channels=(4, 4, 8, 12))
    for match, call in {
        r"width must be a positive multiple of 8, got 20": lambda: vae.init_state("decode", 1, 16, 20),
        r"frames must be 1 \+ 4n along dimension 2, got 8": lambda: vae.encode(clip(8)),
        r"frames must be \[B, C, T, h, w\], got \[3, 16, 24\]": lambda: vae.encode(clip(1)[0, :, 0]),
        r"latents .*\[2, 4, any, 2, 3\], got \[2, 3, 1, 2, 3\]": lambda: vae.decode(latents[:, :3]),
        r"latents .*\[2, 4, any, 2, 3\], got \[1, 4, 1": lambda: vae.decode_chunk(latents[:1], decoding),
        r"frames .*\[2, 3, any, 16, 24\], got": lambda: vae.encode_chunk(clip(1)[..., :8], encoding),
        r"latents must be torch.float64 .* got torch.float32": lambda: vae.decode(latents.float()),
        r"state must be for 'decode', got one for 'encode'": lambda: vae.decode_chunk(latents, encoding),
        r"state must come from .*8, 8\].* got one from .*8, 12\]": lambda: vae.decode_chunk(
            latents, other.init_state("decode", 2, 16, 24)
        ),
        r"float64.*float32": lambda: vae.decode_chunk(
            latents, small_vae().float().init_state("decode", 2, 16, 24)
        ),
        r"text needs a VAE with text_dim": lambda: vae.condition(decoding, latents, latents),
        r"temporal_levels must be 3 values for 4 levels": lambda: small_vae(temporal_levels=(True,)),
        r"encoder_temporal_kernels must be 4 numbers of 1 or 3": lambda: small_vae(
            encoder_temporal_kernels=(1, 2, 3, 3)
        ),
        r"norm must be one of group, channel, got 'batch'": lambda: small_vae(norm="batch"),
        r"block_out_channels must divide by norm_num_groups = 3": lambda: small_vae(norm_num_groups=3),
        r"text_heads must divide .* = 8, got 3": lambda: small_vae(text_dim=6, text_heads=3),
        r"latents_std must be above 0 .* got \[1, -1, 1, 1\]": lambda: small_vae(latents_std=[1, -1, 1, 1]),
        r"latent_channels must be at least 1, got 0": lambda: small_vae(latent_channels=0),
        r"latents_std must hold latent_channels = 4 numbers, got 2": lambda: small_vae(latents_std=[1, 2]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
