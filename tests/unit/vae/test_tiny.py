import random

import pytest
import torch

from genstream.vae.protocol import VAEState
from genstream.vae.tiny import TinyVideoVAE


def small_vae(**overrides) -> TinyVideoVAE:
    torch.manual_seed(0)
    config = {
        "latent_channels": 4,
        "patch_size": 2,
        "encoder_width": 6,
        "decoder_widths": [8, 6, 5, 4],
        "first_frame_copies": 3,
        "latents_mean": [0.1, -0.2, 0.0, 0.3],
        "latents_std": [0.5, 0.7, 1.2, 0.9],
    } | overrides
    return TinyVideoVAE(**config).double().eval().requires_grad_(requires_grad=False)


def clip(frames: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((2, 3, frames, 32, 48), generator=generator, dtype=torch.float64) * 2 - 1


def random_parts(length: int, seed: int) -> list[int]:
    rng, parts = random.Random(seed), []
    while sum(parts) < length:
        parts.append(rng.randint(0, min(7, length - sum(parts))))
    return parts


def snapshot(state: VAEState) -> VAEState:
    return VAEState.restore(state.tensors(), state.meta())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("copies", "start"), [(0, "zeros"), (3, "zeros"), (3, "still")])
def test_chunked_encode_equals_whole(seed, copies, start):
    vae, frames = small_vae(first_frame_copies=copies, encoder_start=start), clip(21)
    whole = vae.encode(frames)
    state = vae.init_state("encode", 2, 32, 48)
    latents = []
    for part in frames.split(random_parts(21, seed), dim=2):
        state = snapshot(state)
        latents.append(vae.encode_chunk(part, state))
    latents.append(vae.flush(state))
    torch.testing.assert_close(torch.cat(latents, dim=2), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_chunked_decode_equals_whole(seed):
    vae = small_vae()
    latents = torch.randn((2, 4, 11, 2, 3), dtype=torch.float64)
    whole = vae.decode(latents)
    assert whole.shape == (2, 3, 41, 32, 48)
    state = vae.init_state("decode", 2, 32, 48)
    frames = []
    for part in latents.split(random_parts(11, seed), dim=2):
        state = snapshot(state)
        frames.append(vae.decode_chunk(part, state))
    frames.append(vae.flush(state))
    torch.testing.assert_close(torch.cat(frames, dim=2), whole, rtol=0, atol=1e-12)


def test_encode_and_decode_align():
    vae = small_vae()
    latents = vae.encode(clip(13))
    assert latents.shape == (2, 4, 4, 2, 3)
    assert vae.decode(latents).shape == (2, 3, 13, 32, 48)


def test_a_still_start_is_that_of_a_first_frame_that_always_stood_there():
    frames = clip(13)
    waited = torch.cat([frames[:, :, :1].expand(-1, -1, 80, -1, -1), frames], dim=2)
    expected = small_vae().encode(waited)[:, :, 20:]
    torch.testing.assert_close(small_vae(encoder_start="still").encode(frames), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(small_vae().encode(frames)[:, :, 0], expected[:, :, 0], atol=1e-3)


def test_one_frame_is_an_image():
    vae = small_vae()
    latents = vae.encode(clip(1))
    assert latents.shape == (2, 4, 1, 2, 3)
    assert vae.decode(latents).shape == (2, 3, 1, 32, 48)


def test_decode_is_causal():
    vae = small_vae()
    latents = torch.randn((1, 4, 6, 2, 3), dtype=torch.float64)
    changed = latents.clone()
    changed[:, :, 4] += 1
    before, after = vae.decode(latents), vae.decode(changed)
    assert torch.equal(before[:, :, :13], after[:, :, :13])
    assert not torch.equal(before[:, :, 13:], after[:, :, 13:])


def test_encode_is_causal():
    vae, frames = small_vae(), clip(17)
    changed = frames.clone()
    changed[:, :, 9] *= 0.5
    before, after = vae.encode(frames), vae.encode(changed)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3], after[:, :, 3])


def test_memory_is_as_long_as_the_spec_says():
    vae = small_vae()
    memory = vae.spec.memory_latents
    latents = torch.randn((1, 4, memory + 2, 2, 3), dtype=torch.float64)
    changed = latents.clone()
    changed[:, :, 0] += 100
    same = (
        (vae.decode_unclamped(latents) == vae.decode_unclamped(changed)).all(dim=1).flatten(2).all(dim=2)[0]
    )
    assert bool(same[-vae.spec.temporal_ratio :].all())


def test_interleaved_streams_equal_separate_ones():
    vae = small_vae()
    clips = [torch.randn((1, 4, 5, 2, 3), dtype=torch.float64) for _ in range(2)]
    states = [vae.init_state("decode", 1, 32, 48) for _ in clips]
    outputs: list[list[torch.Tensor]] = [[], []]
    for step in range(5):
        for index, latents in enumerate(clips):
            outputs[index].append(vae.decode_chunk(latents[:, :, step : step + 1], states[index]))
    for latents, frames in zip(clips, outputs, strict=True):
        state = vae.init_state("decode", 1, 32, 48)
        alone = [vae.decode_chunk(latents[:, :, step : step + 1], state) for step in range(5)]
        assert torch.equal(torch.cat(alone, dim=2), torch.cat(frames, dim=2))


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_saved_state_continues_the_same_stream(tmp_path, direction):
    vae = small_vae()
    data = clip(14) if direction == "encode" else torch.randn((2, 4, 14, 2, 3), dtype=torch.float64)
    step = vae.encode_chunk if direction == "encode" else vae.decode_chunk
    state = vae.init_state(direction, 2, 32, 48)
    step(data[:, :, :7], state)
    state.save(tmp_path / "state.safetensors")
    fork = state.clone()
    expected = step(data[:, :, 7:], state)
    loaded = VAEState.load(tmp_path / "state.safetensors")
    assert torch.equal(step(data[:, :, 7:], loaded), expected)
    assert torch.equal(step(data[:, :, 7:], fork), expected)


