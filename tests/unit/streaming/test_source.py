"""Sources of frames: nothing is lost but what is counted as dropped, and the order stays."""

import threading

import numpy as np
import pytest
import torch

from genstream.streaming.source import FrameSource, IteratedFrames, LiveFrames, as_source


def frame(number):
    """A frame that carries a number below 65536."""
    levels = np.zeros((8, 8, 3), np.uint8)
    levels[..., 0], levels[..., 1] = divmod(number, 256)
    return levels


def number_of(pixels):
    high, low = ((pixels[:2, 0, 0] + 1) * 127.5).round().int().tolist()
    return 256 * high + low


@pytest.mark.parametrize("capacity", [1, 5, 100])
@pytest.mark.parametrize("count", [0, 1, 5, 6, 30])
def test_the_latest_frames_stay(capacity, count):
    source = LiveFrames(height=8, width=8, capacity=capacity)
    for index in range(count):
        source.put(frame(index))
    assert not source.ended
    kept = list(range(count))[-capacity:]
    assert source.dropped == count - len(kept)
    first = [number_of(pixels) for pixels in source.take(2)]
    rest = [number_of(pixels) for pixels in source.take(1000)]
    assert first + rest == kept
    assert source.take(3) == []
    source.close()
    assert source.ended


def test_it_ends_behind_the_frames_that_wait():
    source = LiveFrames(height=8, width=8)
    source.put(frame(1))
    source.close()
    assert not source.ended
    assert len(source.take(5)) == 1
    assert source.ended


def test_threads():
    source, taken, count = LiveFrames(height=8, width=8, capacity=4), [], 3000

    def put():
        for index in range(count):
            source.put(frame(index))
        source.close()

    camera = threading.Thread(target=put)
    camera.start()
    while not source.ended:
        part = source.take(3)
        assert len(part) <= 3
        taken += [number_of(pixels) for pixels in part]
    camera.join()
    assert taken == sorted(set(taken))
    assert len(taken) + source.dropped == count


def test_a_bad_frame_is_refused_where_it_is_put():
    source = LiveFrames(height=8, width=8)
    source.put(frame(1))
    with pytest.raises(ValueError, match="frame is 9x8, the video is 8x8"):
        source.put(np.zeros((8, 9, 3), np.uint8))
    assert [number_of(pixels) for pixels in source.take(9)] == [1]
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        LiveFrames(height=8, width=8, capacity=0)


@pytest.mark.parametrize("portions", [[1] * 10, [3, 0, 4, 9], [10], [100]])
def test_all_frames_of_an_iterable(portions):
    source = IteratedFrames((frame(index) for index in range(10)), height=8, width=8)
    taken = [number_of(pixels) for portion in portions for pixels in source.take(portion)]
    assert taken == list(range(10))
    assert source.take(1) == []
    assert source.ended


def test_what_is_a_source_stays_one():
    live = LiveFrames(height=8, width=8)
    assert as_source(live, 8, 8) is live
    assert isinstance(as_source([torch.zeros(3, 8, 8)], 8, 8), FrameSource)
