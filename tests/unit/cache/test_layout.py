"""The slots of a stream, against a simulation that remembers every frame."""

from dataclasses import replace
from itertools import product

import pytest

from genstream.cache.layout import CacheLayout, PositionPolicy

LAYOUTS = [
    CacheLayout(chunk_frames=chunk, sink_frames=sink, window_frames=window)
    for chunk, sink, window in product((1, 2, 3, 5), (0, 1, 2, 3, 4, 7), (0, 1, 3, 4, 9))
]


def name_of(layout: CacheLayout) -> str:
    return f"{layout.chunk_frames}-{layout.sink_frames}-{layout.window_frames}"


def spans(layout, first_single):
    start = 0
    for index in range(12 + layout.capacity_frames // layout.chunk_frames):
        length = 1 if first_single and index == 0 else layout.chunk_frames
        yield start, length
        start += length


@pytest.mark.parametrize("first_single", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_a_pass_sees_sinks_window_and_itself(layout, first_single):
    buffer: list[int | None] = [None] * layout.capacity_frames
    for start, length in spans(layout, first_single):
        layout.check_pass(start, length)
        for run in layout.segments(start, length):
            for step in range(run.length):
                buffer[run.slot + step] = start + run.offset + step
        end = start + length
        visible = buffer[: layout.visible_frames(end)]
        sinks = range(min(layout.sink_frames, end))
        recent = range(max(0, start - layout.window_frames), end)
        assert sorted(visible) == sorted({*sinks, *recent})


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_sinks_out_of_reach_are_hidden(layout):
    for reach, (start, length) in product((None, 0, 3, 8, 10**9), spans(layout, first_single=False)):
        limited = replace(layout, sink_reach_frames=reach)
        end = start + length
        hidden = limited.hidden_frames(start, end)
        in_reach = reach is None or end <= reach or start < layout.sink_frames
        assert hidden == (0 if in_reach else layout.sink_frames)
        assert limited.visible_frames(end) - hidden >= length


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_kept_frames_and_the_pass_fill_the_ring(layout):
    for start in range(3 * layout.capacity_frames):
        for length in range(1, layout.ring_frames + 1):
            kept, end = layout.kept(start, start + length), start + length
            behind_sinks = max(0, end - layout.sink_frames)
            assert kept.stop == start
            assert len(kept) + min(length, behind_sinks) == min(layout.ring_frames, behind_sinks)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_segments_cover_a_pass_once(layout):
    for start in range(3 * layout.capacity_frames):
        for length in range(1, layout.ring_frames + 1):
            runs = layout.segments(start, length)
            assert len(runs) <= 3
            slots = [run.slot + step for run in runs for step in range(run.length)]
            offsets = [run.offset + step for run in runs for step in range(run.length)]
            assert offsets == list(range(length))
            assert slots == [layout.slot(start + offset) for offset in offsets]
            if start >= layout.sink_frames:
                assert len(set(slots)) == length
            assert all(0 <= slot < layout.capacity_frames for slot in slots)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_sinks_stand_in_front_of_the_window(layout):
    for end in range(1, 4 * layout.capacity_frames):
        assert layout.sink_positions(end) == range(layout.sink_frames)
        sliding = CacheLayout(
            chunk_frames=layout.chunk_frames,
            sink_frames=layout.sink_frames,
            window_frames=layout.window_frames,
            positions=PositionPolicy.WINDOW,
        )
        positions = sliding.sink_positions(end)
        assert len(positions) == layout.sink_frames
        if end <= layout.capacity_frames:
            assert positions.start == 0
        else:
            assert positions.stop == end - layout.ring_frames


def test_a_pass_that_would_leave_a_stale_slot_is_refused():
    layout = CacheLayout(chunk_frames=3, sink_frames=2, window_frames=4)
    layout.check_pass(0, 9)
    layout.check_pass(100, 7)
    for start, length in ((0, 10), (8, 2), (100, 2), (100, 8), (5, 8)):
        with pytest.raises(ValueError, match=f"pass over {length} frames from frame {start}"):
            layout.check_pass(start, length)


@pytest.mark.parametrize(
    "wrong", [{"chunk_frames": 0}, {"sink_frames": -1}, {"window_frames": -2}], ids=lambda wrong: str(wrong)
)
def test_bad_layout(wrong):
    ((argument, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{argument} must be at least .*, got {value}"):
        CacheLayout(**{"chunk_frames": 3, "sink_frames": 0, "window_frames": 3, **wrong})
