import itertools
import random

import diffusers
import pytest
import torch
from torch import Tensor

from genstream.vae.adapters import stream_vae
from genstream.vae.protocol import VAEState
from genstream.vae.tiling import TiledVAE, Tiling, _places
from genstream.vae.tiny import TinyVideoVAE

HEIGHT, WIDTH = 64, 80
TILING = Tiling(height_px=32, width_px=48, overlap_px=16)


def small_vae() -> TinyVideoVAE:
    torch.manual_seed(0)
    vae = TinyVideoVAE(
        latent_channels=4, patch_size=2, encoder_width=6, decoder_widths=[8, 6, 5, 4], first_frame_copies=3
    )
    return vae.double().eval().requires_grad_(requires_grad=False)


def clip(frames: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((2, 3, frames, HEIGHT, WIDTH), generator=generator, dtype=torch.float64) * 2 - 1


def latents(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 4, count, HEIGHT // 16, WIDTH // 16)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def restored(state: VAEState) -> VAEState:
    return VAEState.restore({name: slot.clone() for name, slot in state.tensors().items()}, state.meta())


def test_a_clip_has_as_many_frames_as_the_vae_takes():
    published = TinyVideoVAE(latent_channels=4, encoder_width=6, decoder_widths=[8, 6, 5, 4]).double()
    assert TiledVAE(published, TILING).encode(clip(6)).shape[2] == 2  # fills up its last group
    with pytest.raises(ValueError, match=r"frames must be 1 \+ 4n along dimension 2, got 6"):
        TiledVAE(small_vae(), TILING).encode(clip(6))


@pytest.mark.parametrize("parts", [[1] * 5, [2, 0, 3], [3, 1, 1]])
def test_tiles_of_a_stream_equal_those_of_the_whole_clip(parts):
    tiled = TiledVAE(small_vae(), TILING)
    whole = tiled.decode(latents(5))
    assert whole.shape == (2, 3, 17, HEIGHT, WIDTH)
    state = tiled.init_state("decode", 2, HEIGHT, WIDTH)
    frames = []
    for part in latents(5).split(parts, dim=2):
        state = restored(state)
        frames.append(tiled.decode_chunk(part, state))
    frames.append(tiled.flush(state))
    torch.testing.assert_close(torch.cat(frames, dim=2), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("parts", [[1] * 11, [5, 0, 6]])
def test_encoded_tiles_of_a_stream_equal_those_of_the_whole_clip(parts):
    tiled = TiledVAE(small_vae(), TILING)
    frames = clip(13)
    state = tiled.init_state("encode", 2, HEIGHT, WIDTH)
    chunks = [tiled.encode_chunk(part, state) for part in frames[:, :, :11].split(parts, dim=2)]
    chunks += [tiled.encode_chunk(frames[:, :, 11:], state), tiled.flush(state)]
    whole = tiled.encode(frames)
    assert whole.shape == (2, 4, 4, HEIGHT // 16, WIDTH // 16)
    torch.testing.assert_close(torch.cat(chunks, dim=2), whole, rtol=0, atol=1e-12)


def test_tiles_of_an_adapted_vae_stream_alike():
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 2.0, 1.0, 1.5]}
    wan = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, **statistics)
    vae = stream_vae(wan.eval().requires_grad_(requires_grad=False))
    tiled = TiledVAE(vae, Tiling(height_px=16, width_px=16, overlap_px=8))
    clip = torch.randn(1, 4, 3, 2, 3)
    state = tiled.init_state("decode", 1, 16, 24)
    frames = [tiled.decode_chunk(part, state) for part in clip.split(1, dim=2)]
    assert torch.equal(torch.cat(frames, dim=2), tiled.decode(clip))
    with pytest.raises(ValueError, match=r"latents must be torch\.float32 on cpu like the VAE"):
        tiled.decode_chunk(clip.double(), state)


def test_inside_of_a_tile_nothing_changes_and_seams_are_blended():
    """Far from the seams a tile is what its own clip gives; between two tiles values lie between theirs."""
    vae = small_vae()
    tiled = TiledVAE(vae, Tiling(height_px=HEIGHT, width_px=48, overlap_px=16))
    frames = tiled.decode(latents(2))
    left, right = vae.decode(latents(2)[..., :3]), vae.decode(latents(2)[..., 2:])
    torch.testing.assert_close(frames[..., :32], left[..., :32])
    torch.testing.assert_close(frames[..., 48:], right[..., 16:])
    seam, ends = frames[..., 32:48], (left[..., 32:], right[..., :16])
    assert (seam >= torch.minimum(*ends) - 1e-12).all()
    assert (seam <= torch.maximum(*ends) + 1e-12).all()
    assert (seam != ends[0]).any()


def test_a_clip_of_one_tile_is_not_changed():
    vae = small_vae()
    tiled = TiledVAE(vae, Tiling(height_px=128, width_px=128, overlap_px=0))
    torch.testing.assert_close(tiled.decode(latents(3)), vae.decode(latents(3)))
    torch.testing.assert_close(tiled.encode(clip(5)), vae.encode(clip(5)))


@pytest.mark.parametrize("seed", range(20))
def test_tiles_cover_everything_and_weigh_one_everywhere(seed):
    rng = random.Random(seed)
    length, tile = rng.randint(1, 40), rng.randint(1, 20)
    total = torch.zeros(length, dtype=torch.float64)
    for place in _places(length, tile, rng.randint(0, tile - 1)):
        assert len(place.weights) == min(tile, length)
        assert (place.weights > 0).all()
        total[place.start : place.start + len(place.weights)] += place.weights
    torch.testing.assert_close(total, torch.ones_like(total))


def test_two_streams_share_one_vae():
    tiled = TiledVAE(small_vae(), TILING)
    clips = [latents(3, seed) for seed in (1, 2)]
    states = [tiled.init_state("decode", 2, HEIGHT, WIDTH) for _ in clips]
    frames: list[list[Tensor]] = [[], []]
    for index in range(3):
        for stream, whole in enumerate(clips):
            frames[stream].append(tiled.decode_chunk(whole[:, :, index : index + 1], states[stream]))
    for stream, whole in enumerate(clips):
        torch.testing.assert_close(torch.cat(frames[stream], dim=2), tiled.decode(whole), rtol=0, atol=1e-12)


def test_a_step_that_fails_in_one_tile_leaves_all_as_they_were():
    vae = small_vae()
    tiled = TiledVAE(vae, TILING)
    state = tiled.init_state("decode", 2, HEIGHT, WIDTH)
    tiled.decode_chunk(latents(2), state)
    before, meta = restored(state), state.meta()
    calls = itertools.count()
    hook = vae.decoder[1].register_forward_hook(lambda *_: 1 / (2 - next(calls)) and None)
    try:
        with pytest.raises(ZeroDivisionError):
            tiled.decode_chunk(latents(1), state)
    finally:
        hook.remove()
    assert state.meta() == meta
    assert all(torch.equal(state.slots[name], slot) for name, slot in before.slots.items())


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="width_px must be larger than overlap_px 16, got 16"):
        Tiling(height_px=32, width_px=16, overlap_px=16)
    with pytest.raises(ValueError, match="overlap_px must be at least 0, got -16"):
        Tiling(height_px=32, width_px=16, overlap_px=-16)
    with pytest.raises(ValueError, match=r"height_px must be a whole number, got 32\.0"):
        Tiling(height_px=32.0, width_px=32, overlap_px=16)
    with pytest.raises(ValueError, match=r"vae must stream, got a AutoencoderKL: .* stream_vae first"):
        TiledVAE(diffusers.AutoencoderKL(), Tiling(height_px=32, width_px=48, overlap_px=16))
    with pytest.raises(ValueError, match=r"tiling\.height_px must be a multiple of 16, got 40"):
        TiledVAE(small_vae(), Tiling(height_px=40, width_px=48, overlap_px=16))
    tiled = TiledVAE(small_vae(), TILING)
    with pytest.raises(ValueError, match="height must be a positive multiple of 16, got 50"):
        tiled.init_state("decode", 2, 50, 64)
    with pytest.raises(ValueError, match=r"frames must be 1 \+ 4n along dimension 2, got 4"):
        tiled.encode(clip(4))
    state = tiled.init_state("decode", 2, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"of their state \[2, 4, 5\], got shape \[2, 4, 1, 4, 4\]"):
        tiled.decode_chunk(latents(1)[..., :4], state)
    with pytest.raises(ValueError, match="state must be for 'encode', got one for 'decode'"):
        tiled.encode_chunk(clip(1), state)
    other = TiledVAE(small_vae(), Tiling(height_px=48, width_px=48, overlap_px=16))
    with pytest.raises(ValueError, match=r"state must come from Tiling.*got one from Tiling"):
        other.decode_chunk(latents(1), state)
