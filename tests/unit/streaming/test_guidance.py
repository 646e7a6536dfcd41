import pytest
import torch

from genstream.pipelines.causal_video import CausalVideoPipeline

PROMPT, OTHER = "a red circle moving right", "a blue square moving left"
FRAMES = 45


@pytest.fixture
def frames_of(pipe, collect):
    """`frames_of(prompt, ...)`: all frames of a request."""

    def frames_of(prompt=PROMPT, **arguments):
        return collect(pipe.start(pipe.request(prompt, **{"num_frames": FRAMES, "seed": 3, **arguments})))

    return frames_of


def test_a_scale_of_one_is_off(pipe, frames_of):
    assert torch.equal(frames_of(guidance_scale=1.0), frames_of())
    assert pipe.start(pipe.request(PROMPT)).negative_text is None


def test_the_velocity_is_linear_in_the_scale(pipe):
    noise = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    velocity, keys = {}, {}
    for scale in (1, 2, 4):
        state = pipe.start(pipe.request(PROMPT, num_frames=FRAMES, guidance_scale=scale))
        with torch.no_grad():
            velocity[scale] = pipe.engine.predict(noise, 700.0, state)
        keys[scale] = state.kv.tensors()
    step = velocity[2] - velocity[1]
    assert step.abs().max() > 1e-4
    torch.testing.assert_close(velocity[4], velocity[1] + 3 * step)
    # What stays in the cache is what the prompt's pass wrote.
    for name, tensor in keys[1].items():
        assert torch.equal(keys[4][name], tensor)


def test_leading_away_from_the_prompt_itself_leads_nowhere(frames_of):
    torch.testing.assert_close(frames_of(guidance_scale=5.0, negative_prompt=PROMPT), frames_of())


def test_what_it_leads_away_from_matters(frames_of):
    without, other = frames_of(guidance_scale=3.0), frames_of(guidance_scale=3.0, negative_prompt=OTHER)
    assert not torch.allclose(without, other)
    assert not torch.allclose(without, frames_of())


def test_a_batch_equals_its_streams(frames_of):
    both = frames_of([PROMPT, OTHER], guidance_scale=3.0, seed=[3, 8])
    torch.testing.assert_close(both[:1], frames_of(PROMPT, guidance_scale=3.0, seed=3), rtol=0, atol=1e-5)
    torch.testing.assert_close(both[1:], frames_of(OTHER, guidance_scale=3.0, seed=8), rtol=0, atol=1e-5)


def test_a_saved_stream_goes_on_with_the_same_frames(pipe, collect, frames_of, tmp_path):
    arguments = {"guidance_scale": 3.0, "negative_prompt": OTHER}
    state = pipe.start(pipe.request(PROMPT, num_frames=FRAMES, seed=3, **arguments))
    first = collect(state, chunks=2)
    pipe.save_state(state, tmp_path / "stream.safetensors")
    rest = collect(pipe.load_state(tmp_path / "stream.safetensors"))
    assert torch.equal(torch.cat([first, rest], dim=2), frames_of(**arguments))


def test_a_call_and_a_stream_take_it_too(pipe, frames_of):
    arguments = {"num_frames": FRAMES, "seed": 3, "guidance_scale": 2.0, "negative_prompt": OTHER}
    streamed = torch.cat([chunk.frames for chunk in pipe.stream(PROMPT, **arguments)], dim=2)
    assert torch.equal(streamed, frames_of(**arguments))
    called = pipe(PROMPT, output_type="pt", **arguments).frames
    torch.testing.assert_close(called.transpose(1, 2) * 2 - 1, streamed)


def test_the_models_own_scale_is_saved_with_it(build_pipeline, tmp_path):
    build_pipeline(guidance_scale=2.5).save_pretrained(tmp_path)
    pipe = CausalVideoPipeline.from_pretrained(tmp_path)
    assert pipe.request(PROMPT).settings.guidance_scale == 2.5
    assert pipe.request(PROMPT, guidance_scale=1.0).negative_embeds is None


@pytest.mark.parametrize("scale", [0.5, -1.0, float("nan"), float("inf")])
def test_bad_scales(pipe, scale):
    with pytest.raises(ValueError, match="guidance_scale must be at least 1"):
        pipe.request(PROMPT, guidance_scale=scale)


def test_bad_negative_prompts(pipe):
    with pytest.raises(ValueError, match="negative_prompt needs a guidance_scale above 1, got 1"):
        pipe.request(PROMPT, negative_prompt=OTHER)
    with pytest.raises(ValueError, match="at most 12 tokens"):
        pipe.request(PROMPT, negative_prompt="red " * 20, guidance_scale=2.0)


def test_guidance_needs_a_text_encoder(build_pipeline):
    pipe = build_pipeline()
    embeds = pipe.encode_prompt(PROMPT)
    pipe.text_encoder = None
    assert pipe.request(prompt_embeds=embeds).negative_embeds is None
    with pytest.raises(ValueError, match="guidance_scale above 1 needs a text encoder"):
        pipe.request(prompt_embeds=embeds, guidance_scale=2.0)
