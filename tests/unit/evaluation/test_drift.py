"""Drift is told window by window, and slopes are those of lines through them."""

from dataclasses import replace
from math import isnan

import numpy as np
import pytest

from genstream.data.scene import ObjectSpec, Scene
from genstream.data.toyworld import ToyWorld
from genstream.evaluation.drift import drift, slope
from genstream.evaluation.judge import judge_clip

ITEM = ObjectSpec(colour="red", shape="circle", size="medium", motion="right", x=0.5, y=0.5, speed=0.3)
SCENE = Scene(objects=(ITEM,), background="navy")


@pytest.fixture(scope="module")
def score():
    return judge_clip(ToyWorld().frames(SCENE, 64), SCENE)


def with_errors(score, *errors):
    """The windows of a stream whose object has these errors of brightness."""
    return [replace(score, objects=(replace(score.objects[0], brightness_error=error),)) for error in errors]


def test_drift_tells_when_a_stream_went_wrong():
    world = ToyWorld()
    frames = world.frames(SCENE, 200)
    other = Scene(objects=(replace(ITEM, colour="green", motion="left"),), background="navy")
    frames[128:] = world.frames(other, 200)[128:]
    windows = drift([[judge_clip(part, SCENE) for part in np.split(frames[:192], 3)]], window_s=4)
    assert [window.start_s for window in windows] == [0, 4, 8]
    assert [window.adherence.colour.value for window in windows] == [1, 1, 0]
    assert [window.adherence.direction.value for window in windows] == [1, 1, 0]
    assert windows[2].colour_error > 50 > 1 > windows[0].colour_error


def test_slope_is_the_mean_of_the_streams_lines(score):
    streams = [
        with_errors(score, *(start + rise * step for step in range(10))) for start, rise in ((5, 1), (0, 3))
    ]
    result = slope(streams, 4, "brightness_error")
    assert result.per_minute == pytest.approx(2 * 15)  # 15 windows of 4 s a minute
    assert result.half_width == pytest.approx(1.959964 * 15, rel=1e-6)
    assert str(result) == "+30.00 a minute (+0.60 to +59.40)"


def test_windows_without_the_object_are_left_out(score):
    nan = float("nan")
    streams = [with_errors(score, 1, nan, 3), with_errors(score, 0, 1, 2), with_errors(score, nan, nan, 4)]
    result = slope(streams, 60, "brightness_error")
    assert result.per_minute == pytest.approx(1)
    assert result.half_width == pytest.approx(0, abs=1e-9)
    assert drift(streams, 60)[1].brightness_error == 1


def test_one_stream_or_one_window_has_no_interval(score):
    for streams in ([with_errors(score, 1, 2)], [with_errors(score, 1), with_errors(score, 2)]):
        result = slope(streams, 4, "brightness_error")
        assert isnan(result.per_minute)
        assert isnan(result.half_width)
