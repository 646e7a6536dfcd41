import copy
import random
import threading

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from small_vaes import ADAPTED, CLAMPING, LTX, SINGLE_PRECISION, adapter, model
from torch import Tensor

from genstream.vae.adapters import probe, stream_vae
from genstream.vae.adapters.hunyuan import HunyuanVideoAdapter
from genstream.vae.adapters.ltx import LTXAdapter
from genstream.vae.adapters.partition import KVAEAdapter
from genstream.vae.adapters.scale import LatentScale
from genstream.vae.adapters.wan import WanAdapter
from genstream.vae.adapters.windowed import Window
from genstream.vae.protocol import VAEState

APPROXIMATE = ["ltx_released", "hunyuan"]
PARTITION = ["cogvideox", "kvae"]
EXACT = [name for name in ADAPTED if name not in APPROXIMATE + PARTITION]

BATCH, ROWS, COLUMNS = 2, 2, 3


def latent_count(name: str) -> int:
    """Enough for several pieces."""
    spec = adapter(name).spec
    return max(4, spec.first_latents + spec.chunk_latents + spec.lookahead_latents)


def random_latents(name: str, count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, adapter(name).spec.latent_channels, count, ROWS, COLUMNS)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_frames(name: str, count: int, seed: int = 1) -> Tensor:
    generator, ratio = torch.Generator().manual_seed(seed), adapter(name).spec.spatial_ratio
    shape = (BATCH, 3, count, ROWS * ratio, COLUMNS * ratio)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def frame_count(name: str, latents: int) -> int:
    spec = adapter(name).spec
    return spec.first_frames + spec.temporal_ratio * (latents - 1)


def start(name: str, direction: str) -> VAEState:
    ratio = adapter(name).spec.spatial_ratio
    return adapter(name).init_state(direction, BATCH, ROWS * ratio, COLUMNS * ratio)


def restored(state: VAEState) -> VAEState:
    """The state after a trip through its parts; the old one is spoilt, so that nothing may point there."""
    copy = VAEState.restore({key: slot.clone() for key, slot in state.tensors().items()}, state.meta())
    for slot in state.slots.values():
        slot.fill_(torch.nan)
    return copy


def decoded(name: str, latents: Tensor, parts: int | list[int]) -> Tensor:
    vae, state, frames = adapter(name), start(name, "decode"), []
    for part in latents.split(parts, dim=2):
        state = restored(state)
        frames.append(vae.decode_chunk_unclamped(part, state))
    return torch.cat([*frames, vae.flush_unclamped(state)], dim=2)


def encoded(name: str, frames: Tensor, parts: int | list[int]) -> Tensor:
    vae, state, latents = adapter(name), start(name, "encode"), []
    for part in frames.split(parts, dim=2):
        state = restored(state)
        latents.append(vae.encode_chunk(part, state))
    return torch.cat([*latents, vae.flush(state)], dim=2)


def random_parts(total: int, seed: int, largest: int) -> list[int]:
    rng, parts = random.Random(seed), []
    while sum(parts) < total:
        parts.append(rng.randint(0, min(largest, total - sum(parts))))
    return parts


def tolerance(name: str) -> float:
    return 2e-5 if name in SINGLE_PRECISION else 1e-11


def whole_decoded(name: str, latents: Tensor) -> Tensor:
    vae = adapter(name)
    return vae.whole_decode(vae.scale.raw(latents, 0))


