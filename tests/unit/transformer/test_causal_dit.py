import pytest
import torch

from genstream.transformer.causal_dit import CausalDiT


@pytest.fixture(scope="module")
def model(build_pipeline):
    return build_pipeline().transformer


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 5, 4, 6, generator=generator)
    context = torch.randn(2, 12, 16, generator=generator)
    return latents, torch.tensor([300.0, 900.0]), context


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_one_timestep_per_frame(model, inputs):
    latents, timestep, context = inputs
    each = timestep[:, None].expand(-1, latents.shape[2])
    close(model(latents, each, context).sample, model(latents, timestep, context).sample)


def test_each_frame_has_its_own_timestep(model, inputs):
    """Alone, a frame gives the same whatever the noise levels of the frames it does not see."""
    latents, _, context = inputs
    levels = torch.tensor([[0.0, 100.0, 500.0, 900.0, 1000.0]]).expand(2, -1)
    together = model(latents, levels, context, attention_mask=torch.eye(5, dtype=torch.bool)).sample
    for frame in range(5):
        x, level = latents[:, :, frame : frame + 1], levels[:, frame]
        alone = model(x, level, context, frame_positions=[frame]).sample
        close(together[:, :, frame : frame + 1], alone, atol=1e-5)


def test_full_mask_is_no_mask(model, inputs):
    mask = torch.ones(5, 5, dtype=torch.bool)
    close(model(*inputs, attention_mask=mask).sample, model(*inputs).sample, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(inputs, build_pipeline):
    gradients = []
    for checkpointed in (False, True):
        model = build_pipeline().transformer.train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        model(*inputs).sample.square().mean().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        close(checkpointed, plain)


def test_text_cache_stands_for_the_prompt(model, inputs):
    latents, timestep, context = inputs
    cached = model(latents, timestep, text_cache=model.text_cache(context)).sample
    close(cached, model(*inputs).sample)


def test_attention_backend(inputs, build_pipeline):
    model = build_pipeline().transformer
    expected = model(*inputs).sample
    model.set_attention_backend("native")
    close(model(*inputs).sample, expected)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"patch_size": (2, 2, 2)}, r"patch_size .*\(2, 2, 2\)"),
        ({"qk_norm": "layer_norm"}, "qk_norm .*'layer_norm'"),
    ],
)
def test_bad_configuration(arguments, error):
    with pytest.raises(ValueError, match=error):
        CausalDiT(num_attention_heads=1, attention_head_dim=12, num_layers=1, ffn_dim=8, **arguments)


def test_bad_arguments(model, inputs):
    latents, timestep, context = inputs
    with pytest.raises(ValueError, match="3x6"):
        model(latents[:, :, :, :3], timestep, context)
    with pytest.raises(ValueError, match="encoder_hidden_states or text_cache"):
        model(latents, timestep)
    with pytest.raises(ValueError, match="takes no image tokens"):
        model(latents, timestep, context, torch.zeros(2, 257, 8))
