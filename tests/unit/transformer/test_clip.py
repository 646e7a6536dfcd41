"""The published image encoder, against its architecture written out."""

import pytest
import torch
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from genstream.transformer.clip import clip_places, infer_clip_config

WIDTH, HEAD, HIDDEN, PATCH, SIDE, LAYERS = 160, 80, 96, 4, 3, 3


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    shapes = {
        "patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        "cls_embedding": (1, 1, WIDTH),
        "pos_embedding": (1, SIDE**2 + 1, WIDTH),
        "head": (WIDTH, 8),
    }
    modules = {"pre_norm": (WIDTH,), "post_norm": (WIDTH,)}
    for layer in range(LAYERS):
        inner = {
            "norm1": (WIDTH,),
            "attn.to_qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "norm2": (WIDTH,),
            "mlp.0": (HIDDEN, WIDTH),
            "mlp.2": (WIDTH, HIDDEN),
        }
        modules |= {f"transformer.{layer}.{name}": shape for name, shape in inner.items()}
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    weights = {f"visual.{name}": torch.randn(shape) / 9 + (len(shape) == 1) for name, shape in shapes.items()}
    return weights | {"textual.token_embedding.weight": torch.zeros(4, 4), "log_scale": torch.zeros(())}


def norm(x, weights, name):
    return functional.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def tokens_before_the_last_layer(weights, pixels):
    own = {name.removeprefix("visual."): value for name, value in weights.items()}
    patches = functional.conv2d(pixels, own["patch_embedding.weight"], stride=PATCH).flatten(2).mT
    x = torch.cat([own["cls_embedding"].expand(len(pixels), -1, -1), patches], dim=1) + own["pos_embedding"]
    x = norm(x, own, "pre_norm")
    for layer in range(LAYERS - 1):
        name = f"transformer.{layer}"
        qkv = linear(norm(x, own, f"{name}.norm1"), own, f"{name}.attn.to_qkv")
        query, key, value = (
            part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in qkv.split(WIDTH, dim=-1)
        )
        attended = (query @ key.mT / HEAD**0.5).softmax(-1) @ value
        x = x + linear(attended.transpose(1, 2).flatten(2), own, f"{name}.attn.proj")
        hidden = functional.gelu(linear(norm(x, own, f"{name}.norm2"), own, f"{name}.mlp.0"))
        x = x + linear(hidden, own, f"{name}.mlp.2")
    return x


def shapes(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def taken(published, place):
    rows = published[place.name].reshape(-1, *place.shape[1:])
    return rows[place.first_row :][: place.shape[0]]


def test_same_tokens(published):
    config = infer_clip_config(shapes(published))
    places = clip_places(shapes(published), config)
    model = CLIPVisionModel(CLIPVisionConfig(**config)).eval()
    model.load_state_dict({ours: taken(published, place) for ours, place in places.items()})
    pixels = torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH)
    with torch.no_grad():
        tokens = model(pixels, output_hidden_states=True).hidden_states[-2]
    expected = tokens_before_the_last_layer(published, pixels)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_every_tensor_is_accounted_for(published):
    config = infer_clip_config(shapes(published))
    taken_ones = {place.name for place in clip_places(shapes(published), config).values()}
    assert published.keys() - taken_ones == {
        "visual.head",
        "textual.token_embedding.weight",
        "log_scale",
    }
    for name in taken_ones:
        rest = {other: shape for other, shape in shapes(published).items() if other != name}
        with pytest.raises(ValueError, match=f"lacks '{name}'"):
            clip_places(rest, config)
    with pytest.raises(ValueError, match=r"holds 'visual.extra'"):
        clip_places({**shapes(published), "visual.extra": (1,)}, config)


def test_what_is_no_clip(published):
    with pytest.raises(ValueError, match=r"lacks 'visual.patch_embedding.weight' and is no model of this"):
        infer_clip_config({"a": (1,)})
    wider = {**shapes(published), "visual.patch_embedding.weight": (100, 3, PATCH, PATCH)}
    with pytest.raises(ValueError, match="heads of 80 channels, got a width of 100"):
        infer_clip_config(wider)
