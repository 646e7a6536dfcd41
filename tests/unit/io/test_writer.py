"""Every format round trips, and no half file ever has the final name."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from genstream.io.errors import OutputError
from genstream.io.metadata import VideoMetadata
from genstream.io.reader import read_video
from genstream.io.writer import open_writer

METADATA = VideoMetadata(prompt='a red circle: "moving" right; ü', seed=7, model="toyworld")
WIDTH, HEIGHT = 64, 48
ROOT = Path(__file__).resolve().parents[3]


def clip(count: int, first: int = 0) -> np.ndarray:
    """A red square on green that moves one pixel per frame."""
    frames = np.zeros((count, HEIGHT, WIDTH, 3), np.uint8)
    frames[..., 1] = 120
    for i in range(count):
        frames[i, 16:32, (first + i) % 40 : (first + i) % 40 + 16] = (220, 30, 30)
    return frames


def writer_to(path: os.PathLike[str] | str, *, overwrite: bool = True):
    return open_writer(path, fps=16, width=WIDTH, height=HEIGHT, metadata=METADATA, overwrite=overwrite)


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif", "out.MP4", "frames", "with: colon.mp4"])
def test_round_trip(tmp_path: Path, name: str):
    with writer_to(tmp_path / name) as writer:
        for first in (0, 1, 13, 25):
            writer.write(clip(12 if first else 1, first))
            assert not (tmp_path / name).exists()
    frames = np.stack(list(read_video(tmp_path / name)))
    expected = np.concatenate([clip(1), clip(12, 1), clip(12, 13), clip(12, 25)])
    assert frames.shape == expected.shape
    assert np.abs(frames.astype(int) - expected).mean() < 6
    assert os.listdir(tmp_path) == [name]


def test_single_png(tmp_path: Path):
    with writer_to(tmp_path / "out.png") as writer:
        writer.write(clip(1))
    image = Image.open(tmp_path / "out.png")
    np.testing.assert_array_equal(np.array(image), clip(1)[0])
    assert image.text["Prompt"] == METADATA.prompt
    assert image.text["Comment"].startswith("AI-generated")


def test_single_png_takes_one_frame(tmp_path: Path):
    with pytest.raises(ValueError, match="takes 1 frame, got 5"), writer_to(tmp_path / "out.png") as writer:
        writer.write(clip(5))
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("name", ["out.mp4", "out.webm"])
def test_video_metadata(tmp_path: Path, name: str):
    with writer_to(tmp_path / name) as writer:
        writer.write(clip(4))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(tmp_path / name), "-f", "ffmetadata", "-"]
    found = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.replace("\\", "").lower()
    )
    assert f"prompt={METADATA.prompt}" in found
    assert "seed=7" in found
    assert "model=toyworld" in found
    assert "comment=ai-generated" in found


def test_gif_comment(tmp_path: Path):
    with writer_to(tmp_path / "out.gif") as writer:
        writer.write(clip(4))
    assert METADATA.line().encode() in (tmp_path / "out.gif").read_bytes()
    assert Image.open(tmp_path / "out.gif").n_frames == 4


@pytest.mark.parametrize("name", ["out.mp4", "frames"])
def test_overwrite_replaces(tmp_path: Path, name: str):
    for count in (9, 5):
        with writer_to(tmp_path / name) as writer:
            writer.write(clip(count))
    assert len(list(read_video(tmp_path / name))) == 5


@pytest.mark.parametrize("name", ["out.mp4", "frames", "out.png"])
def test_no_overwrite_keeps(tmp_path: Path, name: str):
    with writer_to(tmp_path / name, overwrite=False) as writer:
        writer.write(clip(1))
    with pytest.raises(OutputError, match="exists and overwriting is off"):
        writer_to(tmp_path / name, overwrite=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.avi", "must end in .mp4"),
        ("missing/out.mp4", "does not exist"),
        ("folder.mp4", "is a folder"),
        ("documents", "holds other things"),
        ("file/out.mp4", "is no folder"),
        (f"{'x' * 300}.mp4", "File name too long"),
    ],
)
def test_bad_path(tmp_path: Path, name: str, message: str):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "letter.txt").write_text("keep me")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=message):
        writer_to(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("width", "height"), [(63, 48), (64, 47)])
def test_odd_size_is_an_error(tmp_path: Path, width: int, height: int):
    with pytest.raises(ValueError, match=f"width and height must be even for .mp4, got {width}x{height}"):
        open_writer(
            tmp_path / "out.mp4", fps=16, width=width, height=height, metadata=METADATA, overwrite=True
        )


def test_wrong_frames(tmp_path: Path):
    with pytest.raises(ValueError, match="frames must be uint8"), writer_to(tmp_path / "out.mp4") as writer:
        writer.write(np.zeros((2, HEIGHT, WIDTH + 2, 3), np.uint8))
    assert os.listdir(tmp_path) == []


def test_error_leaves_a_playable_partial(tmp_path: Path):
    with pytest.raises(RuntimeError), writer_to(tmp_path / "out.mp4") as writer:
        writer.write(clip(20))
        raise RuntimeError
    assert os.listdir(tmp_path) == ["out.partial.mp4"]
    assert len(list(read_video(tmp_path / "out.partial.mp4"))) == 20


def test_interrupt_finishes(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), writer_to(tmp_path / "out.mp4") as writer:
        writer.write(clip(20))
        raise KeyboardInterrupt
    assert len(list(read_video(tmp_path / "out.mp4"))) == 20


def test_no_frame_no_file(tmp_path: Path):
    with pytest.raises(OutputError, match="no frame"), writer_to(tmp_path / "out.mp4"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif"])
def test_full_disk(tmp_path: Path, suffix: str):
    (tmp_path / f"out.partial.{suffix}").symlink_to("/dev/full")
    with (
        pytest.raises(OutputError, match=rf"out\.{suffix}': No space left") as caught,
        writer_to(tmp_path / f"out.{suffix}") as writer,
    ):
        for first in range(0, 600, 12):
            writer.write(clip(12, first))
    assert not (tmp_path / f"out.{suffix}").exists()
    assert f"out.partial.{suffix}" in caught.value.__notes__[0]


def test_full_disk_for_png(tmp_path: Path):
    """A file size limit stands in for a full disk: writing fails half way through a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 255, (1, HEIGHT, WIDTH, 3), np.uint8)
    try:
        with (
            pytest.raises(OutputError, match=r"cannot write output path .*frames': File too large"),
            writer_to(tmp_path / "frames") as writer,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
            writer.write(clip(1))
            writer.write(noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["frames.partial"]
    assert len(list(read_video(tmp_path / "frames.partial"))) == 1


def test_a_folder_that_was_killed_in_the_middle_of_a_frame_can_be_written_again(tmp_path: Path):
    (tmp_path / "frames.partial").mkdir()
    (tmp_path / "frames.partial" / ".unfinished.png").write_bytes(b"half a fra")
    with writer_to(tmp_path / "frames") as writer:
        writer.write(clip(2))
    assert sorted(os.listdir(tmp_path / "frames")) == ["frame_000000.png", "frame_000001.png"]


SCRIPT = """
import sys, time
import numpy as np
from genstream.io.metadata import VideoMetadata
from genstream.io.writer import open_writer

metadata = VideoMetadata(prompt="p", seed=0, model="m")
with open_writer(sys.argv[1], fps=16, width=64, height=48, metadata=metadata, overwrite=True) as writer:
    for chunk in range(1000):
        writer.write(np.full((12, 48, 64, 3), chunk, np.uint8))
        print(chunk, flush=True)
        time.sleep(0.01)
"""


def run_until_written(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 20:
            break
    return process


def frames_when_complete(path: Path) -> int:
    """Number of frames once the encoder, which outlives its parent for a moment, has closed the file."""
    deadline = time.monotonic() + 20
    count = -1
    while time.monotonic() < deadline:
        before, count = count, sum(1 for _ in read_video(path))
        if count == before > 0:
            return count
    return count


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "frames"])
def test_kill_leaves_a_playable_partial(tmp_path: Path, name: str):
    process = run_until_written(tmp_path / name)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    partial = tmp_path / name.replace("out", "out.partial").replace("frames", "frames.partial")
    assert frames_when_complete(partial) >= 19 * 12
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif"])
def test_ctrl_c_finishes_the_file(tmp_path: Path, name: str):
    process = run_until_written(tmp_path / name)
    os.killpg(process.pid, signal.SIGINT)
    process.wait()
    assert os.listdir(tmp_path) == [name]
    assert sum(1 for _ in read_video(tmp_path / name)) >= 21 * 12


def test_a_png_that_could_not_be_written_leaves_nothing(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(OutputError, match="cannot write output path") as caught,
            writer_to(tmp_path / "out.png") as writer,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
            writer.write(clip(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "frames"])
def test_two_writers_of_one_name(tmp_path: Path, name: str):
    with writer_to(tmp_path / name) as writer:
        writer.write(clip(12))
        with pytest.raises(OutputError, match=rf"{name}' is being written by another run"):
            writer_to(tmp_path / name)
        writer.write(clip(12))
    assert len(list(read_video(tmp_path / name))) == 24
    with writer_to(tmp_path / name) as again:
        again.write(clip(5))
    assert len(list(read_video(tmp_path / name))) == 5


def test_no_overwriting_of_unfinished_outputs(tmp_path: Path):
    (tmp_path / "out.partial.mp4").write_text("mine")
    with pytest.raises(OutputError, match=r"would replace .*out\.partial\.mp4' and overwriting is off"):
        open_writer(
            tmp_path / "out.mp4", fps=16, width=WIDTH, height=HEIGHT, metadata=METADATA, overwrite=False
        )
    assert (tmp_path / "out.partial.mp4").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "fps"), [("out.gif", 101), ("out.gif", 1e-3), ("out.mp4", 1e9), ("out.webm", 1001)]
)
def test_frame_rates_that_a_format_cannot_hold(tmp_path: Path, name: str, fps: float):
    with pytest.raises(ValueError, match=r"fps must be at (most 100|least 0\.0015 for \.gif)"):
        open_writer(tmp_path / name, fps=fps, width=WIDTH, height=HEIGHT, metadata=METADATA, overwrite=True)
    assert os.listdir(tmp_path) == []


def test_folders_that_cannot_become_folders(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name, message in (
        ("file", "is a file; without suffix it must be a folder of png"),
        ("link", "is a link to a folder"),
        ("-", "must name a file"),
        (".mp4", "must name a file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            writer_to(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link"]
