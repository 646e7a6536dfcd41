"""What holds for every VAE, this library's own and diffusers' through their adapters."""

import copy
import math
import random
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from small_vaes import (
    ADAPTED,
    DECODERS,
    NOT_CAUSAL,
    OWN,
    SINGLE_PRECISION,
    own_vae,
    small_vae,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from genstream.vae.adapters import stream_vae
from genstream.vae.adapters.base import Adapter
from genstream.vae.adapters.scale import LatentScale
from genstream.vae.causal import CausalVideoVAE
from genstream.vae.protocol import Direction, StreamingVAE, VAEState
from genstream.vae.tiling import TiledVAE
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.turbo import TurboVAED
from genstream.vae.wan import WanVideoVAE
from genstream.vae.wrapping import module_of

EVERY = [*OWN, *ADAPTED]
ENCODERS = [name for name in EVERY if name not in DECODERS]
# Published TAEHV weights fill up the last group; image VAEs have groups of one frame.
ANY_COUNT = ["taehv", "taehv_super", "taehv_wide", "kl", "tiny"]
GROWING = [("cosmos", "encode"), ("cosmos", "decode"), ("hunyuan15", "encode"), ("hunyuan15", "decode")]
GROWING += [("mochi", "encode")]
MEAN, STD = [0.7, -3.0, 0.0, 11.0], [0.3, 5.0, 1.0, 0.06]


def latents_for(
    vae: StreamingVAE, count: int, batch_size: int = 2, rows: int = 2, columns: int = 3
) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    shape = (batch_size, vae.spec.latent_channels, count, rows, columns)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def frames_for(vae: StreamingVAE, count: int, batch_size: int = 2, size: tuple[int, int] = (2, 3)) -> Tensor:
    generator, ratio = torch.Generator().manual_seed(count), vae.spec.spatial_ratio
    shape = (batch_size, 3, count, size[0] * ratio, size[1] * ratio)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def start(vae: StreamingVAE, direction: Direction, data: Tensor) -> VAEState:
    """State of a stream of frames or latents like `data`."""
    scale = vae.spec.spatial_ratio if direction == "decode" else 1
    return vae.init_state(direction, data.shape[0], data.shape[3] * scale, data.shape[4] * scale)


def beginning(
    name: str, direction: Direction, dtype: torch.dtype = torch.float64
) -> tuple[StreamingVAE, Tensor, Callable[[Tensor, VAEState], Tensor], VAEState]:
    """A VAE, a clip for it, its step and a state that has not started."""
    if name in DECODERS and direction == "encode":
        pytest.skip("has no encoder")
    vae = small_vae(name) if dtype == torch.float64 else in_precision(small_vae(name), dtype)
    count = enough_latents(vae)
    clip = latents_for(vae, count) if direction == "decode" else frames_for(vae, count)
    step = vae.decode_chunk if direction == "decode" else vae.encode_chunk
    return vae, clip.to(dtype), step, start(vae, direction, clip)


def restored(state: VAEState) -> VAEState:
    """The state after a trip through its parts; the old one is spoilt, so that nothing may point there."""
    again = VAEState.restore({key: slot.clone() for key, slot in state.tensors().items()}, state.meta())
    for slot in state.slots.values():
        slot.fill_(torch.nan)
    return again


def streamed(vae: StreamingVAE, direction: Direction, data: Tensor, parts: list[int]) -> Tensor:
    """A stream whose state is taken apart and put together in front of every chunk."""
    step = vae.encode_chunk if direction == "encode" else vae.decode_chunk
    state, results = start(vae, direction, data), []
    for part in data.split(parts, dim=2):
        state = restored(state)
        results.append(step(part, state))
    return torch.cat([*results, vae.flush(state)], dim=2)


def random_size(generator: random.Random) -> tuple[int, tuple[int, int]]:
    """Batch size, and height and width in latent pixels."""
    return generator.randint(1, 3), (generator.randint(2, 3), generator.randint(2, 3))


def random_parts(generator: random.Random, total: int) -> list[int]:
    parts: list[int] = []
    while sum(parts) < total:
        parts.append(generator.randint(0, min(6, total - sum(parts))))
    return parts


def enough_latents(vae: StreamingVAE) -> int:
    """For several pieces of a VAE that works in pieces."""
    spec = vae.spec
    return spec.first_latents + 2 * spec.chunk_latents + spec.lookahead_latents + 1


def assert_close(name: str, result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5 if name in SINGLE_PRECISION else 1e-11)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", EVERY)
def test_any_chunks_decode_like_one(name, seed):
    vae, generator = small_vae(name), random.Random(f"{name} {seed}")
    count = generator.randint(1, enough_latents(vae))
    latents = latents_for(
        vae, count, generator.randint(1, 3), generator.randint(2, 3), generator.randint(2, 3)
    )
    result = streamed(vae, "decode", latents, random_parts(generator, count))
    assert_close(name, result, streamed(vae, "decode", latents, [count]))
    if name not in NOT_CAUSAL:
        assert_close(name, result, vae.decode(latents))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ENCODERS)