def assert_same(result: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", EXACT + PARTITION)
def test_decoding_in_chunks_equals_the_models_own_decoding(name):
    count = latent_count(name)
    latents = random_latents(name, count + 1 - count % 2)
    whole = whole_decoded(name, latents)
    parts = random_parts(latents.shape[2], 5, 3)
    result = decoded(name, latents, parts)
    assert result.shape[2] == frame_count(name, latents.shape[2])
    if name in CLAMPING:
        assert whole.abs().max() < 1
    assert_same(result, whole, name)


@pytest.mark.parametrize("name", EXACT + PARTITION)
def test_encoding_in_chunks_equals_the_models_own_encoding(name):
    vae = adapter(name)
    frames = random_frames(name, frame_count(name, latent_count(name)))
    expected = vae.scale.normalised(vae.whole_encode(frames), 0)
    assert_same(encoded(name, frames, random_parts(frames.shape[2], 5, 7)), expected, name)


@pytest.mark.parametrize("name", ADAPTED)
def test_any_chunking_decodes_alike(name):
    count = latent_count(name)
    latents = random_latents(name, count)
    whole = adapter(name).decode_unclamped(latents)
    for parts in (1, 2, 3, random_parts(count, 3, 4)):
        assert_same(decoded(name, latents, parts), whole, name)


@pytest.mark.parametrize("name", ADAPTED)
def test_any_chunking_encodes_alike(name):
    frames = random_frames(name, frame_count(name, latent_count(name)))
    whole = adapter(name).encode(frames)
    for parts in (1, 5, random_parts(frames.shape[2], 3, 9)):
        assert_same(encoded(name, frames, parts), whole, name)


def test_windows_of_hunyuan_video_are_the_models_own():
    vae = model("hunyuan")
    own = HunyuanVideoAdapter(vae)
    for count in (1, 4, 5, 8):
        latents = random_latents("hunyuan", count)
        expected = vae.decode(own.scale.raw(latents, 0), return_dict=False)[0]
        assert_same(own.decode_unclamped(latents), expected, "hunyuan")
        frames = random_frames("hunyuan", frame_count("hunyuan", count))
        raw = vae.encode(frames, return_dict=False)[0].mode()
        assert_same(own.encode(frames), own.scale.normalised(raw, 0), "hunyuan")


def test_the_error_of_windows_falls_with_their_size():
    latents = random_latents("ltx_released", 6)
    whole = whole_decoded("ltx_released", latents)
    errors = []
    for reach in (1, 3, 6):
        window = Window(context=reach, piece=1, lookahead=reach)
        narrow = LTXAdapter(model("ltx_released"), window=window)
        errors.append(float((narrow.decode_unclamped(latents) - whole).pow(2).mean()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-12


@pytest.mark.parametrize("name", ADAPTED)
def test_exactness_is_measured(name):
    measured, spec = adapter(name).measured, adapter(name).spec
    assert measured is not None
    expected = "approximate" if name in APPROXIMATE else "partition" if name in PARTITION else "exact"
    assert spec.exactness == measured.exactness == expected
    if name in EXACT:
        assert measured.lookahead_latents == 0
        assert spec.first_latents == spec.chunk_latents == 1
    if name in APPROXIMATE:
        assert measured.decode_error > 1e-3
        assert measured.lookahead_latents > spec.lookahead_latents


def test_a_causal_name_does_not_make_a_model_exact():
    """A decoder that looks ahead but says it does not: the probe believes the frames."""
    vae = model("ltx_released")
    lying = LTXAdapter(vae)
    lying.window = None
    assert probe(lying).exactness == "approximate"
    assert LTXAdapter(vae).spec.exactness == "approximate"


def test_an_error_that_is_small_does_not_make_a_model_exact():
    """All frames depend on the last latent, so little that coarse weights could hide it."""

    class Leaking(WanAdapter):
        def whole_decode(self, raw: Tensor) -> Tensor:
            return super().whole_decode(raw) + 1e-6 * raw[:, :, -1:].mean()

    measured = probe(Leaking(model("wan21")))
    assert measured.decode_error < 1e-4 * measured.decode_scale
    assert measured.lookahead_latents > 0
    assert measured.exactness == "approximate"


def test_a_model_that_gives_the_same_for_all_latents_is_measured():
    kind, config = ADAPTED["wan21"]
    vae = kind(**config).eval().requires_grad_(requires_grad=False)
    vae.decoder.conv_out.weight.zero_()
    measured = stream_vae(vae).measured
    assert measured is not None and measured.lookahead_latents == 0


@pytest.mark.parametrize("name", EXACT + PARTITION)
def test_later_latents_never_change_earlier_frames(name):
    """Not even by rounding; where the model fixes pieces, those of an earlier piece."""
    spec = adapter(name).spec
    last = max(2, spec.first_latents)
    latents = random_latents(name, last + spec.chunk_latents)
    changed = latents.clone()
    changed[:, :, last:] += 1
    before, after = (adapter(name).decode_unclamped(clip) for clip in (latents, changed))
    known = frame_count(name, last)
    torch.testing.assert_close(after[:, :, :known], before[:, :, :known], rtol=0, atol=0)
    assert (after[:, :, known:] != before[:, :, known:]).any()


@pytest.mark.parametrize("name", ADAPTED)
def test_interleaved_streams_and_threads_equal_separate_ones(name):
    count, vae = latent_count(name), adapter(name)
    clips = [random_latents(name, count, seed) for seed in (1, 2)]
    expected = [vae.decode_unclamped(clip) for clip in clips]
    states = [start(name, "decode") for _ in clips]
    frames: list[list[Tensor]] = [[], []]
    for index in range(count):
        for stream, clip in enumerate(clips):
            frames[stream].append(vae.decode_chunk_unclamped(clip[:, :, index : index + 1], states[stream]))
    for stream, state in enumerate(states):
        result = torch.cat([*frames[stream], vae.flush_unclamped(state)], dim=2)
        assert_same(result, expected[stream], name)

    results: dict[int, Tensor] = {}

    def run(stream: int) -> None:
        results[stream] = decoded(name, clips[stream], [1] * count)

    threads = [threading.Thread(target=run, args=(stream,)) for stream in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stream in range(2):
        assert_same(results[stream], expected[stream], name)


@pytest.mark.parametrize("name", ["wan21", "wan22", "qwen_image", "magvit", "cogvideox", "kvae", "hunyuan"])
def test_pieces_of_fixed_size_are_bit_exact_in_single_precision(name):
    kind, config = ADAPTED[name]
    torch.manual_seed(0)
    vae = stream_vae(kind(**config).eval().requires_grad_(requires_grad=False))
    count = latent_count(name) + 1 - latent_count(name) % 2
    latents = random_latents(name, count).float()
    frames = random_frames(name, frame_count(name, count)).float()
    whole, encoded_whole = vae.decode(latents), vae.encode(frames)
    states = [vae.init_state(direction, BATCH, *frames.shape[3:]) for direction in ("decode", "encode")]
    decoded = [vae.decode_chunk(part, states[0]) for part in latents.split([1, 0, 2, count - 3], dim=2)]
    assert torch.equal(torch.cat([*decoded, vae.flush(states[0])], dim=2), whole)
    encoded = [vae.encode_chunk(part, states[1]) for part in frames.split(3, dim=2)]
    assert torch.equal(torch.cat([*encoded, vae.flush(states[1])], dim=2), encoded_whole)
    if name not in APPROXIMATE:
        own = vae.whole_decode(vae.scale.raw(latents, 0)).clamp(-1, 1)
        torch.testing.assert_close(own, whole, rtol=0, atol=1e-5)
        own = vae.scale.normalised(vae.whole_encode(frames), 0)
        torch.testing.assert_close(own, encoded_whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["wan21", "mochi", "ltx", "magvit"])
def test_the_models_are_left_alone(name):
    vae = model(name)
    adapter(name)  # The probe runs the models' own methods, which keep their caches on them.
    before = {module: dict(vars(module)) for module in vae.modules()}
    decoded(name, random_latents(name, 2), [1, 1])
    encoded(name, random_frames(name, frame_count(name, 2)), [frame_count(name, 2)])
    for module, attributes in before.items():
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[key] is value for key, value in attributes.items())


@pytest.mark.parametrize("name", ["wan21", "mochi", "ltx", "hunyuan"])
def test_memory_does_not_grow(name):
    vae, state, sizes = adapter(name), start(name, "decode"), []
    for part in random_latents(name, 11).split(1, dim=2):
        vae.decode_chunk(part, state)
        sizes.append(state.nbytes)
    assert max(sizes[8:]) <= max(sizes[2:8])


@pytest.mark.parametrize("name", ["wan21", "wan22", "mochi", "ltx", "ltx2", "magvit"])
def test_frames_forget_what_is_further_back_than_the_specification_says(name):
    memory, channels = adapter(name).spec.memory_latents, adapter(name).spec.latent_channels
    assert memory is not None
    latents = torch.zeros(1, channels, memory + 2, 2, 2, dtype=torch.float64)
    latents[:, :, 0] = torch.nan
    frames = adapter(name).decode_unclamped(latents)
    known = frame_count(name, memory + 1)
    assert frames[:, :, known:].isfinite().all()
    assert frames[:, :, : frame_count(name, memory // 2)].isnan().all()


def test_the_published_wan_decoder_looks_back_38_latent_frames():
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLWan()
    assert WanAdapter(vae).spec.memory_latents == 38


@pytest.mark.parametrize("name", ["wan21", "cogvideox", "kvae", "cosmos"])
def test_states_survive_a_file(name, tmp_path):
    count = latent_count(name)
    latents, vae = random_latents(name, count + 1), adapter(name)
    state = start(name, "decode")
    vae.decode_chunk(latents[:, :, :count], state)
    state.save(tmp_path / "state.safetensors")
    again = VAEState.load(tmp_path / "state.safetensors")
    rest = latents[:, :, count:]
    expected = torch.cat([vae.decode_chunk(rest, state), vae.flush(state)], dim=2)
    result = torch.cat([vae.decode_chunk(rest, again), vae.flush(again)], dim=2)
    assert expected.shape[2] > 0
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_clips_of_any_length_align(name, count):
    frames = random_frames(name, frame_count(name, count))
    latents = adapter(name).encode(frames)
    assert latents.shape == (BATCH, adapter(name).spec.latent_channels, count, ROWS, COLUMNS)
    assert adapter(name).decode(latents).shape == frames.shape


@pytest.mark.parametrize("name", ["wan21", "cogvideox", "cosmos"])
def test_a_last_group_is_filled_up_with_its_last_frame(name):
    frames = random_frames(name, frame_count(name, 2))
    short = frames[:, :, :-2]
    filled = torch.cat([short, short[:, :, -1:].expand(-1, -1, 2, -1, -1)], dim=2)
    assert_same(encoded(name, short, [short.shape[2]]), adapter(name).encode(filled), name)


@pytest.mark.parametrize("name", ADAPTED)
def test_latents_are_normalised_exactly_once(name):
    """Raw latents and their statistics, as the model's configuration has them, meet in one formula."""
    vae, frames = adapter(name), random_frames(name, frame_count(name, 2))
    config = vae.vae.config
    raw = vae.whole_encode(frames)
    buffers = dict(vae.vae.named_buffers())
    mean, std = (buffers.get(key, config.get(key)) for key in ("latents_mean", "latents_std"))
    factor = config.get("scaling_factor") or 1.0
    if mean is None:
        expected = (raw - (config.get("shift_factor") or 0.0)) * factor
    else:
        table = [
            torch.as_tensor(values, dtype=torch.float64).reshape(1, 4, -1, 1, 1)[:, :, :2]
            for values in (mean, std)
        ]
        expected = (raw - table[0]) * factor / table[1]
    torch.testing.assert_close(vae.encode(frames), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vae.scale.raw(expected, 0), raw, rtol=1e-9, atol=1e-9)


def test_a_published_factor_that_the_class_does_not_know_counts():
    kind, config = ADAPTED["kvae"]
    vae = kind.from_config({**config, "scaling_factor": 0.5})
    assert KVAEAdapter(vae).scale.normalised(torch.ones(1, 4, 1, 1, 1), 0).unique().tolist() == [0.5]


def test_statistics_of_frames_beyond_the_table_are_those_of_its_last():
    scale = LatentScale.per_frame([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], channels=1)
    assert scale.normalised(torch.zeros(1, 1, 3, 1, 1), first=1).flatten().tolist() == [-2, -3, -3]


@pytest.mark.parametrize("count", [1, 2, 12])
def test_statistics_of_another_number_of_channels_are_refused(count):
    """Twelve numbers of a model with four channels would act frame by frame."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * count, latents_std=[1.0] * 4
    )
    with pytest.raises(
        ValueError, match=rf"latents_mean must be a number for each of 4 channels, got {count}"
    ):
        stream_vae(vae)


def test_a_ratio_may_be_written_as_a_fraction():
    vae = copy.deepcopy(model("cogvideox"))
    vae.register_to_config(temporal_compression_ratio=4.0)
    assert stream_vae(vae).spec.temporal_ratio == 4


@pytest.mark.parametrize("name", ["wan21", "cogvideox", "mochi", "hunyuan"])
def test_a_failing_step_leaves_the_state_as_it_was(name):
    state = start(name, "decode")
    adapter(name).decode_chunk(random_latents(name, 3), state)
    before, meta = {key: slot.clone() for key, slot in state.slots.items()}, state.meta()
    with pytest.raises(ValueError, match="latents must have the shape of its state"):
        adapter(name).decode_chunk(random_latents(name, 3)[:, :3], state)
    hook = model(name).decoder.register_forward_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            adapter(name).decode_chunk(random_latents(name, 6), state)
    finally:
        hook.remove()
    assert state.meta() == meta
    assert all(torch.equal(slot, state.slots[key]) for key, slot in before.items())


def test_offloaded_models_are_loaded_first():
    class Loads(ModelHook):
        count = 0

        def pre_forward(self, module, *args, **kwargs):
            self.count += 1
            return args, kwargs

    kind, config = ADAPTED["tiny"]
    vae, hook = stream_vae(kind(**config).requires_grad_(requires_grad=False)), Loads()
    add_hook_to_module(vae.vae, hook)
    states = [vae.init_state(direction, 1, 8, 8) for direction in ("encode", "decode")]
    vae.encode_chunk(torch.zeros(1, 3, 1, 8, 8), states[0])
    before = hook.count
    vae.decode_chunk(torch.zeros(1, vae.spec.latent_channels, 1, 2, 2), states[1])
    assert hook.count > before >= 3


@pytest.mark.parametrize("wrap", ["offloading", "compilation"])
def test_layers_that_were_wrapped_are_refused(wrap):
    """Their wrappers run the layers without memory, which would give frames of chunks on their own."""
    kind, config = ADAPTED["ltx"]
    vae = kind(**config).requires_grad_(requires_grad=False)
    if wrap == "offloading":
        add_hook_to_module(vae.decoder.mid_block, ModelHook())
    else:
        vae.decoder = torch.compile(vae.decoder)
    with pytest.raises(ValueError, match=r"as they were built to stream, got (mid_block|a network) that is"):
        stream_vae(vae)


def test_nothing_gives_nothing():
    state = start("wan21", "decode")
    assert adapter("wan21").decode_chunk(random_latents("wan21", 0), state).shape[2] == 0
    assert adapter("wan21").flush(state).shape[2] == 0
    state = start("wan21", "encode")
    assert adapter("wan21").encode_chunk(random_frames("wan21", 0), state).shape[2] == 0
    assert adapter("wan21").flush(state).shape[2] == 0


BAD_INPUTS = {
    "latents must have the shape of its state [2, 4, any, 2, 3], got [2, 5, 1, 2, 3]": lambda vae, state: (
        vae.decode_chunk(torch.zeros(2, 5, 1, 2, 3).double(), state)
    ),
    "latents must have the shape of its state [2, 4, any, 2, 3], got [1, 4, 1, 2, 3]": lambda vae, state: (
        vae.decode_chunk(torch.zeros(1, 4, 1, 2, 3).double(), state)
    ),
    "latents must have the shape of its state [2, 4, any, 2, 3], got [2, 4, 2, 3]": lambda vae, state: (
        vae.decode_chunk(torch.zeros(2, 4, 2, 3).double(), state)
    ),
    "latents must be torch.float64 on cpu like the VAE, got torch.float32 on cpu": lambda vae, state: (
        vae.decode_chunk(torch.zeros(2, 4, 1, 2, 3), state)
    ),
    "state must be for 'encode', got one for 'decode'": lambda vae, state: vae.encode_chunk(
        torch.zeros(2, 3, 1, 16, 24).double(), state
    ),
    "height must be a positive multiple of 8, got 15": lambda vae, state: vae.init_state("decode", 2, 15, 24),
    "width must be a positive multiple of 8, got 0": lambda vae, state: vae.init_state("decode", 2, 16, 0),
    "batch_size must be at least 1, got 0": lambda vae, state: vae.init_state("decode", 0, 16, 24),
    "direction must be 'encode' or 'decode', got 'both'": lambda vae, state: vae.init_state(
        "both", 2, 16, 24
    ),
    "frames must be 1 + 4n along dimension 2, got 4": lambda vae, state: vae.encode(
        torch.zeros(2, 3, 4, 16, 24).double()
    ),
    "frames must be at least 1 along dimension 2, got 0": lambda vae, state: vae.encode(
        torch.zeros(2, 3, 0, 16, 24).double()
    ),
    "latents must be [B, C, T, h, w], got [4, 2, 3]": lambda vae, state: vae.decode(torch.zeros(4, 2, 3)),
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_input_is_refused_with_both_sides(message):
    with pytest.raises(ValueError) as error:
        BAD_INPUTS[message](adapter("wan21"), start("wan21", "decode"))
    assert message in str(error.value)


def test_states_of_other_vaes_are_refused():
    state = start("qwen_image", "decode")
    with pytest.raises(ValueError, match=r"from AutoencoderKLWan.*got one from AutoencoderKLQwenImage"):
        adapter("wan21").decode_chunk(random_latents("wan21", 1), state)
    other = LTXAdapter(model("ltx_released"), window=Window(context=1, piece=1, lookahead=1))
    ratio = other.spec.spatial_ratio
    with pytest.raises(ValueError, match="state must come from"):
        other.decode_chunk(
            random_latents("ltx_released", 1),
            adapter("ltx_released").init_state("decode", BATCH, ROWS * ratio, COLUMNS * ratio),
        )


def test_states_of_another_precision_are_refused():
    state = start("wan21", "decode")
    state.slots = {key: slot.float() for key, slot in state.slots.items()}
    with pytest.raises(ValueError, match=r"must be torch\.float64 on cpu like the VAE, got torch\.float32"):
        adapter("wan21").decode_chunk(random_latents("wan21", 1), state)


def test_what_cannot_stream_is_refused_with_the_reason():
    refused = {
        "AutoencoderKLAllegro cannot stream: it sees the whole clip": object.__new__(
            diffusers.AutoencoderKLAllegro
        ),
        "AutoencoderVidTok cannot stream: it looks three frames ahead": object.__new__(
            diffusers.AutoencoderVidTok
        ),
        "Linear cannot stream: no adapter is known for it": torch.nn.Linear(1, 1),
    }
    for message, vae in refused.items():
        with pytest.raises(ValueError, match=message):
            stream_vae(vae)
    noisy = diffusers.AutoencoderKLLTXVideo(**LTX | {"decoder_inject_noise": (True,) * 5})
    with pytest.raises(ValueError, match="AutoencoderKLLTXVideo cannot stream with decoder_inject_noise"):
        stream_vae(noisy)
    forward_looking = diffusers.AutoencoderKLLTXVideo(**LTX | {"encoder_causal": False})
    with pytest.raises(ValueError, match="cannot stream with encoder_causal=False"):
        stream_vae(forward_looking)


def test_windows_are_checked():
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        Window(context=0, piece=1, lookahead=1)
