"""Presets against what their projects publish, and against models that cannot run them."""

import pytest
import torch

from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FlowEulerScheduler
from genstream.streaming.controls import PromptControl
from genstream.streaming.presets import PRESETS, find_preset
from genstream.streaming.settings import ContextPolicy

RED, BLUE = "a red circle moving right", "a blue square moving left"
RUNNABLE = [name for name, preset in PRESETS.items() if not preset.takes_image]


def test_names():
    assert list(PRESETS) == [
        "self-forcing",
        "causvid",
        "longlive",
        "rolling-forcing",
        "krea",
        "motionstream",
    ]
    with pytest.raises(ValueError, match=r"preset must be one of self-forcing, .*, got 'wan'"):
        find_preset("wan")


@pytest.mark.parametrize(
    ("name", "timesteps", "frames_seen"),
    [
        ("self-forcing", (1000, 937.5, 833.333, 625), 21),
        ("causvid", (1000, 757, 522), 21),
        ("longlive", (1000, 937.5, 833.333, 625), 12),
        ("rolling-forcing", (1000, 952.381, 882.353, 769.231, 555.556), 24),
        ("krea", (1000, 937.5, 833.333, 625, 0), 6),
    ],
)
def test_published_numbers(build_pipeline, name, timesteps, frames_seen):
    """Timesteps that the model is told, and latent frames that are kept, the chunk included."""
    pipe = build_pipeline()
    pipe.apply_preset(name)
    request = pipe.request(RED)
    assert request.schedule.timesteps == pytest.approx(timesteps, abs=1e-3)
    assert request.settings == PRESETS[name].settings
    assert request.settings.layout(None).capacity_frames == frames_seen


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_preset_runs_and_is_saved_with_the_model(build_pipeline, tmp_path, name):
    pipe = build_pipeline()
    pipe.apply_preset(name)
    state = pipe.start(pipe.request(RED, num_frames=1 + 4 * 29))
    state.submit(PromptControl(prompt=BLUE), not_before=60)
    frames = torch.cat([chunk.frames for chunk in pipe.run(state)], dim=2)
    assert frames.shape[2] == 117
    assert frames.isfinite().all()
    pipe.save_pretrained(tmp_path)
    loaded = CausalVideoPipeline.from_pretrained(tmp_path)
    assert loaded.settings == PRESETS[name].settings
    assert loaded.config.engine == PRESETS[name].engine
    assert loaded.scheduler.schedule() == pipe.scheduler.schedule()


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_preset_starts_from_an_image(build_pipeline, name):
    pipe = build_pipeline()
    pipe.apply_preset(name)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    frames = [chunk.frames for chunk in pipe.stream(RED, num_frames=1 + 4 * 15, image=picture)]
    assert [part.shape[2] for part in frames] == [1, *[12] * 5]
    plain = next(pipe.stream(RED, num_frames=1 + 4 * 15)).frames
    assert not torch.allclose(frames[0], plain[:, :, :1])


def test_presets_replace_each_other(build_pipeline):
    pipe, fresh = build_pipeline(guidance_scale=3.0), build_pipeline()
    for name in ("krea", "rolling-forcing", "causvid"):
        pipe.apply_preset(name)
    fresh.apply_preset("causvid")
    assert pipe.settings == fresh.settings
    assert type(pipe.engine) is type(fresh.engine)
    assert pipe.scheduler.schedule() == fresh.scheduler.schedule()
    assert pipe.settings.context is ContextPolicy.CLEAN


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("motionstream", {}, "'motionstream' is for image-to-video models: in_channels must be above the 4"),
        ("longlive", {"chunk_frames": 2}, r"generates 3 latent frames at a time, .* trained for 2"),
        (
            "krea",
            {"scheduler": FlowEulerScheduler()},
            "few-step student, this model has a FlowEulerScheduler",
        ),
        ("cog", {}, "preset must be one of self-forcing, .*, got 'cog'"),
    ],
)
def test_what_a_model_cannot_run(build_pipeline, name, model, message):
    pipe = build_pipeline(**model)
    before = pipe.settings, pipe.scheduler
    with pytest.raises(ValueError, match=message):
        pipe.apply_preset(name)
    assert (pipe.settings, pipe.scheduler) == before