def test_any_chunks_encode_like_one(name, seed):
    vae, generator = small_vae(name), random.Random(f"{name} {seed}")
    count = generator.randint(1, vae.spec.temporal_ratio * enough_latents(vae))
    frames = frames_for(vae, count, *random_size(generator))
    result = streamed(vae, "encode", frames, random_parts(generator, count))
    assert_close(name, result, streamed(vae, "encode", frames, [count]))


@pytest.mark.parametrize("name", EVERY)
def test_half_precision(name):
    """Only diffusers' Cosmos has an operation that processors lack in half precision."""
    if name == "cosmos":
        pytest.skip("diffusers' class needs a GPU in half precision")
    half = in_precision(small_vae(name), torch.bfloat16)
    latents = latents_for(half, 2)
    frames = half.decode(latents.bfloat16())
    assert frames.dtype == torch.bfloat16
    error = (frames.double() - small_vae(name).decode(latents)).square().mean().sqrt()
    assert error < 0.1
    if name not in DECODERS:
        assert half.encode(frames.clone()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", EVERY)
def test_rounding_of_chunks_in_single_precision(name):
    vae = in_precision(small_vae(name), torch.float32)
    # A batch of one takes another way through small convolutions.
    latents = latents_for(vae, 7, 1).float()
    expected = streamed(vae, "decode", latents, [7])
    for parts in ([1] * 7, [2, 2, 2, 1], [3, 3, 1], [1, 0, 4, 2]):
        torch.testing.assert_close(streamed(vae, "decode", latents, parts), expected, rtol=0, atol=1e-5)
    if name in DECODERS:
        return
    count = vae.spec.first_frames + 4 * vae.spec.temporal_ratio
    frames = frames_for(vae, count, 1).float()
    expected = streamed(vae, "encode", frames, [count])
    for parts in ([1] * count, [2, 0, count - 3, 1]):
        torch.testing.assert_close(streamed(vae, "encode", frames, parts), expected, rtol=0, atol=1e-5)


def in_precision(vae: StreamingVAE, dtype: torch.dtype) -> StreamingVAE:
    if isinstance(vae, TiledVAE):
        return TiledVAE(in_precision(vae.vae, dtype), vae.tiling)
    if isinstance(vae, Adapter):
        return type(vae)(copy.deepcopy(vae.vae).to(dtype))
    return copy.deepcopy(vae).to(dtype)


@pytest.mark.parametrize("name", [name for name in OWN if name not in NOT_CAUSAL])
def test_later_latents_change_no_earlier_frame(name):
    vae = small_vae(name)
    latents = latents_for(vae, 5)
    changed = latents.clone()
    changed[:, :, 3] += 1
    before, after = vae.decode(latents), vae.decode(changed)
    known = vae.spec.first_frames + 2 * vae.spec.temporal_ratio
    assert torch.equal(before[:, :, :known], after[:, :, :known])
    assert not torch.equal(before[:, :, known], after[:, :, known])


@pytest.mark.parametrize("name", OWN)
def test_interleaved_streams_and_threads_equal_separate_ones(name):
    vae = small_vae(name)
    clips = [latents_for(vae, 5), latents_for(vae, 5).flip(2)]
    expected = [streamed(vae, "decode", clip, [1] * 5) for clip in clips]
    states = [start(vae, "decode", clip) for clip in clips]
    frames: list[list[Tensor]] = [[], []]
    for index in range(5):
        for stream, clip in enumerate(clips):
            frames[stream].append(vae.decode_chunk(clip[:, :, index : index + 1], states[stream]))
    for stream, state in enumerate(states):
        assert_close(name, torch.cat([*frames[stream], vae.flush(state)], dim=2), expected[stream])

    results: dict[int, Tensor] = {}

    def run(stream: int) -> None:
        results[stream] = streamed(vae, "decode", clips[stream], [1] * 5)

    threads = [threading.Thread(target=run, args=(stream,)) for stream in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stream in range(2):
        assert_close(name, results[stream], expected[stream])


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("name", EVERY)
def test_a_chunk_costs_the_same_however_long_the_stream(name, direction):
    """Memory and arithmetic of a chunk, but for attention to all of the past."""
    if (name, direction) in GROWING or (name in DECODERS and direction == "encode"):
        pytest.skip("grows, or has no encoder")
    vae, spec = small_vae(name), small_vae(name).spec
    if direction == "encode":
        step, chunk = vae.encode_chunk, frames_for(vae, spec.temporal_ratio * spec.chunk_latents, 1, (2, 2))
    else:
        step, chunk = vae.decode_chunk, latents_for(vae, spec.chunk_latents, 1, 2, 2)
    state, costs = start(vae, direction, chunk), []
    for _ in range(9):
        with FlopCounterMode(display=False) as counter:
            step(chunk, state)
        costs.append((counter.get_total_flops(), state.nbytes))
    assert costs[-1][0] > 0
    assert len(set(costs[-4:])) == 1


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("name", EVERY)
def test_a_step_leaves_the_tensors_of_its_state_as_they_are(name, direction):
    """So that a shallow copy of a state is enough to go back to."""
    vae, clip, step, state = beginning(name, direction)
    for act in (lambda: step(clip, state), lambda: step(clip, state), lambda: vae.flush(state)):
        before = copy.copy(state)
        kept = {key: slot.clone() for key, slot in before.slots.items()}
        act()
        assert before.slots.keys() == kept.keys()
        assert all(torch.equal(before.slots[key], kept[key]) for key in kept)


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("name", EVERY)
def test_nothing_follows_a_flush(name, direction):
    vae, clip, step, state = beginning(name, direction)
    step(clip, state)
    vae.flush(state)
    state = restored(state)
    steps = state.steps
    assert vae.flush(state).shape[2] == 0
    assert step(clip[:, :, :0], state).shape[2] == 0
    with pytest.raises(ValueError, match=r"must not follow a flush, which ends a stream: start a new one"):
        step(clip[:, :, :1], state)
    assert state.steps == steps


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("name", EVERY)
def test_memory_keeps_its_precision_under_autocast(name, direction):
    """So that a stream may go on outside of it, and its state is that of the weights."""
    vae, clip, step, state = beginning(name, direction, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = torch.cat([step(clip, state) for _ in range(2)], dim=2)
    assert {slot.dtype for slot in state.slots.values()} == {torch.float32}
    again = start(vae, direction, clip)
    exact = torch.cat([step(clip, again) for _ in range(2)], dim=2)
    assert 0 < (coarse - exact).abs().mean() < 0.1
    assert step(clip, state).dtype == torch.float32


@pytest.mark.parametrize("name", ENCODERS)
def test_one_thread_may_encode_while_another_decodes(name):
    vae = small_vae(name)
    ratio = vae.spec.temporal_ratio
    frames = frames_for(vae, vae.spec.first_frames + 2 * ratio, 1, (2, 2))
    work: dict[Direction, tuple[Tensor, list[int]]] = {
        "encode": (frames, [vae.spec.first_frames, ratio, ratio]),
        "decode": (latents_for(vae, 3, 1, 2, 2), [1] * 3),
    }
    expected = {way: streamed(vae, way, *parts) for way, parts in work.items()}
    results: dict[Direction, Tensor] = {}

    def run(way: Direction) -> None:
        results[way] = streamed(vae, way, *work[way])

    threads = [threading.Thread(target=run, args=(way,)) for way in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for way in work:
        assert_close(name, results[way], expected[way])


def with_statistics(name: str, mean: list[float], std: list[float]) -> StreamingVAE:
    """The VAE with other latent statistics, but the same weights."""
    if name in OWN:
        return own_vae(name, mean, std)
    adapter = small_vae(name)
    assert isinstance(adapter, Adapter)
    twin = type(adapter)(adapter.vae)
    twin.scale = LatentScale.per_channel(mean, std, adapter.spec.latent_channels)
    return twin


@pytest.mark.parametrize("name", EVERY)
def test_latents_are_normalised_once_and_denormalised_once(name):
    """Odd statistics give the latents and pixels of none at all, once latents are rescaled by hand."""
    channels = small_vae(name).spec.latent_channels
    mean, std = (values[:channels] for values in (MEAN, STD))
    odd, plain = with_statistics(name, mean, std), with_statistics(name, [0.0] * channels, [1.0] * channels)
    offset, scale = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1) for values in (mean, std))
    raw = latents_for(plain, 3)
    if name not in DECODERS:
        frames = frames_for(plain, plain.spec.first_frames + 2 * plain.spec.temporal_ratio)
        raw = plain.encode(frames)
        torch.testing.assert_close(odd.encode(frames) * scale + offset, raw, rtol=1e-5, atol=1e-5)
    normalised = (raw - offset) / scale
    # Statistics are float32 in some VAEs: 11 is exact there, 0.06 is not.
    torch.testing.assert_close(odd.decode(normalised), plain.decode(raw), rtol=0, atol=1e-4)
    assert not torch.allclose(odd.decode(raw), plain.decode(raw), rtol=0, atol=1e-4)


def message(action, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        action(*arguments)
    return str(error.value)


@pytest.mark.parametrize("name", EVERY)
def test_bad_input_is_refused_with_both_sides(name):
    vae = small_vae(name)
    spec, latents = vae.spec, latents_for(vae, 1)
    state = start(vae, "decode", latents)
    before = {key: slot.clone() for key, slot in state.slots.items()}

    more = torch.cat([latents, latents[:, :1]], dim=1)
    text = message(vae.decode_chunk, more, state)
    assert f"{spec.latent_channels}, any" in text and str(more.shape[1]) in text.partition("got")[2]
    text = message(vae.decode_chunk, latents.float(), state)
    assert "torch.float64" in text and "torch.float32" in text
    text = message(vae.decode_chunk, torch.cat([latents, latents]), state)
    assert "[2, " in text and str([4, *latents.shape[1:]]) in text
    text = message(vae.encode_chunk, frames_for(vae, 1), state)
    assert name in DECODERS or ("'encode'" in text and "'decode'" in text)
    assert state.steps == 0
    assert all(torch.equal(slot, state.slots[key]) for key, slot in before.items())

    stranger = small_vae("taehv" if name != "taehv" else "wan2.1")
    text = message(vae.decode_chunk, latents, start(stranger, "decode", latents_for(stranger, 1)))
    assert "state must come from" in text
    assert state.vae in text and start(stranger, "decode", latents_for(stranger, 1)).vae in text


@pytest.mark.parametrize("name", [name for name in OWN if name != "tiled"])
def test_states_hold_the_streams_that_they_say(name):
    vae = small_vae(name)
    latents = latents_for(vae, 1)
    state = start(vae, "decode", latents)
    other = start(vae, "decode", latents[:1])
    text = message(vae.decode_chunk, latents, VAEState.restore(other.tensors(), state.meta()))
    assert "state must hold 2 streams, as it says, got 1 in" in text


@pytest.mark.parametrize("name", EVERY)
def test_states_of_other_weights_are_refused(name):
    vae = small_vae(name)
    latents = latents_for(vae, 1)
    state = start(vae, "decode", latents)
    again = VAEState.restore(state.tensors(), state.meta())
    weight = next(module_of(vae).parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(2)
    text = message(vae.decode_chunk, latents, again)
    assert "state must come from" in text and text.count("weights") == 2
    with torch.no_grad():
        weight.copy_(kept)
    vae.decode_chunk(latents, again)


@pytest.mark.parametrize("name", EVERY)
def test_states_are_made_for_whole_streams_only(name):
    vae, size = small_vae(name), small_vae(name).spec.spatial_ratio
    assert "direction must be " in message(vae.init_state, "both", 1, size, size)
    assert message(vae.init_state, "decode", 0, size, size) == "batch_size must be at least 1, got 0"
    assert message(vae.init_state, "decode", 1.5, size, size) == "batch_size must be a whole number, got 1.5"
    text = message(vae.init_state, "decode", 1, 0, size)
    assert f"height must be a positive multiple of {size}, got 0" in text
    if size > 1:
        text = message(vae.init_state, "decode", 1, size, 2 * size + 1)
        assert f"width must be a positive multiple of {size}, got {2 * size + 1}" in text


@pytest.mark.parametrize("name", EVERY)
def test_clips_that_are_none_are_refused(name):
    vae, latents = small_vae(name), latents_for(small_vae(name), 1)
    for step, what, clip in (
        (vae.decode, "latents", latents),
        (vae.encode, "frames", frames_for(vae, 1)),
    ):
        if name in DECODERS and what == "frames":
            continue
        assert message(step, clip[0]) == f"{what} must be [B, C, T, h, w], got {list(clip.shape[1:])}"
        assert message(step, clip[:, :, :0]) == f"{what} must be at least 1 along dimension 2, got 0"


@pytest.mark.parametrize("name", EVERY)
def test_tensors_elsewhere_are_refused(name):
    vae, latents = small_vae(name), latents_for(small_vae(name), 1)
    text = message(vae.decode_chunk, latents.to("meta"), start(vae, "decode", latents))
    assert "latents must be torch.float64 on cpu like the VAE, got torch.float64 on meta" in text


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("name", EVERY)
def test_the_end_of_another_stream_is_refused(name, direction):
    stranger = small_vae("tiled" if name != "tiled" else "kl")
    text = message(small_vae(name).flush, stranger.init_state(direction, 1, 32, 32))
    assert "state must " in text and "got one " in text


@pytest.mark.parametrize("name", EVERY)
def test_states_that_are_not_whole_are_refused(name):
    vae = small_vae(name)
    state = start(vae, "decode", latents_for(vae, 1))
    meta = state.meta()
    del meta["steps"]
    assert message(VAEState.restore, state.tensors(), meta).startswith("meta must hold ['batch_size', ")
    tensors = state.tensors()
    name, slot = tensors.popitem()
    text = message(VAEState.restore, {**tensors, "other": slot}, state.meta())
    assert text == f"tensors must be those of meta, got ['{name}'] missing, ['other'] unexpected"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("height", -3),
        ("width", 32.0),
        ("steps", "x"),
        ("steps", -1),
        ("ended", 1),
        ("slots", 5),
        ("vae", 3),
        ("direction", "up"),
    ],
)
def test_meta_of_nonsense_is_refused(name, value):
    state = start(small_vae("tiny"), "decode", latents_for(small_vae("tiny"), 1))
    text = message(VAEState.restore, state.tensors(), {**state.meta(), name: value})
    assert text.startswith(name) and text.endswith(f"got {value!r}")


@pytest.mark.parametrize("name", EVERY)
def test_a_flush_without_a_state_is_refused(name):
    text = "state must be a VAEState, made by init_state, got NoneType"
    assert message(small_vae(name).flush, None) == text


@pytest.mark.parametrize("name", EVERY)
def test_a_clip_without_streams_or_pixels_is_refused(name):
    vae = small_vae(name)
    latents = latents_for(vae, 2)
    assert message(vae.decode, latents[:0]) == "batch_size must be at least 1, got 0"
    size = vae.spec.spatial_ratio
    text = message(vae.decode, latents[:, :, :, :0])
    assert text.startswith(f"height must be a positive multiple of {size}, got 0")


def test_states_of_nonsense_are_refused(tmp_path):
    vae = small_vae("tiny")
    latents = latents_for(vae, 1)
    state = start(vae, "decode", latents)
    assert message(vae.decode_chunk, latents, {}) == "state must be a VAEState, made by init_state, got dict"
    assert message(VAEState.restore, state.tensors(), None).endswith("got None")
    assert "got the folder" in message(VAEState.load, tmp_path)
    state.save(tmp_path / "state.safetensors")
    assert "device must be one of this machine" in message(
        lambda: VAEState.load(tmp_path / "state.safetensors", "gpu")
    )
    with pytest.raises(FileNotFoundError):
        VAEState.load(tmp_path / "nothing")
    with pytest.raises(OSError, match=r"path '.*nowhere/state' cannot be written"):
        state.save(tmp_path / "nowhere" / "state")


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_refuse_states_of_another_precision(name):
    vae = small_vae(name)
    latents = latents_for(vae, 3)
    state = start(vae, "decode", latents)
    vae.decode_chunk(latents, state)
    for slot in [slot for slot in state.slots if slot != "pending"][:1]:
        state.slots[slot] = state.slots[slot].half()
        assert message(vae.decode_chunk, latents, state).startswith("state must be torch.float")


def test_what_streams_needs_no_adapter():
    text = message(stream_vae, small_vae("tiny_video"))
    assert text == "vae must be one of diffusers, got a TinyVideoVAE, which streams as it is"


@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in ANY_COUNT])
def test_clips_that_are_no_whole_latent_frames_are_refused(name):
    spec = small_vae(name).spec
    count = spec.first_frames + spec.temporal_ratio + 1
    text = message(small_vae(name).encode, frames_for(small_vae(name), count))
    assert f"frames must be 1 + {spec.temporal_ratio}n along dimension 2, got {count}" in text


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("name", EVERY)
def test_a_state_of_another_precision_is_told_by_it(name, direction):
    vae, clip, step, state = beginning(name, direction)
    step(clip, state)
    coarse = in_precision(vae, torch.float32)
    again = coarse.decode_chunk if direction == "decode" else coarse.encode_chunk
    with pytest.raises(ValueError, match=r"state must be torch\.float32 .*, got torch\.float64"):
        again(clip.float(), state)


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("name", EVERY)
def test_what_is_no_tensor_is_refused(name, direction):
    vae, clip, step, state = beginning(name, direction)
    argument = "latents" if direction == "decode" else "frames"
    for wrong in (None, clip.numpy(), [1.0]):
        for refuse in (partial(step, wrong, state), partial(getattr(vae, direction), wrong)):
            with pytest.raises(ValueError, match=rf"{argument} must be a torch\.Tensor, got"):
                refuse()


