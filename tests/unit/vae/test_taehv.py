"""Published TAEHV layouts: told apart by their tensors, and each of them streams exactly."""

import pytest
import torch
from safetensors.torch import save_file

from genstream.vae.identity import describe
from genstream.vae.taehv import load_taehv
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.tiny_blocks import WideMemBlock

WIDTHS = {"encoder_width": 6, "decoder_widths": [8, 6, 5, 4]}
VARIANTS = {
    "taehv": {"latent_channels": 16},
    "taew2_2": {"latent_channels": 48, "patch_size": 2},
    "taew2_2_super": {"latent_channels": 48, "patch_size": 2, "decoder_block": "super"},
    "taehv1_5": {"latent_channels": 32, "patch_size": 2},
    "taeltx_2": {
        "latent_channels": 128,
        "patch_size": 4,
        "encoder_temporal_strides": [2, 2, 2],
        "decoder_temporal_strides": [2, 2, 2],
    },
    "taeltx2_3_wide": {
        "latent_channels": 128,
        "patch_size": 4,
        "encoder_temporal_strides": [2, 2, 2],
        "decoder_temporal_strides": [2, 2, 2],
        "decoder_block": "wide",
    },
    "wide on both sides": {"latent_channels": 24, "encoder_block": "wide", "decoder_block": "wide"},
}
REDUCED = {
    "in time": {"decoder_temporal_strides": [1, 1, 1]},
    "in half the time": {"decoder_temporal_strides": [1, 1, 2]},
    "in space": {"decoder_spatial_strides": [1, 2, 1]},
    "in both": {"decoder_temporal_strides": [1, 1, 1], "decoder_spatial_strides": [1, 1, 1]},
}


def build(**config) -> TinyVideoVAE:
    torch.manual_seed(0)
    return TinyVideoVAE(**WIDTHS | config).eval().requires_grad_(requires_grad=False)


@pytest.fixture(params=VARIANTS, scope="module")
def vae(request):
    return build(**VARIANTS[request.param]).double()


def random_latents(vae: TinyVideoVAE, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((2, vae.spec.latent_channels, count, 1, 2), generator=generator, dtype=torch.float64)


def decode_in_parts(vae: TinyVideoVAE, latents: torch.Tensor, parts: list[int]) -> torch.Tensor:
    ratio = vae.spec.spatial_ratio
    state = vae.init_state("decode", 2, ratio, 2 * ratio)
    return torch.cat([vae.decode_chunk(part, state) for part in latents.split(parts, dim=2)], dim=2)


def encode_in_parts(vae: TinyVideoVAE, frames: torch.Tensor, size: int) -> torch.Tensor:
    state = vae.init_state("encode", *frames.shape[:1], *frames.shape[3:])
    latents = [vae.encode_chunk(part, state) for part in frames.split(size, dim=2)]
    return torch.cat([*latents, vae.flush(state)], dim=2)


def frame_by_frame(vae: TinyVideoVAE, latents: torch.Tensor) -> torch.Tensor:
    """The decoder as a walk through single images, remembering one per block: without any batch of frames."""
    pasts: dict[str, torch.Tensor] = {}

    def walk(image: torch.Tensor, layers: list) -> list[torch.Tensor]:
        if not layers:
            return [torch.nn.functional.pixel_shuffle(image, vae.config.patch_size)]
        (name, layer), *rest = layers
        kind = type(layer).__name__
        if kind.endswith("MemBlock"):
            past = pasts.get(name, torch.zeros_like(image))
            pasts[name] = image
            y = layer.conv(torch.cat([image, past], dim=1)) + image
            return walk(y if kind == "SuperMemBlock" else y.relu(), rest)
        if kind == "TemporalGrow":
            grown = layer.conv(image)
            if layer.spatial_stride == 2:
                grown = grown.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            return [frame for part in grown.chunk(layer.stride, dim=1) for frame in walk(part, rest)]
        return walk(layer(image), rest)

    layers = list(vae.decoder.named_children())
    frames = [frame for latent in latents.unbind(2) for frame in walk(latent.clone(), layers)]
    return (torch.stack(frames[vae.spec.temporal_ratio - 1 :], dim=2) * 2 - 1).clamp(-1, 1)


@pytest.mark.parametrize("parts", [[1] * 5, [2, 2, 1], [3, 2], [0, 1, 3, 0, 1]], ids=str)
def test_sequential_and_chunk_parallel_decode_equal_parallel(vae, parts):
    latents = random_latents(vae, 5)
    whole = vae.decode(latents)
    assert whole.shape[2] == 1 + 4 * vae.spec.temporal_ratio
    torch.testing.assert_close(decode_in_parts(vae, latents, parts), whole, rtol=0, atol=1e-12)


def test_parallel_decode_equals_frame_by_frame(vae):
    latents = random_latents(vae, 3)
    torch.testing.assert_close(vae.decode(latents), frame_by_frame(vae, latents), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3, 9])