def test_state_does_not_grow():
    vae = small_vae()
    state = vae.init_state("decode", 1, 32, 48)
    size = state.nbytes
    for _ in range(5):
        vae.decode_chunk(torch.randn((1, 4, 2, 2, 3), dtype=torch.float64), state)
        assert state.nbytes == size


def test_failed_step_leaves_the_state(monkeypatch):
    vae = small_vae()
    state = vae.init_state("decode", 1, 32, 48)
    latents = torch.randn((1, 4, 2, 2, 3), dtype=torch.float64)
    vae.decode_chunk(latents, state)
    fork = state.clone()
    with monkeypatch.context() as patch:
        patch.setattr(vae.decoder[-1], "forward", None)
        with pytest.raises(TypeError):
            vae.decode_chunk(latents, state)
    assert torch.equal(vae.decode_chunk(latents, state), vae.decode_chunk(latents, fork))


def test_save_pretrained_round_trip(tmp_path):
    vae = small_vae().float()
    vae.save_pretrained(tmp_path)
    loaded = TinyVideoVAE.from_pretrained(tmp_path)
    frames = clip(5).float()
    assert torch.equal(loaded.encode(frames), vae.encode(frames))
    assert loaded.config.latents_mean == [0.1, -0.2, 0.0, 0.3]


def test_works_when_loaded_in_half_precision(tmp_path):
    vae = small_vae().float()
    vae.save_pretrained(tmp_path)
    half = TinyVideoVAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    frames = clip(5).float()
    latents = half.encode(frames.bfloat16())
    assert latents.dtype == half.decode(latents).dtype == torch.bfloat16
    torch.testing.assert_close(latents.float(), vae.encode(frames), rtol=0.05, atol=0.05)


def test_latents_are_normalised_once():
    raw, normalised = small_vae(latents_mean=None, latents_std=None), small_vae()
    latents = normalised.encode(clip(5))
    mean = torch.tensor(normalised.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(normalised.config.latents_std).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(latents * std + mean, raw.encode(clip(5)), rtol=0, atol=1e-6)


def test_state_of_another_stream_is_refused():
    vae, other = small_vae(), small_vae(decoder_widths=[8, 6, 4, 4])
    latents = torch.zeros((2, 4, 1, 2, 3), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"state must come from .*8, 6, 5, 4.* got one from .*8, 6, 4, 4"):
        vae.decode_chunk(latents, other.init_state("decode", 2, 32, 48))
    with pytest.raises(ValueError, match="state must be for 'decode', got one for 'encode'"):
        vae.decode_chunk(latents, vae.init_state("encode", 2, 32, 48))
    with pytest.raises(ValueError, match=r"latents .*\[1, 4, any, 2, 3\], got \[2, 4, 1, 2, 3\]"):
        vae.decode_chunk(latents, vae.init_state("decode", 1, 32, 48))
    with pytest.raises(ValueError, match=r"float64.*float32"):
        vae.decode_chunk(latents, small_vae().float().init_state("decode", 2, 32, 48))


def test_sizes_and_counts_that_do_not_divide_are_refused():
    vae = small_vae()
    with pytest.raises(ValueError, match=r"width must be a positive multiple of 16, got 40"):
        vae.init_state("encode", 1, 32, 40)
    with pytest.raises(ValueError, match="frames must be 1 \\+ 4n along dimension 2, got 8"):
        vae.encode(clip(8))
    with pytest.raises(ValueError, match=r"frames must be \[B, C, T, h, w\], got \[3, 16, 16\]"):
        vae.encode(torch.zeros((3, 16, 16), dtype=torch.float64))
    with pytest.raises(ValueError, match=r"latents must be \[B, C, T, h, w\], got \[4, 2, 2\]"):
        vae.decode(torch.zeros((4, 2, 2), dtype=torch.float64))
    with pytest.raises(ValueError, match=r"latents must be torch.float64 on cpu like .* got torch.float32"):
        vae.decode(torch.zeros((1, 4, 1, 2, 2)))
    with pytest.raises(
        ValueError, match=r"decoder_patch_size .* encoder's 8 or less, got 2 times \[2, 2, 2\]"
    ):
        TinyVideoVAE(decoder_patch_size=2)
    with pytest.raises(ValueError, match="first_frame_copies must be 0 or 3, got 2"):
        small_vae(first_frame_copies=2)
    with pytest.raises(ValueError, match="encoder_start must be one of zeros, still, got 'frame'"):
        small_vae(encoder_start="frame")
    with pytest.raises(ValueError, match="encoder_start must be 'zeros' unless first_frame_copies is 3"):
        small_vae(encoder_start="still", first_frame_copies=0)


def test_state_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"written by VAEState.save"):
        VAEState.load(tmp_path / "other.safetensors")


def test_a_state_file_that_is_cut_off_is_refused(tmp_path):
    vae, path = small_vae(), tmp_path / "state.safetensors"
    vae.init_state("decode", 1, 32, 32).save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"path must be a whole safetensors file, got .*state\.safetensors"):
        VAEState.load(path)
    path.write_text("no state at all")
    with pytest.raises(ValueError, match="path must be a whole safetensors file"):
        VAEState.load(path)