@pytest.mark.parametrize("name", EVERY)
def test_weights_are_found_through_wrappers(name):
    module = module_of(small_vae(name))
    assert isinstance(module, torch.nn.Module)
    assert next(module.parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    ("kind", "config", "error"),
    [
        (TinyVideoVAE, {"encoder_width": 0}, "encoder_width must be at least 1, got 0"),
        (TinyVideoVAE, {"patch_size": 0}, "patch_size must be at least 1, got 0"),
        (TinyVideoVAE, {"decoder_widths": (8, 0, 8, 8)}, "decoder_widths must be at least 1, got 0"),
        (TinyVideoVAE, {"latents_mean": [math.nan] * 16}, "latents_mean must be finite"),
        (TinyVideoVAE, {"latents_std": [math.inf] * 16}, "latents_std must be above 0"),
        (WanVideoVAE, {"patch_size": 0}, "patch_size must be at least 1, got 0"),
        (TurboVAED, {"scaling_factor": 0.0}, "scaling_factor must be"),
        (
            CausalVideoVAE,
            {"block_out_channels": (8, 0, 8, 8)},
            "block_out_channels must be at least 1, got 0",
        ),
        (CausalVideoVAE, {"layers_per_block": 0}, "layers_per_block must be at least 1, got 0"),
    ],
)
def test_configurations_of_nonsense_are_refused(kind, config, error):
    with pytest.raises(ValueError, match=error):
        kind(**config)
