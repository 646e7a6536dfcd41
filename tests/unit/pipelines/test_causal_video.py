"""The public pipeline: folders, outputs, arguments, images, and what diffusers expects of a pipeline."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import send_to_device
from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple
from PIL import Image
from safetensors.torch import load_file, save_file

import genstream
from genstream.io.model_folder import find_model
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler, FlowEulerScheduler
from genstream.streaming.controls import PromptControl
from genstream.streaming.noise import GivenNoise, SeededNoise
from genstream.streaming.settings import StreamSettings

RED, BLUE = "a red circle moving right", "a blue square moving left"


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def picture():
    """A smooth picture, the same every time."""
    across, down = np.meshgrid(np.linspace(0, 255, 32), np.linspace(0, 255, 32))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype("uint8"))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_loaded_pipeline_gives_the_same(pipe, folder):
    expected = pipe(RED, num_frames=21, seed=3, output_type="pt").frames
    loaded = quiet(CausalVideoPipeline.from_pretrained(folder))
    frames = loaded(RED, num_frames=21, seed=3, output_type="pt").frames
    # Loaded weights lie elsewhere in memory, which changes the order of sums.
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)
    assert loaded.settings == pipe.settings
    assert not loaded.transformer.training and not loaded.vae.training and not loaded.text_encoder.training


def test_folder_names_its_classes(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["genstream", "CausalDiT"]
    assert index["vae"] == ["genstream", "TinyVideoVAE"]
    assert index["scheduler"] == ["genstream", "FewStepScheduler"]
    assert index["text_encoder"][0] == index["tokenizer"][0] == "transformers"
    assert index["window_frames"] == 3


def test_every_component_is_found_through_the_package(pipe):
    for component in (pipe.transformer, pipe.vae, pipe.scheduler):
        library, name = _fetch_class_library_tuple(component)
        assert library == "genstream"
        assert getattr(genstream, name) is type(component)
    for name in genstream._EXPORTS:
        assert getattr(genstream, name).__name__ == name
        assert name in dir(genstream)
    with pytest.raises(AttributeError, match="'Unheard'"):
        _ = genstream.Unheard


def test_dtype_of_a_loaded_pipeline(folder):
    pipe = quiet(CausalVideoPipeline.from_pretrained(folder, dtype=torch.bfloat16))
    assert (pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.bfloat16,) * 3
    frames = pipe(RED, num_frames=21, output_type="pt").frames
    assert frames.isfinite().all()
    chunk = next(pipe.stream(RED, num_frames=21))
    assert chunk.frames.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_installed_model_loads_and_runs_in_half_precision(dtype):
    pipe = quiet(CausalVideoPipeline.from_pretrained("toyworld", dtype=dtype))
    frames = pipe(RED, num_frames=13, output_type="pt").frames
    assert frames.isfinite().all()
    kept = {name for name, weight in pipe.transformer.named_parameters() if weight.dtype == torch.float32}
    assert any("time_embedder" in name for name in kept)
    assert not any("attn1.to_q" in name for name in kept)


def test_to_moves_and_casts(build_pipeline):
    pipe = build_pipeline().to(torch.float64)
    latents = pipe(RED, num_frames=9, output_type="latent").frames
    assert latents.dtype == torch.float64
    expected = build_pipeline()(RED, num_frames=9, output_type="latent").frames
    torch.testing.assert_close(latents.float(), expected, rtol=0, atol=1e-4)
    assert pipe.to("cpu").device.type == "cpu"


def test_pipeline_without_text_encoder(pipe, folder):
    embeds = pipe.encode_prompt(RED)
    loaded = quiet(CausalVideoPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None))
    expected = pipe(RED, num_frames=9, output_type="latent").frames
    latents = loaded(prompt_embeds=embeds, num_frames=9, output_type="latent").frames
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="give prompt_embeds"):
        loaded(RED, num_frames=9)
    guided = {"guidance_scale": 2.0, "num_frames": 9, "output_type": "latent"}
    away = pipe.encode_prompt(BLUE)
    expected = pipe(RED, negative_prompt=BLUE, **guided).frames
    latents = loaded(prompt_embeds=embeds, negative_prompt_embeds=away, **guided).frames
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="needs a text encoder or negative_prompt_embeds"):
        loaded(prompt_embeds=embeds, **guided)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"negative_prompt": BLUE}, "negative_prompt and negative_prompt_embeds exclude each other"),
        ({"guidance_scale": 1.0}, "negative_prompt needs a guidance_scale above 1, got 1"),
        (
            {"negative_prompt_embeds": torch.zeros(2, 12, 16)},
            "negative_prompt_embeds must be one or one for each of 1 videos, got 2",
        ),
        (
            {"negative_prompt_embeds": torch.zeros(1, 12, 15)},
            r"negative_prompt_embeds must be \[B, 12, 16\], got \[1, 12, 15\]",
        ),
        (
            {"negative_prompt_embeds": torch.full((1, 12, 16), torch.nan)},
            "negative_prompt_embeds must be finite",
        ),
    ],
)
def test_bad_negative_embeds(pipe, change, error):
    given = {"negative_prompt_embeds": torch.zeros(1, 12, 16), "guidance_scale": 2.0, **change}
    with pytest.raises(ValueError, match=error):
        pipe.request(RED, **given)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda weights: weights.pop("proj_out.bias"), "lacks 'proj_out.bias'"),
        (lambda weights: weights.update(extra=torch.ones(1)), "holds 'extra'"),
        (
            lambda weights: weights.update({"proj_out.bias": torch.ones(7)}),
            r"'proj_out.bias' must have the shape \[16\], got \[7\]",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(pipe, tmp_path, change, error):
    pipe.save_pretrained(tmp_path)
    (path,) = (tmp_path / "transformer").glob("*.safetensors")
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    with pytest.raises(ValueError, match=rf"transformer'.*{error}"):
        CausalVideoPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_weights(pipe, tmp_path, component, damage):
    pipe.save_pretrained(tmp_path)
    (weights,) = (tmp_path / component).glob("*.safetensors")
    if damage == "missing":
        weights.unlink()
        error = rf"model folder '.*{component}' has no \.safetensors file"
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
        error = rf"model file '.*{component}.{weights.name}' is cut off"
    with pytest.raises(ValueError, match=error):
        CausalVideoPipeline.from_pretrained(tmp_path)


def test_files_of_replaced_components_are_not_looked_at(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    loaded = quiet(CausalVideoPipeline.from_pretrained(tmp_path, vae=pipe.vae))
    assert loaded(RED, num_frames=5, output_type="pt").frames.shape[1] == 5


def test_installed_models_load_by_name():
    assert CausalVideoPipeline.from_pretrained("toyworld").known_words()


def test_output_types_agree(pipe):
    outputs = {
        kind: pipe([RED, BLUE], num_frames=13, output_type=kind).frames
        for kind in ("pil", "np", "pt", "latent")
    }
    assert outputs["pt"].shape == (2, 13, 3, 32, 32)
    assert outputs["np"].shape == (2, 13, 32, 32, 3)
    assert outputs["latent"].shape == (2, 4, 6, 4, 4)
    assert 0 <= outputs["np"].min() and outputs["np"].max() <= 1
    np.testing.assert_array_equal(outputs["np"], outputs["pt"].permute(0, 1, 3, 4, 2).numpy())
    pictures = np.array([[np.asarray(frame) for frame in video] for video in outputs["pil"]])
    np.testing.assert_array_equal(pictures, (outputs["np"] * 255).round())
    decoded = (pipe.vae.decode(outputs["latent"]) / 2 + 0.5).clamp(0, 1)[:, :, :13].transpose(1, 2)
    torch.testing.assert_close(decoded, outputs["pt"], rtol=0, atol=1e-5)


def test_one_frame_is_an_image(pipe):
    ((image,),) = pipe(RED, num_frames=1).frames
    assert image.size == (32, 32)
    (again,) = pipe(RED, num_frames=1, return_dict=False)
    assert np.array_equal(again[0][0], image)


def test_lengths(pipe):
    assert pipe(RED, output_type="latent").frames.shape[2] == 18  # four seconds: 64 frames in whole chunks
    assert pipe(RED, output_type="np").frames.shape[1] == 64
    assert pipe(RED, seconds=1, fps=7, output_type="np").frames.shape[1] == 7
    assert pipe.request(RED).num_frames is None


def test_videos_of_a_prompt(pipe):
    videos = pipe([RED, BLUE], num_frames=9, num_videos_per_prompt=2, seed=4, output_type="pt").frames
    alone = [
        pipe(prompt, num_frames=9, seed=4 + row, output_type="pt").frames
        for row, prompt in enumerate((RED, RED, BLUE, BLUE))
    ]
    torch.testing.assert_close(videos, torch.cat(alone), rtol=0, atol=1e-4)


def test_generators(pipe):
    def run(generator):
        return pipe([RED, BLUE], num_frames=9, generator=generator, output_type="pt").frames

    one = run(torch.Generator().manual_seed(1))
    assert_same(run(torch.Generator().manual_seed(1)), one)
    assert not torch.equal(run(torch.Generator().manual_seed(2)), one)
    each = run([torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)])
    assert torch.equal(each[0], one[0])
    assert not torch.equal(each[1], one[1])


def test_callback(pipe):
    seen = []

    def callback(pipeline, index, timestep, tensors):
        assert pipeline is pipe
        seen.append((index, tensors["latents"].shape[2]))
        return {}

    pipe(RED, num_frames=33, output_type="pt", callback_on_step_end=callback)
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_callback_interrupts(pipe):
    def callback(pipeline, index, timestep, tensors):
        pipeline._interrupt = index == 1
        return {}

    frames = pipe(RED, num_frames=57, output_type="pt", callback_on_step_end=callback).frames
    assert_same(frames, pipe(RED, num_frames=57, output_type="pt").frames[:, :21])


def test_noise_instead_of_a_seed(pipe):
    expected = pipe(RED, num_frames=21, seed=8, output_type="pt").frames
    assert_same(pipe(RED, num_frames=21, noise=SeededNoise((8,)), output_type="pt").frames, expected)
    given = GivenNoise(torch.randn(1, 4, 6, 4, 4), (torch.randn(1, 4, 6, 4, 4),))
    frames = pipe(RED, num_frames=21, noise=given, output_type="pt").frames
    assert_same(pipe(RED, num_frames=21, noise=given, output_type="pt").frames, frames)


@pytest.mark.parametrize("kind", ["pil", "tensor"])
def test_start_from_an_image(pipe, picture, kind):
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    chunks = list(pipe.stream(RED, num_frames=25, image=picture if kind == "pil" else pixels))
    assert [chunk.frames.shape[2] for chunk in chunks] == [1, 12, 12]
    reconstruction = pipe.vae.decode(pipe.vae.encode(pixels[:, :, None]))
    torch.testing.assert_close(chunks[0].frames, reconstruction, rtol=0, atol=1e-5)
    plain = pipe(RED, num_frames=25, output_type="pt").frames
    assert not torch.equal(pipe(RED, num_frames=25, image=picture, output_type="pt").frames, plain)


def test_an_image_starts_every_video_of_a_batch(pipe, picture):
    frames = pipe([RED, BLUE], num_frames=5, image=picture, output_type="pt").frames
    assert torch.equal(frames[0, 0], frames[1, 0])
    assert not torch.equal(frames[0, 4], frames[1, 4])


def test_initial_latents_are_gone_on_from(pipe):
    latents = pipe(RED, num_frames=21, output_type="latent").frames
    longer = pipe(RED, num_frames=45, initial_latents=latents, output_type="latent").frames
    assert longer.shape[2] == 12
    assert_same(longer[:, :, :6], latents)
    assert_same(longer, pipe(RED, num_frames=45, output_type="latent").frames)


@pytest.mark.parametrize("window", [4, 6, 30])
def test_a_window_as_long_as_the_clip_is_full_attention(pipe, window):
    def run(sinks, window):
        settings = StreamSettings(sink_frames=sinks, window_frames=window)
        request = pipe.request(RED, num_frames=33, settings=settings)
        return torch.cat([chunk.latents for chunk in pipe.run(pipe.start(request))], dim=2)

    full = run(0, None)
    torch.testing.assert_close(run(2, window), full, rtol=0, atol=1e-5)
    assert not torch.allclose(run(2, 3), full)


def test_many_step_scheduler(build_pipeline):
    pipe = build_pipeline(scheduler=FlowEulerScheduler(num_steps=3))
    three = pipe(RED, num_frames=9, output_type="latent").frames
    assert_same(pipe(RED, num_frames=9, num_inference_steps=3, output_type="latent").frames, three)
    assert not torch.equal(pipe(RED, num_frames=9, num_inference_steps=5, output_type="latent").frames, three)


def test_known_words(pipe):
    assert "circle" in pipe.known_words()
    assert not any(word.startswith("<") for word in pipe.known_words())
    assert pipe.unknown_words("a purple circle") == ["purple"]


def test_attention_backend(build_pipeline):
    pipe = build_pipeline()
    expected = pipe(RED, num_frames=21, output_type="latent").frames
    pipe.transformer.set_attention_backend("native")
    torch.testing.assert_close(pipe(RED, num_frames=21, output_type="latent").frames, expected)


def test_weights_may_be_moved_by_hooks(build_pipeline):
    """Offloading wraps `forward` and moves its arguments; a stream goes on as if it were not there."""
    pipe = build_pipeline()
    expected = pipe(RED, num_frames=33, output_type="pt").frames
    for module in (pipe.transformer, pipe.vae):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert_same(pipe(RED, num_frames=33, output_type="pt").frames, expected)


def test_stream_state_is_opaque_to_hooks(pipe):
    state = pipe.start(pipe.request(RED, num_frames=9))
    for value in (state, state.kv, state.vae, state.text):
        assert send_to_device(value, "meta") is value
        assert not hasattr(value, "to")


BAD = [
    ({"prompt": ""}, "prompt must not be empty"),
    ({"prompt": []}, "prompt must name at least one"),
    ({"prompt": None}, "prompt or prompt_embeds must be given"),
    ({"prompt": "red " * 12}, "prompt must have at most 12 tokens, got 13"),
    ({"height": 40}, "height must be a positive multiple of 16, got 40; the nearest are 32 and 48"),
    ({"width": 0}, "width must be a positive multiple of 16, got 0"),
    ({"num_frames": 64}, r"num_frames must be 1 \+ 4k, got 64; the nearest are 61 and 65"),
    ({"num_frames": 0}, r"num_frames must be 1 \+ 4k, got 0"),
    ({"num_frames": 9, "seconds": 1.0}, r"num_frames and seconds exclude each other, got 9 and 1\.0"),
    ({"seconds": 0}, "seconds must be a positive number, got 0"),
    ({"seconds": 1.0, "fps": -1}, "fps must be a positive number, got -1"),
    ({"seconds": 0.01}, r"seconds must be long enough for one frame at 16 fps, got 0\.01"),
    ({"num_frames": 5, "fps": "x"}, "fps must be a number, got 'x'"),
    ({"num_frames": 5, "fps": -3}, "fps must be a positive number, got -3"),
    ({"seconds": 1e308}, r"seconds must give a number of frames at 16 fps, got 1e\+308"),
    ({"prompt": "red \udcff circle"}, "prompt must be text that UTF-8 holds"),
    ({"negative_prompt": ["blue"]}, r"negative_prompt must be one text .* got \['blue'\]"),
    ({"guidance_scale": "2"}, "guidance_scale must be a number, got '2'"),
    ({"initial_latents": np.zeros((1, 4, 3, 4, 4))}, "initial_latents must be a tensor, got ndarray"),
    ({"prompt_embeds": [[0.0]], "prompt": None}, "prompt_embeds must be a tensor, got list"),
    ({"seed": -1}, r"seed must be in \[0, 2\^63\), got -1"),
    ({"seed": [1, 2]}, "seed must be one number or one for each of 1 videos, got 2"),
    ({"prompt_embeds": torch.zeros(2, 12, 16)}, "prompt_embeds must have one row for each prompt: 1, got 2"),
    ({"prompt_embeds": torch.zeros(1, 11, 16)}, r"prompt_embeds must be \[B, 12, 16\], got \[1, 11, 16\]"),
    ({"num_inference_steps": 9}, "num_inference_steps must be 2, .*got 9"),
    ({"image": Image.new("RGB", (48, 32))}, "image is 48x32, the video is 32x32; resize it first .*or ask"),
    ({"image": torch.zeros(1, 3, 48, 32)}, "image is 32x48, the video is 32x32"),
    ({"image": torch.zeros(3, 32, 32)}, r"image must be \[B, 3, 32, 32\], got \[3, 32, 32\]"),
    ({"image": torch.zeros(2, 3, 32, 32)}, "image .*got 2"),
    (
        {"image": Image.new("RGB", (32, 32)), "initial_latents": torch.zeros(1, 4, 3, 4, 4)},
        "image and initial_latents exclude each other",
    ),
    ({"image_embeds": torch.zeros(1, 5, 8)}, "image_embeds must not be given: this model takes no image tok"),
    ({"image_channels": torch.zeros(1, 8, 1, 4, 4)}, "image_channels must not be given: this model takes no"),
    ({"initial_latents": torch.zeros(1, 4, 2, 4, 4)}, "initial_latents must be whole chunks of 3 .*got 2"),
    ({"initial_latents": torch.zeros(1, 4, 3, 4, 5)}, r"initial_latents must be \[1, 4, T, 4, 4\], got"),
    ({"initial_latents": torch.zeros(2, 4, 3, 4, 4)}, r"initial_latents must be \[1, 4, T, 4, 4\], got"),
]


@pytest.mark.parametrize(("arguments", "error"), BAD, ids=lambda value: str(value)[:40])
def test_bad_request(pipe, arguments, error):
    with pytest.raises(ValueError, match=error):
        pipe.request(**{"prompt": RED, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"output_type": "mp4"}, r"output_type must be one of \['pil', .*got 'mp4'"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be at least 1, got 0"),
        ({"generator": [torch.Generator()] * 2}, "generator must be one or one for each of 1 videos, got 2"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, r"must be \['latents'\], got \['x'\]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_call(pipe, arguments, error):
    with pytest.raises(ValueError, match=error):
        pipe(RED, num_frames=9, **arguments)


def test_endless_stream_needs_a_window(build_pipeline):
    pipe = build_pipeline(window_frames=None)
    with pytest.raises(ValueError, match="window_frames must be a number for an endless stream"):
        pipe.start(pipe.request(RED))


@pytest.mark.parametrize(
    "wrong", [{"context_timestep": 1001.0}, {"chunk_frames": 0}, {"positions": "sideways"}]
)
def test_bad_settings(build_pipeline, wrong):
    (value,) = wrong.values()
    with pytest.raises(ValueError, match=str(value)):
        _ = build_pipeline(**wrong).settings


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"initial_latents": torch.full((1, 4, 3, 4, 4), float("nan"))}, "initial_latents must be finite"),
        (
            {"initial_latents": torch.zeros(1, 4, 6, 4, 4)},
            "must not be longer than the video, 13 frames, got 21",
        ),
        ({"image": torch.full((1, 3, 32, 32), float("nan"))}, "image must be finite"),
        ({"image": torch.full((1, 3, 32, 32), 2.0)}, r"image must lie in \[-1, 1\], got 2 to 2"),
        ({"seed": 1, "noise": SeededNoise((1,))}, "seed and noise exclude each other"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator exclude each other"),
        ({"num_frames": 13.0}, r"num_frames must be a whole number, got 13\.0"),
        ({"height": "32"}, "height must be a whole number, got '32'"),
    ],
)
def test_what_cannot_be_used_is_refused(pipe, arguments, error):
    with pytest.raises(ValueError, match=error):
        pipe(RED, **{"num_frames": 13, **arguments})


def test_a_prompt_without_words_is_refused(pipe):
    with pytest.raises(ValueError, match="prompt must hold at least one word, got '!!!'"):
        pipe("!!!", num_frames=13)


@pytest.mark.parametrize("name", ["nope", "a/b/c", "./missing"])
def test_a_name_that_is_nothing_is_not_searched_for(name):
    with pytest.raises(
        ValueError, match=r"must be an installed model \(toyworld\), a folder or a repository"
    ):
        CausalVideoPipeline.from_pretrained(name)


def test_a_folder_of_another_pipeline_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace('"CausalVideoPipeline"', '"FluxPipeline"'))
    with pytest.raises(
        ValueError, match="must hold a CausalVideoPipeline, got a FluxPipeline: genstream conv"
    ):
        CausalVideoPipeline.from_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="must hold a CausalVideoPipeline, got a FluxPipeline: genstream conv"
    ):
        find_model(str(tmp_path))


def test_numbers_of_numpy_are_saved_like_others(pipe, tmp_path):
    settings = replace(pipe.settings, chunk_frames=np.int64(3), past_weight=np.float32(0.5))
    state = pipe.start(pipe.request(RED, num_frames=33, guidance_scale=np.float32(2), settings=settings))
    state.submit(PromptControl(prompt="a blue square", blend_chunks=np.int64(2)))
    pipe.step(state)
    pipe.save_state(state, tmp_path / "state.safetensors")
    assert_same(pipe.step(pipe.load_state(tmp_path / "state.safetensors")).frames, pipe.step(state).frames)
    for scheduler in (
        FewStepScheduler(steps=[np.float32(1000), np.int64(500)], shift=np.float32(5)),
        FlowEulerScheduler(num_steps=np.int64(4), shift=np.int64(5)),
    ):
        scheduler.save_pretrained(tmp_path)
        again = type(scheduler).from_pretrained(tmp_path)
        assert again.timesteps.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("model_index.json", {"chunk_frames": None}),
        ("model_index.json", {"window_frames": "x"}),
        ("model_index.json", {"guidance_scale": "x"}),
        ("model_index.json", {"past_weight": None}),
        ("model_index.json", {"text_tokens": None}),
        ("model_index.json", {"default_fps": "x"}),
        ("model_index.json", {"default_height": None}),
        ("model_index.json", {"vae": None}),
        ("model_index.json", {"tokenizer": None}),
        ("scheduler/scheduler_config.json", {"steps": None}),
        ("scheduler/scheduler_config.json", {"steps": "x"}),
        ("scheduler/scheduler_config.json", {"shift": "x"}),
        ("scheduler/scheduler_config.json", []),
        ("transformer/config.json", {"eps": "x"}),
        ("transformer/config.json", {"num_layers": -1}),
        ("transformer/config.json", {"ffn_dim": -1}),
        ("transformer/config.json", {"patch_size": [1, 2]}),
        ("transformer/config.json", {"out_channels": -1}),
        ("transformer/config.json", {"image_dim": -1}),
        ("model_index.json", {"transformer": ["nope", "X"]}),
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}),
        ("model_index.json", {"default_height": -3}),
        ("vae/config.json", {"encoder_width": -3}),
        ("model_index.json", {"vae": ["genstream"]}),
        ("text_encoder/config.json", {"d_ff": -1}),
        ("text_encoder/config.json", {"dense_act_fn": "x"}),
        ("tokenizer/tokenizer.json", []),
        ("tokenizer/tokenizer_config.json", []),
        ("vae/config.json", {"decoder_widths": "x"}),
        ("vae/config.json", {"latent_channels": None}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_damaged_configurations_are_refused(pipe, tmp_path, file, changes):
    pipe.save_pretrained(tmp_path)
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**content, **changes} if changes else changes))
    with pytest.raises(ValueError):
        CausalVideoPipeline.from_pretrained(tmp_path)


def test_a_text_encoder_that_leaves_out_layers_of_its_weights_is_refused(tmp_path):
    shutil.copytree(find_model("toyworld"), tmp_path / "model")
    path = tmp_path / "model" / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 1}))
    with pytest.raises(ValueError, match=r"checkpoint holds 'encoder\.block\.1\..* the model does not have"):
        CausalVideoPipeline.from_pretrained(tmp_path / "model")


def test_a_folder_whose_weights_are_all_of_a_variant(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert not list(tmp_path.rglob("model.safetensors"))
    pipe.save_pretrained(tmp_path / "both", variant="fp16")
    pipe.save_pretrained(tmp_path / "both")
    CausalVideoPipeline.from_pretrained(tmp_path / "both")
    loaded = CausalVideoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    frames = [each(RED, num_frames=9, output_type="latent").frames for each in (loaded, pipe)]
    assert torch.equal(*frames)


@pytest.mark.parametrize(
    "file",
    [
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
    ],
)
def test_a_missing_file_is_named(pipe, tmp_path, file):
    pipe.save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=rf"model file '.*{file}' is missing"):
        CausalVideoPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("first_alone", [False, True])
@pytest.mark.parametrize("num_frames", [1, 2, 9, 10, 13, 14, 61, 64])
def test_chunks_are_counted_as_they_come(build_pipeline, num_frames, first_alone):
    pipe = build_pipeline(independent_first_frame=first_alone)
    fps = 16
    request = pipe.request(RED, seconds=num_frames / fps, fps=fps)
    chunks = list(pipe.run(pipe.start(request)))
    assert pipe.engine.chunk_count(request) == len(chunks)
    assert [pipe.engine.chunk_start(chunk.index, request) for chunk in chunks] == [
        chunk.first_frame for chunk in chunks
    ]


def test_a_very_long_stream_starts_at_once(pipe):
    request = pipe.request(RED, seconds=1e9)
    state = pipe.start(request)
    assert next(pipe.run(state)).frames.shape[2] == 9


def test_model_offload_moves_the_text_encoder_only(build_pipeline, monkeypatch):
    pipe = build_pipeline(guidance_scale=2.0)
    expected = pipe(RED, num_frames=21, output_type="latent").frames
    pipe.enable_model_cpu_offload(device="cpu")
    assert [name for name, part in pipe.components.items() if hasattr(part, "_hf_hook")] == ["text_encoder"]
    (hook,) = pipe._all_hooks
    offloaded = []
    monkeypatch.setattr(hook, "offload", lambda: offloaded.append(pipe.text_encoder))
    state = pipe.start(pipe.request(RED, seed=0))
    assert len(offloaded) == 2  # the prompt and the negative one
    state.submit(genstream.PromptControl(prompt=BLUE))
    pipe.step(state)
    assert len(offloaded) == 3
    assert_same(pipe(RED, num_frames=21, output_type="latent").frames, expected)
    assert pipe._all_hooks == [hook]


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("kept", [[], ["transformer", "vae"]], ids=["all", "text encoder"])
def test_group_offload(build_pipeline, kind, kept):
    pipe = build_pipeline()
    expected = pipe(RED, num_frames=33, output_type="pt").frames
    pipe.enable_group_offload(
        torch.device("cpu"), offload_type=kind, num_blocks_per_group=1, exclude_modules=kept
    )
    assert_same(pipe(RED, num_frames=33, output_type="pt").frames, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", ["model", "block_level", "leaf_level"])
def test_offload_on_a_gpu(build_pipeline, offload):
    expected = build_pipeline().to("cuda")(RED, num_frames=33, output_type="pt").frames
    pipe = build_pipeline()
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cuda")
    else:
        pipe.enable_group_offload(
            torch.device("cuda"), offload_type=offload, num_blocks_per_group=1, exclude_modules="vae"
        )
    torch.testing.assert_close(pipe(RED, num_frames=33, output_type="pt").frames, expected)
    assert next(pipe.text_encoder.parameters()).device.type == "cpu"
    assert next(pipe.vae.parameters()).device.type == "cuda"


def test_sequential_offload_is_refused(build_pipeline):
    with pytest.raises(ValueError, match="enable_sequential_cpu_offload would move every weight"):
        build_pipeline().enable_sequential_cpu_offload(device="cpu")


def test_float8_storage(build_pipeline):
    """Weights stored in float8 are cast when they are used; the cache has the dtype they are cast to."""
    pipe = build_pipeline()
    expected = pipe(RED, num_frames=21, output_type="latent").frames
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    state = pipe.start(pipe.request(RED, num_frames=21))
    assert state.kv.keys[0].dtype == torch.float32
    latents = pipe(RED, num_frames=21, output_type="latent").frames
    assert 0 < (latents - expected).norm() < 0.1 * expected.norm()


def test_a_clip_of_one_chunk_is_no_longer_than_asked_for(build_pipeline, caplog):
    """Many-step models of whole clips denoise as many latent frames as the clip has."""
    options = {"scheduler": FlowEulerScheduler(num_steps=2), "sink_frames": 0, "window_frames": 0}
    pipe, short = (build_pipeline(**options, chunk_frames=count) for count in (6, 3))
    clip = pipe(RED, num_frames=9, output_type="latent").frames
    assert clip.shape[2] == 3
    assert torch.equal(clip, short(RED, num_frames=9, output_type="latent").frames)
    assert not caplog.records
    pipe.request(RED, num_frames=25)
    assert "makes clips of 21 frames that know nothing of each other" in caplog.text


def test_all_parts_load_in_the_same_dtype():
    """Also those whose files are in another one, as the shipped model's are."""
    for options, dtype in (({}, torch.float32), ({"torch_dtype": torch.bfloat16}, torch.bfloat16)):
        pipe = CausalVideoPipeline.from_pretrained("toyworld", **options)
        assert {part.dtype for part in (pipe.text_encoder, pipe.transformer, pipe.vae)} == {dtype}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 5}, "prompt must be a text or a list of texts, got 5"),
        ({"prompt": [RED, None]}, "prompt must be a text or a list of texts, got"),
        ({"seconds": "1"}, "seconds must be a number, got '1'"),
        ({"seconds": 1, "fps": "7"}, "fps must be a number, got '7'"),
        ({"generator": 5}, "generator must be a torch.Generator or a list of them, got 5"),
        ({"num_videos_per_prompt": 1.5}, "num_videos_per_prompt must be a whole number, got 1.5"),
        ({"callback_on_step_end": 5}, "callback_on_step_end must be callable, got 5"),
    ],
)
def test_arguments_of_another_kind(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": RED, **arguments})
