"""What tells that a folder holds something else."""

import shutil

import pytest

from genstream.io import digest
from genstream.io.digest import folder_digest, videos_digest


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "vae/weights", "training/run.json", ".cache/when", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(range(64)))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("config.json", True),
        ("vae/weights", True),
        ("vae/training", True),
        ("training/run.json", False),
        (".cache/when", False),
        ("vae/.hidden", False),
        ("README.md", False),
    ],
)
def test_every_file_counts_that_a_model_is_loaded_from(folder, name, counts):
    before = folder_digest(folder, without="training")
    assert folder_digest(folder, without="training") == before
    (folder / name).write_bytes(b"other")
    assert (folder_digest(folder, without="training") != before) is counts


def test_names_count_and_places_do_not(folder, tmp_path_factory):
    before = folder_digest(folder, without="training")
    moved = folder.rename(tmp_path_factory.mktemp("moved") / "there")
    (moved / "link").symlink_to("vae", target_is_directory=True)
    assert folder_digest(moved, without="training") != before
    (moved / "link").unlink()
    assert folder_digest(moved, without="training") == before
    (moved / "vae").rename(moved / "other")
    assert folder_digest(moved, without="training") != before


def test_of_large_files_blocks_from_start_to_end_count(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "_MODEL_BLOCKS", 3)
    monkeypatch.setattr(digest, "_BLOCK_BYTES", 4)
    path, content = tmp_path / "weights", bytes(range(64))
    path.write_bytes(content)
    before = folder_digest(tmp_path, without="training")
    seen = set()
    for place in (0, 3, 4, 29, 30, 33, 34, 59, 60, 63):
        path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        if folder_digest(tmp_path, without="training") != before:
            seen.add(place)
    assert seen == {0, 3, 30, 33, 60, 63}
    path.write_bytes(content[:-4] + b"\0" + content[-4:])
    assert folder_digest(tmp_path, without="training") != before


def test_of_videos_names_sizes_and_contents_count_and_times_do_not(tmp_path):
    large = bytes(2**19)
    for name, content in (("a.mp4", large), ("in/b.mp4", b"b"), ("in/b.txt", b"a red circle")):
        (tmp_path / "clips" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clips" / name).write_bytes(content)

    def digest_of(folder):
        return videos_digest(folder, [path for path in folder.rglob("*") if path.is_file()])

    before = digest_of(tmp_path / "clips")
    shutil.copytree(tmp_path / "clips", tmp_path / "copy", copy_function=shutil.copyfile)
    assert digest_of(tmp_path / "copy") == before
    for name, content in (("a.mp4", large[:-1] + b"1"), ("in/b.txt", b"a blue circle"), ("c.mp4", b"")):
        shutil.rmtree(tmp_path / "copy")
        shutil.copytree(tmp_path / "clips", tmp_path / "copy")
        (tmp_path / "copy" / name).write_bytes(content)
        assert digest_of(tmp_path / "copy") != before


def test_a_video_that_cannot_be_read_is_told_by_its_name(tmp_path):
    good, locked = tmp_path / "good.mp4", tmp_path / "locked.mp4"
    good.write_bytes(b"a")
    locked.mkdir()  # reading it fails, as that of a file on a broken disk
    digest = videos_digest(tmp_path, [good, locked])
    assert videos_digest(tmp_path, [good, locked]) == digest
    assert videos_digest(tmp_path, [good]) != digest
    locked.rename(tmp_path / "other.mp4")
    assert videos_digest(tmp_path, [good, tmp_path / "other.mp4"]) != digest
