import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_videos import write_video

from genstream.training.vae_clips import ClipSettings, clip_source
from genstream.vae.protocol import VAESpec

SPEC = VAESpec(temporal_ratio=4, spatial_ratio=8, latent_channels=4, memory_latents=1)
SETTINGS = ClipSettings(
    size_px=32, crop_px=(16, 32), clip_latents=(1, 3), batch_pixels=16**2 * 10, evaluation_clips=2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for index, name in enumerate(("a.mp4", "b.webm", "inner/c.gif", "d")):
        write_video(root / name, 40 * index)
    return root


def greys(clips) -> set[int]:
    """Which videos clips are from."""
    return {round(float((clip[0].mean() + 1) * 127.5) // 40) for batch in clips for clip in batch}


@pytest.fixture(params=["toyworld", "videos"])
def source(request, folder):
    return clip_source(replace(SETTINGS, videos=None if request.param == "toyworld" else str(folder)), SPEC)


def test_clips_follow_from_the_step(source):
    for step in range(4):
        clips = source.training(step)
        side, frames = (16, 32)[step % 2], (1, 9)[step // 2]
        count = {(16, 1): 10, (32, 1): 2, (16, 9): 1, (32, 9): 1}[side, frames]
        assert clips.shape == (count, 3, frames, side, side)
        assert clips.abs().max() <= 1
        assert torch.equal(source.training(step), clips)
    assert not torch.equal(source.training(0), source.training(4))


def test_evaluation_has_whole_frames_of_the_greatest_length(source):
    assert len(source.evaluation) == 2
    assert [clip.shape for clip in source.evaluation] == [(1, 3, 9, 32, 32)] * 2
    assert torch.equal(source.evaluation[1], source.evaluation[0:2][1])


def test_no_video_is_in_training_and_evaluation(folder):
    source = clip_source(replace(SETTINGS, videos=str(folder)), SPEC)
    training, evaluation = greys(source.training(4 * step) for step in range(6)), greys(source.evaluation)
    assert len(training) == len(evaluation) == 2
    assert training | evaluation == {0, 1, 2, 3}


def test_another_seed_cuts_other_clips(folder):
    for videos in (None, str(folder)):
        settings = replace(SETTINGS, videos=videos)
        first, second = (clip_source(replace(settings, seed=seed), SPEC).training(0) for seed in (0, 1))
        assert not torch.equal(first, second)


def test_a_first_latent_frame_may_be_several_frames():
    source = clip_source(SETTINGS, replace(SPEC, first_frames=4))
    assert [source.training(step).shape[2] for step in (0, 2)] == [4, 12]


def test_videos_that_are_no_use_are_skipped_and_listed(tmp_path, caplog):
    for index in range(3):
        write_video(tmp_path / f"{index}.mp4", 0)
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "short").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "short" / "frame_000000.png")
    settings = replace(SETTINGS, videos=str(tmp_path))
    assert len(clip_source(settings, SPEC).training(0)) == 10
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert re.search(
        r"2 of 5 videos skipped:\n.*short' has 1 frames, .* 9\n.*text\.mp4' cannot be read", told
    )
    with pytest.raises(ValueError, match="more than evaluation_clips = 3 videos of at least 9 frames, got 3"):
        clip_source(replace(settings, evaluation_clips=3), SPEC)


def test_a_video_that_breaks_off_is_skipped(folder, tmp_path, caplog):
    for index in range(4):
        write_video(tmp_path / f"{index}", 40 * index)
    source = clip_source(replace(SETTINGS, videos=str(tmp_path)), SPEC)
    before = greys(source.training(4 * step) for step in range(6))
    assert len(before) == 2
    broken = min(before)
    for frame in (tmp_path / str(broken)).glob("*.png"):
        frame.write_bytes(b"no picture")
    source = clip_source(replace(SETTINGS, videos=str(tmp_path)), SPEC)
    clips = [source.training(4 * step) for step in range(6)]
    assert greys(clips) == before - {broken}
    assert [len(batch) for batch in clips] == [10] * 6
    assert sum("skipped" in record.getMessage() for record in caplog.records) == 1
    for frame in tmp_path.glob("*/*.png"):
        frame.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="videos must hold one that can be decoded"):
        source.training(40)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"size_px": 36}, "size_px must be a positive multiple of 8, got 36"),
        ({"crop_px": (16, 20)}, "crop_px must be a positive multiple of 8, got 20"),
        ({"crop_px": (40,)}, r"crop_px must be at most size_px = 32, got \[40\]"),
        ({"crop_px": ()}, r"crop_px must be numbers of at least 1, got \[\]"),
        ({"clip_latents": (2, 0)}, r"clip_latents must be numbers of at least 1, got \[2, 0\]"),
        ({"batch_pixels": 0}, "batch_pixels must be at least 1, got 0"),
        ({"evaluation_clips": 0}, "evaluation_clips must be at least 1, got 0"),
        ({"videos": "nowhere"}, "videos must be a folder, got 'nowhere'"),
    ],
)
def test_bad_settings(wrong, error):
    with pytest.raises(ValueError, match=error):
        clip_source(replace(SETTINGS, **wrong), SPEC)


def test_some_videos_must_be_left_for_training(folder):
    with pytest.raises(ValueError, match="more than evaluation_clips = 4 videos of at least 9 frames, got 4"):
        clip_source(replace(SETTINGS, videos=str(folder), evaluation_clips=4), SPEC)
