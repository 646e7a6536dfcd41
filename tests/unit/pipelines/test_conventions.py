"""What diffusers' own tests ask of a pipeline: signature, batches, callbacks, variants, parts and dtypes."""

import inspect

import numpy as np
import pytest
import torch

from genstream.pipelines.causal_video import CausalVideoPipeline

SETTINGS = {
    "sink_frames": 3,
    "window_frames": 3,
    "positions": "window",
    "text_tokens": 12,
    "default_height": 32,
    "default_width": 32,
}
RED, BLUE = "a red circle moving right", "a blue square moving left"


def latents(pipe, prompt=RED, **arguments):
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, num_frames=21, output_type="latent", **arguments).frames


def test_signature():
    wanted = {
        "prompt",
        "height",
        "width",
        "num_frames",
        "num_inference_steps",
        "guidance_scale",
        "negative_prompt",
        "num_videos_per_prompt",
        "generator",
        "prompt_embeds",
        "output_type",
        "return_dict",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
    }
    parameters = inspect.signature(CausalVideoPipeline.__call__).parameters
    assert wanted <= set(parameters)
    assert parameters["return_dict"].default is True
    assert parameters["output_type"].default == "pil"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_batch_is_its_videos(pipe, size):
    prompts = [RED, BLUE, RED][:size]
    together = latents(pipe, prompts, seed=list(range(size)))
    alone = [latents(pipe, prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_parts_make_the_same_pipeline(pipe):
    own = {"tokenizer", "text_encoder", "transformer", "vae", "scheduler"}
    assert set(pipe.components) == own | {"image_encoder", "image_processor"}
    expected = latents(pipe)
    settings = {
        name: pipe.config[name] for name in ("sink_frames", "window_frames", "positions", "text_tokens")
    }
    sizes = {"default_height": 32, "default_width": 32}
    assert torch.equal(latents(CausalVideoPipeline(**pipe.components, **settings, **sizes)), expected)


def test_a_pipeline_from_a_pipeline(pipe):
    other = CausalVideoPipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    assert other.settings == pipe.settings
    assert torch.equal(latents(other), latents(pipe))


def test_a_pipeline_without_optional_parts(pipe, tmp_path):
    embeds = pipe.encode_prompt(RED)
    expected = latents(pipe)
    settings = {
        name: pipe.config[name] for name in ("sink_frames", "window_frames", "positions", "text_tokens")
    }
    parts = {**pipe.components, "tokenizer": None, "text_encoder": None}
    bare = CausalVideoPipeline(**parts, **settings, default_height=32, default_width=32)
    bare.save_pretrained(tmp_path)
    assert not (tmp_path / "text_encoder").exists()
    loaded = CausalVideoPipeline.from_pretrained(tmp_path)
    assert loaded.components["text_encoder"] is loaded.components["tokenizer"] is None
    found = latents(loaded, None, prompt_embeds=embeds)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_prompts_encoded_apart(pipe):
    embeds = pipe.encode_prompt([RED, BLUE])
    together = latents(pipe, [RED, BLUE])
    assert torch.equal(latents(pipe, None, prompt_embeds=embeds), together)


def test_variants(pipe, tmp_path):
    expected = latents(pipe)
    pipe.save_pretrained(tmp_path, variant="fp16")
    for part in ("transformer", "vae", "text_encoder"):
        assert [path.suffixes for path in (tmp_path / part).glob("*.safetensors")] == [
            [".fp16", ".safetensors"]
        ]
    found = latents(CausalVideoPipeline.from_pretrained(tmp_path, variant="fp16"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises((OSError, ValueError), match="fp32"):
        CausalVideoPipeline.from_pretrained(tmp_path, variant="fp32")


def test_a_dtype_for_each_part(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    dtypes = {"transformer": torch.bfloat16, "default": torch.float32}
    loaded = CausalVideoPipeline.from_pretrained(tmp_path, dtype=dtypes)
    assert (loaded.transformer.dtype, loaded.vae.dtype) == (torch.bfloat16, torch.float32)
    frames = loaded(RED, num_frames=21, output_type="pt").frames
    assert frames.dtype == torch.float32 and frames.isfinite().all()


def test_half_precision_has_no_gaps(build_pipeline):
    frames = latents(build_pipeline().to(torch.float16))
    assert frames.isfinite().all()
    expected = latents(build_pipeline())
    np.testing.assert_allclose(frames.float(), expected, atol=0.1)


def test_callbacks_see_every_chunk_and_change_none(pipe):
    seen = []

    def callback(pipeline, index, timestep, tensors):
        assert pipeline is pipe
        assert set(tensors) <= set(pipe._callback_tensor_inputs)
        seen.append(tensors["latents"].clone())
        tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    found = latents(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents"])
    assert torch.equal(torch.cat(seen, dim=2), found)
    assert torch.equal(found, latents(pipe))


def test_the_progress_bar_counts_chunks(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    pipe(RED, num_frames=21, output_type="latent")
    pipe.set_progress_bar_config(disable=True)
    assert "2/2" in capsys.readouterr().err
