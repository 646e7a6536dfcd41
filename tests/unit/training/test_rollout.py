"""Rollouts with gradient equal streams without, and their gradient is what the method asks for."""

from dataclasses import replace

import pytest
import torch

from genstream.shapes import frames_of
from genstream.streaming.engine import CacheEngine
from genstream.streaming.settings import ContextPolicy
from genstream.training.rollout import RolloutEngine, rollout

PROMPTS = ["a red circle moving right", "a blue square moving left"]
LATENT_FRAMES = 15
CHUNK = 3


@pytest.fixture(scope="module")
def pipe(build_pipeline):
    """A pipeline with one sink chunk and a window of one, which lose and rotate frames in such a stream."""
    return build_pipeline()


def ask(pipe, latent_frames=LATENT_FRAMES, **arguments):
    frames = frames_of(latent_frames, pipe.vae.spec.temporal_ratio)
    return pipe.request(PROMPTS, num_frames=frames, seed=3, decode=False, **arguments)


def roll(pipe, request, exit_step=1, gradient_from=0):
    pipe.transformer.zero_grad()
    engine = RolloutEngine(pipe.transformer, pipe.vae, pipe.encode_prompt, gradient_from=gradient_from)
    return rollout(engine, request, exit_step)


def gradients(pipe, latents, weights):
    """Gradients by all weights, of a random direction in the latents."""
    (latents * weights).sum().backward()
    return {name: x.grad for name, x in pipe.transformer.named_parameters() if x.grad is not None}


def directions(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "settings",
    [
        {"context": "clean"},
        {"context": "recompute"},
        {"context_timestep": 100.0},
        {"past_weight": 0.4},
        {"positions": "absolute", "window_frames": None},
    ],
)
def test_a_rollout_is_the_stream(build_pipeline, settings):
    pipe = build_pipeline(**settings)
    request = ask(pipe)
    engine = CacheEngine(pipe.transformer, pipe.vae, pipe.encode_prompt)
    expected = torch.cat([chunk.latents for chunk in engine.stream(request)], dim=2)
    latents = roll(pipe, request)
    assert latents.requires_grad
    assert torch.equal(latents.detach(), expected)


@pytest.mark.parametrize("exit_step", [0, 1])
def test_a_rollout_leaves_at_its_exit_step(pipe, exit_step):
    request = ask(pipe)
    told = []
    forward = pipe.transformer.forward

    def noted(x, timestep, **arguments):
        told.append((round(timestep.flatten()[0].item()), torch.is_grad_enabled()))
        return forward(x, timestep, **arguments)

    pipe.transformer.forward = noted
    try:
        roll(pipe, request, exit_step)
    finally:
        pipe.transformer.forward = forward
    steps = [round(step) for step in request.schedule.timesteps[: exit_step + 1]]
    clean = (0, False)
    chunk = [*((step, False) for step in steps[:-1]), (steps[-1], True), clean]
    assert told == chunk * (LATENT_FRAMES // CHUNK)


def test_only_the_chunks_asked_for_have_gradient(pipe):
    latents = roll(pipe, ask(pipe), gradient_from=9)
    weights = torch.zeros(latents.shape)
    weights[:, :, :9] = 1
    pipe.transformer.zero_grad()
    found = gradients(pipe, latents, weights)
    assert all(not gradient.any() for gradient in found.values())
    whole = roll(pipe, ask(pipe))
    torch.testing.assert_close(latents.detach(), whole.detach(), rtol=0, atol=1e-6)


def test_the_gradient_is_that_of_one_pass_in_a_constant_past(pipe):
    """The last chunk's gradient, by a pass through the plain cache that nothing overwrites afterwards."""
    request = ask(pipe)
    latents = roll(pipe, request)
    start = LATENT_FRAMES - CHUNK
    weights = directions(latents.shape)
    weights[:, :, :start] = 0
    found = gradients(pipe, latents, weights)

    engine = CacheEngine(pipe.transformer, pipe.vae, pipe.encode_prompt)
    state = engine.start(replace(request, initial_latents=latents[:, :, :start].detach()))
    for _ in range(start // CHUNK):
        engine.step(state)

    def velocity(x, timestep):
        return pipe.transformer(
            x,
            torch.full((len(x), 1), timestep, dtype=torch.float64),
            encoder_hidden_states=request.prompt_embeds,
            frame_positions=range(start, LATENT_FRAMES),
            kv_cache=state.kv.clone(),
            return_dict=False,
        )[0]

    first, second = (step / 1000 for step in request.schedule.timesteps)
    x = request.noise.initial(start, latents[:, :, start:].shape)
    with torch.no_grad():
        clean = x - first * velocity(x, 1000 * first)
    x = (1 - second) * clean + second * request.noise.fresh(start, 0, x.shape)
    pipe.transformer.zero_grad()
    again = x - second * velocity(x, 1000 * second)
    torch.testing.assert_close(again, latents[:, :, start:].detach(), rtol=0, atol=1e-5)
    expected = gradients(pipe, again, weights[:, :, start:])
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", [ContextPolicy.FUSED, ContextPolicy.LAST_STEP])
def test_ways_without_a_clean_pass_are_refused(pipe, context):
    request = ask(pipe, settings=replace(pipe.settings, context=context))
    with pytest.raises(ValueError, match=rf"context must be one of .* got '{context}'"):
        roll(pipe, request)
