"""Unreadable and ill-sized input ends in one clear line."""

from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from genstream.io import reader
from genstream.io.metadata import VideoMetadata
from genstream.io.reader import find_videos, inspect_video, read_clip, read_cropped, read_image, read_video
from genstream.io.writer import open_writer


def save(path: Path, mode: str = "RGB", colour: object = (200, 10, 30)) -> Path:
    Image.new(mode, (32, 16), colour).save(path)
    return path


@pytest.mark.parametrize(
    ("mode", "colour"), [("RGB", (200, 10, 30)), ("RGBA", (200, 10, 30, 255)), ("L", 77)]
)
def test_read_image(tmp_path: Path, mode: str, colour: object):
    frame = read_image(save(tmp_path / "a.png", mode, colour), height=16, width=32)
    assert frame.shape == (16, 32, 3)
    assert frame.dtype == np.uint8
    assert frame[0, 0].tolist() == [77] * 3 if mode == "L" else [200, 10, 30]


def test_other_size(tmp_path: Path):
    with pytest.raises(ValueError, match="is 32x16, the video is 128x128; resize"):
        read_image(save(tmp_path / "a.png"), height=128, width=128)


def test_transparent(tmp_path: Path):
    with pytest.raises(ValueError, match="transparent"):
        read_image(save(tmp_path / "a.png", "RGBA", (1, 2, 3, 100)), height=16, width=32)


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "cut"])
def test_unreadable_image(tmp_path: Path, kind: str):
    path = tmp_path / "a.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "cut":
        noise = np.random.default_rng(0).integers(0, 255, (16, 32, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(path, height=16, width=32)


@pytest.mark.parametrize("kind", ["missing.mp4", "text.mp4", "empty"])
def test_unreadable_video(tmp_path: Path, kind: str):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=kind):
        list(read_video(tmp_path / kind))


COUNT = 37


def write_video(path: Path) -> list[np.ndarray]:
    """A video whose frames differ, and its frames as they are read back."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (COUNT, 2, 3, 3), np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    metadata = VideoMetadata(prompt="", seed=0, model="")
    with open_writer(path, fps=16, width=48, height=32, metadata=metadata, overwrite=False) as writer:
        writer.write(frames)
    return list(read_video(path))


def test_ffmpeg_is_asked_again_where_it_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = write_video(tmp_path / "a.mp4")
    read_frames, asked = imageio_ffmpeg.read_frames, []

    def slow(*arguments, **options):
        asked.append(arguments)
        if len(asked) % 3 or not answers:
            raise OSError("Could not load meta information")
        yield from read_frames(*arguments, **options)

    monkeypatch.setattr(imageio_ffmpeg, "read_frames", slow)
    monkeypatch.setattr(reader, "_PATIENCE_S", 0.0)
    answers = True
    assert len(list(read_video(tmp_path / "a.mp4"))) == len(whole) and len(asked) == 3
    answers = False
    with pytest.raises(TimeoutError, match=r"a\.mp4' cannot be read: ffmpeg did not answer, 3 times"):
        list(read_video(tmp_path / "a.mp4"))


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "folder"])
def test_a_clip_is_the_same_as_in_the_whole_video(tmp_path: Path, name: str):
    whole = write_video(tmp_path / name)
    video = inspect_video(tmp_path / name)
    assert video.frames == len(whole) == COUNT
    for start, count in ((0, COUNT), (0, 1), (5, 9), (21, 4), (COUNT - 1, 1)):
        clip = read_clip(video, start, count, 32)
        assert np.array_equal(clip, np.stack(whole[start : start + count]))


def test_frames_that_are_not_where_the_rate_says_are_found(tmp_path: Path):
    whole = write_video(tmp_path / "a.mp4")
    video = replace(inspect_video(tmp_path / "a.mp4"), fps=4.0)
    assert np.array_equal(read_clip(video, 30, 5, 32), np.stack(whole[30:35]))
    assert np.array_equal(read_clip(replace(video, fps=0.0), 30, 5, 32), np.stack(whole[30:35]))


def test_frames_are_resized_to_their_shorter_side(tmp_path: Path):
    write_video(tmp_path / "a.mp4")
    assert read_clip(inspect_video(tmp_path / "a.mp4"), 3, 2, 20).shape == (2, 20, 30, 3)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (20, 30), (16, 47), (31, 8), (64, 64)])
def test_frames_are_cropped_to_their_middle(tmp_path: Path, height: int, width: int):
    """Of a gradient the middle is as bright as the whole, and one of its sides reaches both edges."""
    rows, columns = np.mgrid[0:32, 0:48].astype(np.uint8) * np.array([[[3]], [[2]]], np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(np.stack([rows, columns, rows], -1)).save(tmp_path / "a" / "frame_0.png")
    (frame,) = read_cropped(inspect_video(tmp_path / "a"), 0, 1, height, width).astype(float)
    assert frame.shape == (height, width, 3)
    assert frame[..., 0].mean() == pytest.approx(rows.mean(), abs=2)
    assert frame[..., 1].mean() == pytest.approx(columns.mean(), abs=2)
    spans = np.ptp(frame[:, 0, 0]) / np.ptp(rows), np.ptp(frame[0, :, 1]) / np.ptp(columns)
    assert max(spans) > 0.9


def test_a_video_that_is_shorter_than_it_says_is_named(tmp_path: Path):
    write_video(tmp_path / "a.mp4")
    video = replace(inspect_video(tmp_path / "a.mp4"), frames=99)
    with pytest.raises(ValueError, match=r"a\.mp4' must have 50 frames, got 37"):
        read_clip(video, 30, 20, 32)


def write_greys(folder: Path, names: list[str], side: int = 8) -> None:
    folder.mkdir(exist_ok=True)
    for grey, name in enumerate(names):
        Image.new("RGB", (side, side), (grey,) * 3).save(folder / name)


def test_frames_are_read_in_the_order_of_their_numbers(tmp_path: Path):
    write_greys(tmp_path, [f"frame_{number}.png" for number in range(1, 13)])
    assert [frame[0, 0, 0] for frame in read_video(tmp_path)] == list(range(12))
    clip = read_clip(inspect_video(tmp_path), 8, 3, 8)
    assert clip[:, 0, 0, 0].tolist() == [8, 9, 10]


def test_frames_without_a_number_or_of_another_size_are_named(tmp_path: Path):
    write_greys(tmp_path / "a", ["frame_0.png", "frame_last.png"])
    with pytest.raises(ValueError, match=r"frame '.*frame_last\.png' must have a number"):
        inspect_video(tmp_path / "a")
    write_greys(tmp_path / "b", ["frame_0.png", "frame_1.png"])
    write_greys(tmp_path / "b", ["frame_1.png"], side=9)
    with pytest.raises(ValueError, match=r"frame '.*frame_1\.png' must be 8x8 like those before it, got 9x9"):
        list(read_video(tmp_path / "b"))


def test_videos_are_found_in_folders_of_folders(tmp_path: Path, caplog):
    for name in ("b.mp4", "inner/frames/frame_000000.png", "inner/A.GIF", "inner/C.MOV", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [str(path.relative_to(tmp_path)) for path in find_videos(tmp_path)]
    assert found == ["b.mp4", "inner/A.GIF", "inner/C.MOV", "inner/frames"]
    assert "1 files passed over that are not .mp4" in caplog.text
    caplog.clear()
    assert find_videos(tmp_path, companions=[".txt"]) and not caplog.text


def test_a_folder_without_videos_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"videos must hold \.mp4, .*, \.avi or folders of frame_"):
        find_videos(tmp_path)
    with pytest.raises(ValueError, match="videos must be a folder, got"):
        find_videos(tmp_path / "missing")


def test_a_video_that_cannot_be_counted_is_named(tmp_path: Path):
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"text\.mp4' cannot be read"):
        inspect_video(tmp_path / "text.mp4")


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_images_are_refused(tmp_path: Path, mode: str):
    Image.new(mode, (8, 8), 40000).save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match=r"deep\.tiff' must have 8 bits per channel, got mode"):
        read_image(tmp_path / "deep.tiff", 8, 8)
