"""The published text encoder, against its architecture written out."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import UMT5Config, UMT5EncoderModel

from genstream.transformer.umt5 import infer_umt5_config, umt5_places

VOCABULARY, WIDTH, INNER, HIDDEN, HEADS, BUCKETS, LAYERS = 50, 16, 24, 20, 4, 32, 2


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    shapes = {"token_embedding": (VOCABULARY, WIDTH), "norm": (WIDTH,)}
    for layer in range(LAYERS):
        inner = {
            "norm1": (WIDTH,),
            "attn.q": (INNER, WIDTH),
            "attn.k": (INNER, WIDTH),
            "attn.v": (INNER, WIDTH),
            "attn.o": (WIDTH, INNER),
            "norm2": (WIDTH,),
            "ffn.gate.0": (HIDDEN, WIDTH),
            "ffn.fc1": (HIDDEN, WIDTH),
            "ffn.fc2": (WIDTH, HIDDEN),
            "pos_embedding.embedding": (BUCKETS, HEADS),
        }
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in inner.items()}
    return {f"{name}.weight": torch.randn(shape) / 3 + (len(shape) == 1) for name, shape in shapes.items()}


def norm(x, weight):
    return weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def bucket(distance):
    """Of the key's position minus the query's: near ones exactly, far ones by their logarithm."""
    exact = BUCKETS // 4
    near = abs(distance)
    if near >= exact:
        far = exact + int(math.log(near / exact) / math.log(128 / exact) * (BUCKETS // 2 - exact))
        near = min(far, BUCKETS // 2 - 1)
    return near + (BUCKETS // 2 if distance > 0 else 0)


def forward(weights, ids):
    x = weights["token_embedding.weight"][ids]
    positions = range(len(ids))
    buckets = torch.tensor([[bucket(key - query) for key in positions] for query in positions])
    for layer in range(LAYERS):
        own = {name.removeprefix(f"blocks.{layer}."): value for name, value in weights.items()}
        y = norm(x, own["norm1.weight"])
        query, key, value = (
            (y @ own[f"attn.{name}.weight"].T).unflatten(-1, (HEADS, -1)).transpose(0, 1) for name in "qkv"
        )
        bias = own["pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        attended = (query @ key.transpose(1, 2) + bias).softmax(-1) @ value
        x = x + attended.transpose(0, 1).flatten(1) @ own["attn.o.weight"].T
        y = norm(x, own["norm2.weight"])
        gate = functional.gelu(y @ own["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ own["ffn.fc1.weight"].T)) @ own["ffn.fc2.weight"].T
    return norm(x, weights["norm.weight"])


def shapes(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def test_same_embeddings(published):
    config = infer_umt5_config(shapes(published))
    places = umt5_places(shapes(published), config)
    model = UMT5EncoderModel(UMT5Config(**config)).eval()
    result = model.load_state_dict({ours: published[name] for ours, name in places.items()}, strict=False)
    assert result.missing_keys == ["encoder.embed_tokens.weight"]  # the same as "shared.weight"
    assert not result.unexpected_keys
    model.tie_weights()
    ids = torch.randint(VOCABULARY, (200,))  # far enough for all buckets
    with torch.no_grad():
        embeddings = model(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(embeddings, forward(published, ids), rtol=1e-4, atol=1e-4)


def test_every_tensor_is_accounted_for(published):
    config = infer_umt5_config(shapes(published))
    for name in published:
        rest = {other: shape for other, shape in shapes(published).items() if other != name}
        with pytest.raises(ValueError, match=f"lacks '{name}'"):
            umt5_places(rest, config)
    with pytest.raises(ValueError, match=r"holds 'head.weight'"):
        umt5_places({**shapes(published), "head.weight": (VOCABULARY, WIDTH)}, config)
