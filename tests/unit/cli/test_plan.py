"""`genstream plan`: what it prints, and that its proposals hold."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from sparse_models import write_wan

from genstream.cli.__main__ import main

GIB = 2**30


@pytest.fixture(scope="module")
def folder(build_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_pipeline(window_frames=9).save_pretrained(folder)
    return folder


@pytest.fixture
def plan(folder, capsys):
    """`plan("--vram", "24")`: exit code and what was printed."""

    def plan(*options, model=folder):
        code = main(["plan", "--model", str(model), *options])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return plan


def test_every_figure_is_told(plan):
    code, text = plan()
    assert code == 0
    for name in (
        "transformer",
        "VAE",
        "text encoder",
        "KV cache",
        "text cache",
        "decode a chunk",
        "one prompt",
    ):
        assert name in text
    assert "32x32, bfloat16; latent frames: chunk 3, sinks 3, window 9" in text
    assert "--offload group" in text
    assert "fit" not in text


def test_json_adds_up(plan):
    figures = json.loads(plan("--json", "--reserve", "0.5")[1])
    parts = ("transformer", "vae", "text_encoder", "image_encoder", "kv_cache", "text_cache", "vae_state")
    resting = sum(figures[f"{part}_bytes"] for part in parts) + GIB // 2
    assert figures["streaming_bytes"] == resting + max(figures["denoise_bytes"], figures["decode_bytes"])
    assert figures["peak_bytes"] >= figures["streaming_bytes"]
    assert figures["proposals"][0]["peak_bytes"] == figures["proposals"][0]["together_bytes"]


def test_a_stream_that_follows_a_video(plan):
    bare, following = (json.loads(plan("--json", *options)[1]) for options in ([], ["--transform"]))
    assert following["intake_bytes"] > bare["intake_bytes"] == 0
    told = plan("--transform")[1]
    assert "video to follow" in told
    assert "encode a chunk" in told
    code, error = plan("--transform", "--preset", "rolling-forcing")
    assert code == 2
    assert "'rolling-forcing' starts all chunks as noise and cannot follow a video" in error


def test_loras_are_counted(plan, tmp_path):
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "lora.safetensors")
    bare, twice = (
        json.loads(plan("--json", *["--lora", str(tmp_path / "lora.safetensors")] * count)[1])
        for count in (0, 2)
    )
    assert (bare["lora_bytes"], twice["lora_bytes"]) == (0, 2 * 22 * 2)
    assert twice["peak_bytes"] == bare["peak_bytes"] + 2 * 22 * 2
    code, error = plan("--lora", str(tmp_path / "nowhere"))
    assert code == 2
    assert "nowhere' does not exist" in error


def test_json_tells_what_fits(plan):
    figures = json.loads(plan("--json", "--vram", "1.5")[1])
    assert figures["fits"] is True
    assert all(found["fits"] and found["together_fits"] for found in figures["proposals"])
    assert json.loads(plan("--json", "--vram", "0.5")[1])["fits"] is False
    assert "fits" not in json.loads(plan("--json")[1])


def test_what_fits_and_what_does_not(plan):
    figures = json.loads(plan("--json", "--reserve", "0")[1])
    needed = figures["peak_bytes"] / GIB
    assert "It fits into" in plan("--reserve", "0", "--vram", str(1.01 * needed))[1]
    code, text = plan("--reserve", "0", "--vram", str(0.99 * needed))
    assert code == 0
    assert "does not fit into" in text and "MiB too much" in text
    lines = text.splitlines()[-len(figures["proposals"]) :]
    for line, proposal in zip(lines, figures["proposals"], strict=True):
        assert line.split()[0] == proposal["option"].split()[0]
        assert line.endswith("*") == (proposal["together_bytes"] <= 0.99 * figures["peak_bytes"])


def test_presets(plan):
    assert "chunk 3, sinks 3, window 6" in plan("--preset", "longlive")[1]
    assert "chunk 3, sinks 3, window 12" in plan("--preset", "longlive", "--window", "12")[1]
    queue, alone = (
        json.loads(plan("--json", "--preset", name)[1]) for name in ("rolling-forcing", "causvid")
    )
    assert queue["denoise_bytes"] > 3 * alone["denoise_bytes"]


def test_nothing_is_enough(plan):
    assert plan("--vram", "0.5")[1].splitlines()[-1] == "None of it is enough."


def test_a_proposal_gives_what_it_says(plan):
    proposed = json.loads(plan("--json")[1])["proposals"]
    for proposal in proposed:
        taken = json.loads(plan("--json", *proposal["option"].split())[1])
        assert taken["peak_bytes"] == proposal["peak_bytes"]
    options = [word for proposal in proposed for word in proposal["option"].split()]
    assert json.loads(plan("--json", *options)[1])["peak_bytes"] == proposed[-1]["together_bytes"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--vram", "0"], r"vram (--vram) must be a number above 0, got 0.0"),
        (["--vram", "nan"], r"vram (--vram) must be a number above 0, got nan"),
        (["--batch", "0"], "batch (--batch) must be a number above 0, got 0"),
        (
            ["--size", "50x32"],
            "width (--size) must be a positive multiple of 16, got 50; the nearest are 48 and 64",
        ),
        (["--chunk", "0"], "chunk_frames (--chunk) must be at least 1, got 0"),
    ],
)
def test_bad_options(plan, options, error):
    code, text = plan(*options)
    assert code == 2
    assert error in text


def test_what_the_model_does_not_say(plan, tmp_path):
    folder = write_wan(tmp_path / "wan", num_layers=1)
    index = json.loads((folder / "model_index.json").read_text())
    del index["default_height"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "size must be given (--size): model 'wan' does not say its own" in plan(model=folder)[1]
    assert "--seconds needs a frame rate" in plan("--size", "64x64", "--seconds", "4", model=folder)[1]


def test_a_model_without_vae(plan, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bare")
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "bare" / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    code, text = plan(model=tmp_path / "bare")
    assert code == 2
    assert "has no vae" in text
    assert "--tiny-vae" in text


@pytest.mark.parametrize(
    ("preset", "trained", "error"),
    [
        ("motionstream", {}, "image-to-video models: in_channels must be above the 4 of the latents, got 4"),
        (
            "longlive",
            {"chunk_frames": 2},
            "generates 3 latent frames at a time, this model was trained for 2",
        ),
        (
            "longlive",
            {"scheduler": ["diffusers", "UniPCMultistepScheduler"]},
            "needs a few-step student, this model has a UniPCMultistepScheduler",
        ),
    ],
)
def test_a_preset_that_the_model_cannot_run(plan, folder, tmp_path, preset, trained, error):
    shutil.copytree(folder, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index | trained))
    code, text = plan("--preset", preset, model=tmp_path / "other")
    assert code == 2
    assert error in text


def test_a_damaged_model_is_named(plan, tmp_path):
    folder = write_wan(tmp_path / "wan", num_layers=1)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    code, text = plan(model=folder)
    assert code == 2
    assert f"model file {str(path)!r} is cut off" in text


def test_an_index_without_scheduler_and_an_empty_configuration(plan, folder, tmp_path):
    for name, damage in (("bare", {}), ("unscheduled", {"scheduler": None})):
        shutil.copytree(folder, tmp_path / name)
        place = tmp_path / name / ("transformer/config.json" if name == "bare" else "model_index.json")
        content = {} if name == "bare" else json.loads(place.read_text()) | damage
        content.pop("scheduler", None)
        place.write_text(json.dumps(content))
    code, error = plan(model=tmp_path / "bare")
    assert code == 2
    assert "transformer': checkpoint lacks 'blocks" in error
    code, error = plan(model=tmp_path / "unscheduled")
    assert code == 2
    assert "model_index.json' must name a scheduler" in error
