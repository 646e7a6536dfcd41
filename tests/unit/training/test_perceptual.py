import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
)

from genstream.training.perceptual import load_perceptual


def resnet():
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"))


def dino():
    return Dinov2Model(
        Dinov2Config(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    )


def clip():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8))


@pytest.fixture(params=[resnet, dino, clip])
def folder(request, tmp_path):
    torch.manual_seed(0)
    request.param().save_pretrained(tmp_path)
    expected = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(expected))
    return tmp_path


def test_more_noise_is_further_away(folder):
    distance = load_perceptual(folder)
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.rand((3, 3, 32, 40), generator=generator) - 0.5 for _ in range(2))
    assert torch.equal(distance(images, images), torch.zeros(3))
    near, far = (distance(images + scale * noise, images) for scale in (0.1, 1.0))
    assert near.shape == (3,)
    assert (0 < near).all()
    assert (near < far).all()


def test_gradient_reaches_the_images_only(folder):
    distance = load_perceptual(folder)
    images = torch.zeros((1, 3, 32, 32), requires_grad=True)
    distance(images, torch.rand(1, 3, 32, 32)).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in distance._model.parameters())


def test_a_folder_that_does_not_say_what_it_expects_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"with preprocessor_config\.json, got"):
        load_perceptual(tmp_path)
    described = tmp_path / "preprocessor_config.json"
    for nonsense in ({}, [], {"image_mean": "grey"}, {"image_mean": [0.5, None, 0.5]}, {"image_mean": [0.5]}):
        described.write_text(json.dumps(nonsense))
        with pytest.raises(
            ValueError, match=r"image_mean in '.*preprocessor_config\.json' must be 3 numbers"
        ):
            load_perceptual(tmp_path)
    described.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    with pytest.raises(ValueError, match=r"perceptual_model in .* cannot be loaded"):
        load_perceptual(tmp_path)


def test_damaged_weights_are_named(folder):
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"perceptual_model in .* cannot be loaded"):
        load_perceptual(folder)


def test_of_a_model_of_two_the_one_that_sees_is_taken(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sees = {**small, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 50}, vision_config=sees)).save_pretrained(
        tmp_path
    )
    CLIPImageProcessor().save_pretrained(tmp_path)
    images = torch.rand(2, 3, 32, 48)
    assert (load_perceptual(tmp_path)(images, images.flip(3)) > 0).all()


def test_a_model_that_reads_is_refused(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**small, vocab_size=50)).save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a model that sees images, got a BertModel"):
        load_perceptual(tmp_path)
