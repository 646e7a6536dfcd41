"""Transformers that are told about an image: channels behind the latents, CLIP tokens beside the prompt."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from genstream.cli.__main__ import main
from genstream.conditioning.image import image_tokens
from genstream.conditioning.wan_image import WanImageProcessor
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.transformer.causal_dit import CausalDiT

RED, BLUE = "a red circle moving right", "a blue square moving left"
CHANNELS = 4 + 4
"""Mask and latents of the image; the VAE has 4 frames in a latent frame and 4 channels."""
WIDTH = 24


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def transformer(*, channels=CHANNELS, image_dim=WIDTH, positions=None):
    torch.manual_seed(0)
    return CausalDiT(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4 + channels,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        image_dim=image_dim,
        added_kv_proj_dim=None if image_dim is None else 24,
        pos_embed_seq_len=positions,
    ).eval()


def clip_encoder():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return processor, CLIPVisionModel(config).eval()


@pytest.fixture(scope="module")
def pipe(build_pipeline):
    """A pipeline whose transformer takes image channels and tokens, with CLIP."""
    parts = build_pipeline()
    processor, encoder = clip_encoder()
    components = {
        **parts.components,
        "transformer": transformer(),
        "image_processor": processor,
        "image_encoder": encoder,
    }
    options = ("sink_frames", "window_frames", "positions", "text_tokens", "default_height", "default_width")
    pipe = CausalVideoPipeline(**components, **{name: parts.config[name] for name in options})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def picture():
    """`[1, 3, 32, 32]` in [-1, 1], as a PIL image gives it."""
    levels = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(2))
    return levels.float() / 127.5 - 1


def as_pil(picture):
    return Image.fromarray(((picture[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def latents_of(pipe, **arguments):
    return pipe(RED, num_frames=33, output_type="latent", **arguments).frames


def test_the_image_and_what_stands_for_it_are_the_same(pipe, picture):
    request = pipe.request(RED, num_frames=33, image=picture)
    expected = latents_of(pipe, image=picture)
    assert_same(latents_of(pipe, image=as_pil(picture)), expected)
    given = {"image_embeds": request.image_embeds, "image_channels": request.image_channels}
    assert_same(latents_of(pipe, **given), expected)
    assert not torch.equal(latents_of(pipe, image=-picture), expected)
    for name, tensor in given.items():
        assert not torch.allclose(latents_of(pipe, **{**given, name: -tensor}), expected, atol=1e-4)


def test_channels_of_an_image(pipe, picture):
    """A mask of 1 over the frames of the first latent frame, and the image followed by grey."""
    channels = pipe.request(RED, num_frames=33, image=picture).image_channels
    clip = torch.zeros(1, 3, 33, 32, 32)
    clip[:, :, 0] = picture
    assert channels.shape == (1, CHANNELS, 9, 4, 4)
    assert channels[:, :4, 0].eq(1).all() and channels[:, :4, 1:].eq(0).all()
    torch.testing.assert_close(channels[:, 4:], pipe.vae.encode(clip), rtol=0, atol=1e-5)


def test_the_first_frame_is_generated_too(pipe, picture):
    assert pipe.request(RED, num_frames=33, image=picture).initial_latents is None
    assert latents_of(pipe, image=picture).shape[2] == 9


def test_the_last_channels_stand_for_all_that_follow(pipe, picture):
    request = pipe.request(RED, num_frames=33, image=picture)
    channels = request.image_channels
    steady = torch.cat([channels[:, :, :4], channels[:, :, 3:4].expand(-1, -1, 5, -1, -1)], dim=2)
    given = {"image_embeds": request.image_embeds}
    assert_same(
        latents_of(pipe, **given, image_channels=channels[:, :, :4]),
        latents_of(pipe, **given, image_channels=steady),
    )


def test_tokens_of_an_image(pipe, picture):
    tokens = pipe.request(RED, image=picture).image_embeds
    inputs = pipe.image_processor(images=as_pil(picture), return_tensors="pt").pixel_values
    expected = pipe.image_encoder(inputs, output_hidden_states=True).hidden_states[-2]
    assert_same(tokens, expected)


def test_a_stream_goes_on_after_a_snapshot(pipe, picture, tmp_path):
    request = pipe.request(RED, num_frames=45, image=picture)
    expected = torch.cat([chunk.frames for chunk in pipe.run(pipe.start(request))], dim=2)
    state = pipe.start(request)
    before = [pipe.step(state).frames, pipe.step(state).frames]
    pipe.save_state(state, tmp_path / "s")
    after = [chunk.frames for chunk in pipe.run(pipe.load_state(tmp_path / "s"))]
    assert_same(torch.cat([*before, *after], dim=2), expected)


def test_a_batch_equals_its_streams(pipe, picture):
    pictures = torch.cat([picture, -picture])
    arguments = {"num_frames": 21, "output_type": "latent"}
    both = pipe([RED, BLUE], image=pictures, seed=[3, 8], **arguments).frames
    for row, (prompt, seed) in enumerate([(RED, 3), (BLUE, 8)]):
        alone = pipe(prompt, image=pictures[row : row + 1], seed=seed, **arguments).frames
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=1e-4)


def test_the_components_are_saved_with_the_pipeline(pipe, picture, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = CausalVideoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.image_encoder, CLIPVisionModel)
    torch.testing.assert_close(latents_of(loaded, image=picture), latents_of(pipe, image=picture))
    loaded = CausalVideoPipeline.from_pretrained(tmp_path, image_encoder=None, image_processor=None)
    with pytest.raises(ValueError, match=r"image_embeds must be given: .* without image_encoder"):
        loaded.request(RED, image=picture)


@pytest.mark.parametrize("given", ["pipeline", "encoder"])
def test_convert_adds_the_image_encoder(pipe, picture, tmp_path, given):
    pipe.save_pretrained(tmp_path / "whole")
    bare = CausalVideoPipeline.from_pretrained(tmp_path / "whole", image_encoder=None, image_processor=None)
    bare.save_pretrained(tmp_path / "bare")
    place = tmp_path / "whole" if given == "pipeline" else tmp_path / "whole" / "image_encoder"
    command = ["convert", str(tmp_path / "bare"), "-o", str(tmp_path / "out"), "--image-encoder"]
    assert main([*command, str(place)]) == 0
    loaded = CausalVideoPipeline.from_pretrained(tmp_path / "out")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(latents_of(loaded, image=picture), latents_of(pipe, image=picture))


def wan_names(encoder):
    """Weights of CLIP's vision model under the names of Wan 2.1, beside some of its text model."""
    ours = encoder.state_dict()
    published = {"log_scale": torch.zeros(()), "textual.norm.weight": torch.ones(3)}
    published["visual.head"] = torch.zeros(encoder.config.hidden_size, 4)
    published["visual.cls_embedding"] = ours["embeddings.class_embedding"][None, None]
    published["visual.pos_embedding"] = ours["embeddings.position_embedding.weight"][None]
    published["visual.patch_embedding.weight"] = ours["embeddings.patch_embedding.weight"]
    modules = {"pre_norm": ["pre_layrnorm"], "post_norm": ["post_layernorm"]}
    for layer in range(encoder.config.num_hidden_layers):
        inside = {
            "norm1": ["layer_norm1"],
            "attn.to_qkv": [f"self_attn.{name}_proj" for name in "qkv"],
            "attn.proj": ["self_attn.out_proj"],
            "norm2": ["layer_norm2"],
            "mlp.0": ["mlp.fc1"],
            "mlp.2": ["mlp.fc2"],
        }
        modules |= {
            f"transformer.{layer}.{theirs}": [f"encoder.layers.{layer}.{name}" for name in names]
            for theirs, names in inside.items()
        }
    for theirs, names in modules.items():
        for kind in ("weight", "bias"):
            published[f"visual.{theirs}.{kind}"] = torch.cat([ours[f"{name}.{kind}"] for name in names])
    return published


