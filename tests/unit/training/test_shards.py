"""What is made once and kept in files: shards, and results of runs on a disk that is full."""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from genstream.io.errors import OutputError
from genstream.training.components import save_component
from genstream.training.model_run import save_model
from genstream.training.record import Origins, Training
from genstream.training.shards import in_shards
from genstream.training.text_encoder import TextTrainingSettings

LIMIT_BYTES = 2048


@contextmanager
def full_disk():
    """No file can be larger than some bytes meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def squares(numbers: range):
    return torch.arange(numbers.start, numbers.stop)[:, None].expand(-1, 64) ** 2.0, [
        f"row {number}, of many" for number in numbers
    ]


def test_rows_are_made_once_and_keep_their_captions(tmp_path):
    made = []

    def make(numbers: range):
        made.append(numbers)
        return squares(numbers)

    for _ in range(2):
        rows, captions = in_shards("squares", make, range(3, 13), 4, tmp_path)
        assert torch.equal(rows, squares(range(3, 13))[0])
        assert captions == squares(range(3, 13))[1]
    assert made == [range(3, 7), range(7, 11), range(11, 13)]
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "000003-000007.safetensors",
        "000007-000011.safetensors",
        "000011-000013.safetensors",
    ]


def test_a_launch_that_is_not_followed_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    made = []
    with pytest.raises(ValueError, match=r"distributed_type must be .*, got DEEPSPEED: use FSDP"):
        in_shards("squares", made.append, range(8), 4, tmp_path)
    assert not made


@pytest.mark.parametrize("kept_bytes", [0, 5, 200, -1])
def test_a_damaged_shard_is_named_and_made_again(tmp_path, kept_bytes):
    rows, captions = in_shards("squares", squares, range(8), 4, tmp_path)
    damaged = tmp_path / "000004-000008.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match=rf"shard '{damaged}' is damaged, remove it to have it made again: "):
        in_shards("squares", squares, range(8), 4, tmp_path)
    damaged.unlink()
    again = in_shards("squares", squares, range(8), 4, tmp_path)
    assert torch.equal(again[0], rows)
    assert again[1] == captions


def test_a_shard_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "000000-000032.safetensors"
    with full_disk(), pytest.raises(OutputError, match=rf"'{path}' cannot be written, is the disk full\? .*"):
        in_shards("squares", squares, range(32), 32, tmp_path)
    assert not list(tmp_path.iterdir())


def save_vae(pipe, folder: Path) -> None:
    save_component(pipe.vae, folder)


def save_pipeline(pipe, folder: Path) -> None:
    settings = TextTrainingSettings()
    save_model(
        pipe,
        folder,
        Origins(),
        Training(name="a", part="text", run=folder, settings=settings, logs={}, steps=1),
        None,
    )


@pytest.mark.parametrize("save", [save_vae, save_pipeline])
def test_a_result_that_cannot_be_written_is_named(build_pipeline, tmp_path, save):
    with (
        full_disk(),
        pytest.raises(OutputError, match=rf"'{tmp_path / 'it'}' cannot be written, is the disk"),
    ):
        save(build_pipeline(), tmp_path / "it")
    assert not (tmp_path / "it").exists()
    save(build_pipeline(), tmp_path / "it")
    assert (tmp_path / "it").is_dir()
