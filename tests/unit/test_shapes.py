import subprocess
import sys

import pytest

from genstream.shapes import (
    check_divides,
    frames_for_seconds,
    frames_of,
    latent_frames_covering,
    latent_frames_of,
    tokens_per_frame,
)


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
@pytest.mark.parametrize("latent_frames", [1, 2, 3, 21, 1_000_000])
def test_latent_frames_survive_the_round_trip(latent_frames, ratio):
    assert latent_frames_of(frames_of(latent_frames, ratio), ratio) == latent_frames


@pytest.mark.parametrize(("latent_frames", "frames"), [(1, 1), (2, 5), (21, 81)])
def test_wan_counts(latent_frames, frames):
    assert frames_of(latent_frames, 4) == frames
    assert latent_frames_of(frames, 4) == latent_frames


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (80, "num_frames must be 1 + 4k, got 80; the nearest are 77 and 81"),
        (2, "num_frames must be 1 + 4k, got 2; the nearest are 1 and 5"),
        (0, "num_frames must be 1 + 4k, got 0; the nearest is 1"),
        (-3, "num_frames must be 1 + 4k, got -3; the nearest is 1"),
    ],
)
def test_other_frame_counts_are_refused_with_their_neighbours(frames, message):
    with pytest.raises(ValueError) as raised:
        latent_frames_of(frames, 4)
    assert str(raised.value) == message


def test_no_latent_frames_is_an_error():
    with pytest.raises(ValueError, match="latent_frames must be at least 1, got 0"):
        frames_of(0, 4)


@pytest.mark.parametrize("ratio", [1, 3, 4])
def test_covering_is_the_smallest_that_is_enough(ratio):
    for frames in range(1, 40):
        latent_frames = latent_frames_covering(frames, ratio)
        assert frames_of(latent_frames, ratio) >= frames
        assert latent_frames == 1 or frames_of(latent_frames - 1, ratio) < frames


def test_covering_no_frames_is_an_error():
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        latent_frames_covering(0, 4)


@pytest.mark.parametrize(
    ("seconds", "fps", "frames"), [(4, 16, 64), (0.1, 16, 2), (1 / 16, 16, 1), (10, 29.97, 300)]
)
def test_seconds_give_the_rounded_frame_count(seconds, fps, frames):
    assert frames_for_seconds(seconds, fps) == frames


@pytest.mark.parametrize(
    ("seconds", "fps", "named"),
    [
        (0, 16, "seconds"),
        (-1, 16, "seconds"),
        (0.01, 16, "seconds"),
        (float("nan"), 16, "seconds"),
        (1, 0, "fps"),
        (float("inf"), 16, "seconds"),
    ],
)
def test_a_duration_without_a_frame_is_an_error(seconds, fps, named):
    with pytest.raises(ValueError, match=f"^{named} must be"):
        frames_for_seconds(seconds, fps)


def test_check_divides_names_argument_value_and_neighbours():
    check_divides("height", 128, 16)
    with pytest.raises(ValueError) as raised:
        check_divides("height", 100, 16)
    assert (
        str(raised.value) == "height must be a positive multiple of 16, got 100; the nearest are 96 and 112"
    )
    with pytest.raises(ValueError, match="got 0; the nearest is 16"):
        check_divides("height", 0, 16)


def test_tokens_per_frame():
    assert tokens_per_frame(480, 832, 8, 2) == 1560
    with pytest.raises(ValueError, match="width must be a positive multiple of 16, got 120"):
        tokens_per_frame(128, 120, 8, 2)


def test_the_converter_needs_no_torch():
    code = "import sys, genstream.shapes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
