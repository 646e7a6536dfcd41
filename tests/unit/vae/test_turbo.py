import random
import threading

import pytest
import torch

from genstream.vae.identity import describe
from genstream.vae.protocol import VAEState
from genstream.vae.turbo import TurboVAED
from genstream.vae.turbo_weights import load_turbo_vaed

SMALL = {
    "latent_channels": 4,
    "decoder_block_out_channels": (4, 4, 6, 6),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "decoder_spatio_only": (True, False, False, False),
    "decoder_dw_kernel_size": 3,
}
CAUSAL = {"decoder_causal": True, "depthwise_causal": True}
VARIANTS = {
    "causal": CAUSAL,
    "causal, no surplus": {**CAUSAL, "is_video_dc_ae": True},
    "causal, patches": {**CAUSAL, "patch_size": 4, "decoder_block_out_channels": (16, 4, 6, 6)},
    "windows": {"context_latents": 2, "chunk_latents": 2, "lookahead_latents": 1},
    "windows, no surplus": {"is_video_dc_ae": True, "context_latents": 1, "lookahead_latents": 0},
    "windows, one sided": {"decoder_causal": True, "chunk_latents": 3},
}


def small_vae(**overrides) -> TurboVAED:
    torch.manual_seed(0)
    vae = TurboVAED(**{**SMALL, **overrides}).double().eval().requires_grad_(requires_grad=False)
    vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    vae.latents_std.copy_(torch.tensor([1.0, 0.5, 2.0, 1.0]))
    return vae


@pytest.fixture(params=VARIANTS, scope="module")
def vae(request):
    return small_vae(**VARIANTS[request.param])


def some_latents(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, 4, count, 2, 1), generator=generator, dtype=torch.float64)


def start(vae: TurboVAED) -> VAEState:
    ratio = vae.spec.spatial_ratio
    return vae.init_state("decode", 2, 2 * ratio, ratio)


def streamed(vae: TurboVAED, latents: torch.Tensor, parts: list[int]) -> torch.Tensor:
    """A stream whose state is taken apart and put together between chunks."""
    state, frames = start(vae), []
    for part in latents.split(parts, dim=2):
        state = VAEState.restore(state.clone().tensors(), state.meta())
        frames.append(vae.decode_chunk(part, state))
    return torch.cat([*frames, vae.flush(state)], dim=2)