def test_sequential_and_chunk_parallel_encode_equal_parallel(vae, size):
    ratio = vae.spec.spatial_ratio
    frames = torch.rand((1, 3, 17, ratio, 2 * ratio), dtype=torch.float64) * 2 - 1
    whole = vae.encode(frames)
    assert whole.shape[2] == -(-17 // vae.spec.temporal_ratio)
    torch.testing.assert_close(encode_in_parts(vae, frames, size), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_latents", [1, 2])
def test_whole_clips_may_be_worked_off_in_chunks(vae, chunk_latents):
    ratio = vae.spec.spatial_ratio
    frames = torch.rand((1, 3, 17, ratio, ratio), dtype=torch.float64) * 2 - 1
    latents = vae.encode(frames)
    torch.testing.assert_close(vae.encode(frames, chunk_latents), latents, rtol=0, atol=1e-12)
    decoded = vae.decode(latents)
    torch.testing.assert_close(vae.decode(latents, chunk_latents), decoded, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="chunk_latents must be at least 1, got 0"):
        vae.decode(latents, 0)


def test_memory_is_as_long_as_the_spec_says(vae):
    """What is not a number spreads over all that depends on it, however little."""
    memory, ratio = vae.spec.memory_latents, vae.spec.temporal_ratio
    latents = random_latents(vae, memory + 3)
    latents[:, :, 1] = torch.nan
    frames = vae.decode(latents)
    assert not frames[:, :, -ratio:].isnan().any()
    assert frames[:, :, -2 * ratio : -ratio].isnan().any()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_say_what_they_are(name, suffix, tmp_path):
    vae = build(**VARIANTS[name])
    weights = {key: weight.half() for key, weight in vae.state_dict().items()}
    path = tmp_path / f"taehv.{suffix}"
    torch.save(weights, path) if suffix == "pth" else save_file(weights, path)
    loaded = load_taehv(path)
    assert describe(loaded) == describe(vae.half().float())
    assert loaded.dtype == torch.float32
    assert all(torch.equal(weight, weights[key].float()) for key, weight in loaded.state_dict().items())


def test_wide_blocks_mix_pixels_in_groups_of_64_channels():
    block = WideMemBlock(128)
    assert block.conv[2].weight.shape == block.conv[6].weight.shape == (128, 64, 3, 3)


@pytest.mark.parametrize("reduction", REDUCED)
def test_reduced_decoders_stream_exactly(reduction):
    full = build(latent_channels=16)
    vae = load_taehv(full.state_dict(), **REDUCED[reduction]).double()
    latents = random_latents(vae, 4)
    whole = vae.decode(latents)
    ratio = vae.spec.spatial_ratio
    assert whole.shape[2:] == (1 + 3 * vae.spec.temporal_ratio, ratio, 2 * ratio)
    torch.testing.assert_close(decode_in_parts(vae, latents, [1, 2, 1]), whole, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="direction must be 'decode' for a reduced decoder, got 'encode'"):
        vae.init_state("encode", 1, ratio, ratio)


@pytest.mark.parametrize("block", ["base", "wide", "super"])
def test_reducing_the_last_stage_leaves_out_every_second_frame(block):
    """No block remembers anything behind it, so the frames that stay are the same ones."""
    full = build(latent_channels=16, decoder_block=block).double()
    reduced = load_taehv(full.state_dict(), decoder_temporal_strides=[1, 2, 1]).double()
    latents = random_latents(full, 3)
    torch.testing.assert_close(reduced.decode(latents), full.decode(latents)[:, :, ::2], rtol=0, atol=1e-6)


def test_statistics_for_weights_trained_on_raw_latents():
    weights = build(latent_channels=4).state_dict()
    mean, std = [0.1, -0.2, 0.0, 0.3], [0.5, 0.7, 1.2, 0.9]
    vae = load_taehv(weights, latents_mean=mean, latents_std=std).double()
    raw = load_taehv(weights).double()
    latents = random_latents(vae, 2)
    unnormalised = latents * torch.tensor(std).view(-1, 1, 1, 1) + torch.tensor(mean).view(-1, 1, 1, 1)
    torch.testing.assert_close(vae.decode(latents), raw.decode(unnormalised), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["taehv", "taeltx_2"])
def test_latents_of_aligned_encoders_are_those_of_frames_with_copies_in_front(name):
    published = build(**VARIANTS[name])
    copies = published.spec.temporal_ratio - 1
    aligned = load_taehv(published.state_dict(), first_frame_copies=copies)
    size = published.spec.spatial_ratio
    frames = torch.rand((1, 3, copies + 2, size, size)) * 2 - 1
    led = torch.cat([frames[:, :, :1].expand(-1, -1, copies, -1, -1), frames], dim=2)
    torch.testing.assert_close(aligned.encode(frames), published.encode(led), rtol=0, atol=1e-6)
    assert aligned.decode(aligned.encode(frames)).shape == frames.shape
    with pytest.raises(ValueError, match=f"first_frame_copies must be 0 or {copies}, got 1"):
        load_taehv(published.state_dict(), first_frame_copies=1)


def test_the_variant_that_cannot_stream_is_refused():
    weights = build(latent_channels=24, patch_size=2).state_dict()
    with pytest.raises(ValueError, match=r"got taeh3 \(24 latent channels.*starts anew every 17 frames"):
        load_taehv(weights)


@pytest.mark.parametrize("shape", [(), (3,), (0, 8, 1, 1)])
def test_weights_of_another_shape_are_refused_by_name(shape):
    weights = build(latent_channels=4).state_dict() | {"encoder.2.conv.weight": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"encoder\.2\.conv\.weight must be the weights of a convolution"):
        load_taehv(weights)


def test_decoders_that_grow_other_frames_than_were_merged_are_refused():
    weights = build(latent_channels=4).state_dict()
    weight = weights["decoder.13.conv.weight"]
    with pytest.raises(ValueError, match=r"encoder strides \[2, 2, 1\] and decoder strides \[1, 1, 2\]"):
        load_taehv(weights | {"decoder.13.conv.weight": weight[: len(weight) // 2]})


def test_strides_that_the_weights_do_not_have_are_refused():
    weights = build(latent_channels=4).state_dict()
    with pytest.raises(ValueError, match=r"decoder_temporal_strides must be \[1, 2, 2\] or less"):
        load_taehv(weights, decoder_temporal_strides=[2, 1, 2])
    with pytest.raises(ValueError, match=r"decoder_spatial_strides must be 3 numbers of 1 or 2"):
        load_taehv(weights, decoder_spatial_strides=[2, 2])


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("what", ["empty", "text", "cut off"])
def test_files_that_are_no_checkpoints_are_refused(suffix, what, tmp_path):
    path = tmp_path / f"taehv.{suffix}"
    weights = build(latent_channels=4).state_dict()
    torch.save(weights, path) if suffix == "pth" else save_file(weights, path)
    content = {"empty": b"", "text": b"these are no weights", "cut off": path.read_bytes()[:-100]}
    path.write_bytes(content[what])
    with pytest.raises(ValueError, match=rf"source must be a checkpoint file .*taehv.{suffix}"):
        load_taehv(path)


def test_weights_of_something_else_are_refused(tmp_path):
    weights = build(latent_channels=4).state_dict()
    with pytest.raises(ValueError, match=r"source must hold 'decoder.7.conv.weight', got 1 tensors"):
        load_taehv({"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"0 missing \[\], 1 unexpected \['extra'\]"):
        load_taehv({**weights, "extra": torch.zeros(1)})
    with pytest.raises(FileNotFoundError, match=r"source must be a checkpoint file, got .*nothing.pth"):
        load_taehv(tmp_path / "nothing.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"file of tensors by name: .*list.pth' cannot be used: a list"):
        load_taehv(tmp_path / "list.pth")