@pytest.mark.parametrize("given", ["file", "folder", "source"])
def test_convert_takes_the_published_image_encoder(pipe, picture, tmp_path, capsys, given):
    torch.manual_seed(5)
    config = CLIPVisionConfig(
        hidden_size=80,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=1,
        image_size=24,
        patch_size=8,
        hidden_act="gelu",
    )
    encoder = CLIPVisionModel(config).eval()
    parts = {**pipe.components, "transformer": transformer(image_dim=80)}
    parts |= {"image_encoder": None, "image_processor": None}
    wider = CausalVideoPipeline(**parts, default_height=32, default_width=32)
    wider.save_pretrained(tmp_path / "bare")
    (tmp_path / "wan").mkdir()
    place = tmp_path / ("bare" if given == "source" else "wan")
    torch.save(wan_names(encoder), place / "models_clip_vit.pth")
    command = ["convert", str(tmp_path / "bare"), "-o", str(tmp_path / "out")]
    if given != "source":
        name = "models_clip_vit.pth" if given == "file" else ""
        command += ["--image-encoder", str(tmp_path / "wan" / name)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "took image_encoder (CLIPVisionModel) from models_clip_vit.pth" in said
    assert "left out of models_clip_vit.pth: CLIP's text half" in said
    loaded = CausalVideoPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(loaded.image_processor, WanImageProcessor)
    wide = torch.cat([picture, -picture], dim=3)  # nothing of it may be cut off
    # As Wan's code: no mean over pixels that fall together, no rounding behind it.
    whole = functional.interpolate(as_levels(wide) / 127.5 - 1, (24, 24), mode="bicubic") * 0.5 + 0.5
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    with torch.no_grad():
        expected = encoder((whole - mean) / std, output_hidden_states=True).hidden_states[-2]
    tokens = image_tokens(wide, loaded.image_processor, loaded.image_encoder)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    again = CausalVideoPipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(image_tokens(wide, again.image_processor, again.image_encoder), tokens)


def as_levels(picture):
    return ((picture + 1) * 127.5).round()


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_clip_under_the_names_of_older_files(pipe, picture, tmp_path, prefix):
    """Published diffusers folders have the name of the tower in front of every tensor."""
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "image_encoder" / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    loaded = CausalVideoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert_same(latents_of(loaded, image=picture), latents_of(pipe, image=picture))


def test_convert_refuses_what_is_no_image_encoder(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "whole")
    command = ["convert", str(tmp_path / "whole"), "-o", str(tmp_path / "out"), "--image-encoder"]
    assert main([*command, str(tmp_path / "whole" / "vae")]) == 2
    assert (
        "image_encoder (--image-encoder) must be the folder of a CLIP vision model" in capsys.readouterr().err
    )
    config = tmp_path / "whole" / "image_encoder" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"hidden_size": 77}))
    assert main([*command, str(tmp_path / "whole")]) == 2
    assert "must describe a CLIPVisionModel: " in capsys.readouterr().err
    wider = CLIPVisionConfig.from_dict(content | {"hidden_size": 2 * WIDTH})
    CLIPVisionModel(wider).save_pretrained(config.parent)
    assert main([*command, str(tmp_path / "whole")]) == 2
    assert f"image_encoder must have hidden_size {WIDTH} like the transformer's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, "image or image_embeds must be given: this model starts from an image"),
        ({"image_embeds": torch.zeros(1, 5, WIDTH)}, "image or image_channels must be given"),
        (
            {"image_embeds": torch.zeros(1, 5, 7)},
            rf"image_embeds must be \[1, tokens, {WIDTH}\], got \[1, 5, 7",
        ),
        ({"image_embeds": torch.zeros(2, 5, WIDTH)}, r"image_embeds must be \[1, .*got \[2"),
        (
            {"image_embeds": torch.zeros(1, 5, WIDTH), "image_channels": torch.zeros(1, 5, 1, 4, 4)},
            r"image_channels must be \[1, 8, T, 4, 4\], got \[1, 5, 1, 4, 4\]",
        ),
        (
            {"image_embeds": torch.zeros(1, 5, WIDTH), "image_channels": torch.zeros(1, 8, 0, 4, 4)},
            r"image_channels must be \[1, 8, T, 4, 4\], got",
        ),
        (
            {"image_embeds": torch.zeros(1, 5, WIDTH), "image_channels": torch.zeros(1, 8, 1, 4, 5)},
            r"image_channels must be \[1, 8, T, 4, 4\], got",
        ),
        ({"image": torch.zeros(1, 3, 32, 48)}, "image is 48x32, the video is 32x32"),
    ],
)
def test_what_does_not_fit_is_refused(pipe, arguments, error):
    with pytest.raises(ValueError, match=error):
        pipe.request(RED, **arguments)


def test_channels_that_the_vae_cannot_make(build_pipeline, picture):
    pipe = build_pipeline()
    pipe.transformer = transformer(channels=5, image_dim=None)
    with pytest.raises(ValueError, match=r"image_channels must be given: this model takes 5 .* 4 for"):
        pipe.request(RED, image=picture)
    request = pipe.request(RED, num_frames=9, image_channels=torch.zeros(1, 5, 1, 4, 4))
    assert len(list(pipe.run(pipe.start(request)))) == 1


def test_a_model_of_two_images(build_pipeline):
    pipe = build_pipeline()
    pipe.transformer = transformer(channels=0, positions=10)
    with pytest.raises(ValueError, match=r"must be \[1, 10, 24\], .* last image, got \[1, 5, 24\]"):
        pipe.request(RED, image_embeds=torch.zeros(1, 5, WIDTH))
    request = pipe.request(RED, num_frames=9, image_embeds=torch.zeros(1, 10, WIDTH))
    assert len(list(pipe.run(pipe.start(request)))) == 1