def partitions(length: int) -> list[list[int]]:
    even = [[size] * (length // size) + [length % size] for size in (1, 2, 3, length)]
    rng, uneven = random.Random(length), []
    while sum(uneven) < length:
        uneven.append(rng.randint(0, min(5, length - sum(uneven))))
    return [*even, uneven]


def test_any_chunking_gives_the_same_frames(vae):
    latents, spec = some_latents(8), vae.spec
    results = [streamed(vae, latents, parts) for parts in partitions(8)]
    count = spec.first_frames + 7 * spec.temporal_ratio
    assert results[0].shape == (2, 3, count, 2 * spec.spatial_ratio, spec.spatial_ratio)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-11)
    whole = vae.decode(latents)
    assert whole.shape == results[0].shape
    error = (results[0] - whole).abs().max().item()
    assert vae.window_error(latents) == pytest.approx(error, rel=1e-6, abs=1e-11)
    assert (error < 1e-11) == (spec.exactness == "exact")


@pytest.mark.parametrize("surplus", [False, True])
def test_windows_that_cover_the_reach_are_exact(surplus):
    config = {"decoder_layers_per_block": (0, 0, 0, 0, 1), "is_video_dc_ae": surplus, "chunk_latents": 2}
    back, ahead = small_vae(**config).reach_latents
    latents = some_latents(2 * (back + ahead))
    covering = small_vae(**config, context_latents=back, lookahead_latents=ahead)
    assert covering.spec.exactness == "exact"
    assert covering.window_error(latents) < 1e-11
    short = small_vae(**config, context_latents=back, lookahead_latents=ahead - 1)
    assert short.spec.exactness == "approximate"
    assert short.window_error(latents) > 1e-9


def test_frames_come_when_their_look_ahead_is_known():
    vae = small_vae(**VARIANTS["windows"])
    state, counts = start(vae), []
    for latent in some_latents(5).split(1, dim=2):
        counts.append(vae.decode_chunk(latent, state).shape[2])
    assert counts == [0, 0, 5, 0, 8]
    assert vae.flush(state).shape[2] == 4
    assert vae.flush(state).shape[2] == 0
    with pytest.raises(ValueError, match="latents must not follow a flush"):
        vae.decode_chunk(some_latents(1), state)


def test_causal_decoding_never_looks_ahead():
    vae = small_vae(**CAUSAL)
    latents = some_latents(6)
    changed = latents.clone()
    changed[:, :, 4] += 1
    before, after = vae.decode_unclamped(latents), vae.decode_unclamped(changed)
    assert torch.equal(before[:, :, :13], after[:, :, :13])
    assert not torch.equal(before[:, :, 13], after[:, :, 13])
    assert vae.spec.lookahead_latents == 0


def test_memory_of_the_causal_decoder_is_as_long_as_the_spec_says():
    vae = small_vae(**CAUSAL, decoder_layers_per_block=(0, 0, 0, 0, 0))
    memory, ratio = vae.spec.memory_latents, vae.spec.temporal_ratio
    latents = some_latents(memory + 2)
    changed = latents.clone()
    changed[:, :, 0] += 100
    same = (vae.decode_unclamped(latents) == vae.decode_unclamped(changed)).all(dim=1).flatten(2).all(dim=2)
    assert bool(same[:, -ratio:].all())
    assert not bool(same[:, -2 * ratio : -ratio].all())


def test_interleaved_streams_and_threads_equal_separate_ones(vae):
    clips = [some_latents(5, seed) for seed in (1, 2)]
    expected = [streamed(vae, latents, [1] * 5) for latents in clips]
    states, mixed, threaded = [start(vae), start(vae)], [[], []], [None, None]
    for step in range(5):
        for index, latents in enumerate(clips):
            mixed[index].append(vae.decode_chunk(latents[:, :, step : step + 1], states[index]))

    def work(index: int) -> None:
        threaded[index] = streamed(vae, clips[index], [1] * 5)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        mixed[index].append(vae.flush(states[index]))
        assert torch.equal(torch.cat(mixed[index], dim=2), expected[index])
        assert torch.equal(threaded[index], expected[index])


def test_state_is_saved_and_does_not_grow(vae, tmp_path):
    state = start(vae)
    period = vae.spec.chunk_latents
    sizes = set()
    for _ in range(8):
        vae.decode_chunk(some_latents(period), state)
        sizes.add(state.nbytes)
    assert len(sizes) <= 3
    state.save(tmp_path / "state.safetensors")
    loaded = VAEState.load(tmp_path / "state.safetensors")
    latents = some_latents(3)
    assert torch.equal(vae.decode_chunk(latents, loaded), vae.decode_chunk(latents, state))


def test_latents_are_denormalised_once():
    vae, raw = small_vae(scaling_factor=0.5), small_vae()
    raw.load_state_dict({**vae.state_dict(), "latents_mean": torch.zeros(4), "latents_std": torch.ones(4)})
    latents = some_latents(2)
    mean, std = vae.latents_mean.view(4, 1, 1, 1), vae.latents_std.view(4, 1, 1, 1)
    torch.testing.assert_close(
        vae.decode(latents), raw.decode(latents / 0.5 * std + mean), rtol=0, atol=1e-12
    )


def test_save_pretrained_round_trip(tmp_path):
    vae = small_vae(**CAUSAL).float()
    vae.save_pretrained(tmp_path)
    loaded = TurboVAED.from_pretrained(tmp_path)
    latents = some_latents(3).float()
    assert torch.equal(loaded.decode(latents), vae.decode(latents))
    assert torch.equal(loaded.decode_chunk(latents, start(vae)), vae.decode(latents))


PUBLISHED = {
    "dense": {"decoder_is_dw_conv": (False,) * 5, "decoder_dw_kernel_size": 1},
    "separable": {"decoder_is_dw_conv": (False, True, False, True, True)},
    "patches": {"patch_size": 4, "decoder_block_out_channels": (16, 4, 6, 6)},
    "all in time": {"decoder_spatio_only": (False,) * 4, "decoder_layers_per_block": (2, 1, 3, 1, 2)},
    "told": {"decoder_causal": True, "is_video_dc_ae": True},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_say_what_they_are(name, tmp_path):
    vae = small_vae(**PUBLISHED[name]).float()
    told = PUBLISHED[name] if name == "told" else {}
    torch.save(vae.state_dict(), tmp_path / "whole.pth")
    loaded = load_turbo_vaed(tmp_path / "whole.pth", **told)
    assert describe(loaded) == describe(vae)
    latents = some_latents(2).float()
    assert torch.equal(loaded.decode(latents), vae.decode(latents))


def test_a_decoder_alone_is_loaded_and_heads_are_left_out():
    vae = small_vae().float()
    heads = {"aligned_feature_projection_heads.0.weight": torch.zeros(1)}
    loaded = load_turbo_vaed(vae.decoder.state_dict() | heads, latents_std=[2.0] * 4, scaling_factor=0.5)
    assert loaded.latents_mean.tolist() == [0] * 4
    assert loaded.latents_std.tolist() == [2] * 4
    latents = some_latents(2).float()
    raw = load_turbo_vaed(vae.decoder.state_dict())
    torch.testing.assert_close(loaded.decode(latents), raw.decode(latents * 4), rtol=0, atol=1e-6)


def test_weights_of_something_else_are_refused():
    weights = small_vae().decoder.state_dict()
    for match, source in {
        r"source must hold 'decoder.conv_in.conv.weight', got 1 tensors": {"x": torch.zeros(1)},
        r"0 missing \[\], 1 unexpected \['decoder.extra'\]": weights | {"extra": torch.zeros(1)},
        r"1 missing \['decoder.conv_out.conv.bias'\]": {
            name: weight for name, weight in weights.items() if name != "conv_out.conv.bias"
        },
    }.items():
        with pytest.raises(ValueError, match=match):
            load_turbo_vaed(source)
    with pytest.raises(ValueError, match="latents_mean must hold latent_channels = 4 numbers, got 1"):
        load_turbo_vaed(weights, latents_mean=[0.0])


def test_bad_input_is_refused():
    vae, latents = small_vae(), some_latents(2)
    for match, call in {
        r"direction must be 'decode' .* got 'encode'": lambda: vae.init_state("encode", 1, 8, 8),
        r"TurboVAED has no encoder": lambda: vae.encode(torch.zeros(1, 3, 1, 8, 8)),
        r"height must be a positive multiple of 8, got 12": lambda: vae.init_state("decode", 1, 12, 8),
        r"latents .*\[2, 4, any, 2, 1\], got \[1, 4": lambda: vae.decode_chunk(latents[:1], start(vae)),
        r"latents .* got \[2, 3, 2, 2, 1\]": lambda: vae.decode(latents[:, :3]),
        r"latents must be at least 1 along dimension 2, got 0": lambda: vae.decode(latents[:, :, :0]),
        r"latents must be torch.float64 .* got torch.float32": lambda: vae.decode(latents.float()),
        r"state must come from .* got one from": lambda: vae.decode_chunk(
            latents, start(small_vae(**CAUSAL))
        ),
        r"float64.*float32": lambda: vae.decode_chunk(latents, start(small_vae().float())),
        r"decoder_is_dw_conv must be 5 values for 4 levels": lambda: small_vae(decoder_is_dw_conv=(True,)),
        r"patch_size must be 1 or 4, got 2": lambda: small_vae(patch_size=2),
        r"must start with a multiple of 16": lambda: small_vae(patch_size=4),
        r"decoder_dw_kernel_size must be odd, got 4": lambda: small_vae(decoder_dw_kernel_size=4),
        r"context_latents must be at least 1, got 0": lambda: small_vae(context_latents=0),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
