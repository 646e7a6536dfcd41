"""Files of streams that do not fit are refused by name."""

import json
import resource

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

RED = "a red circle moving right"


@pytest.fixture
def saved(pipe, ask, tmp_path):
    state = pipe.start(ask())
    pipe.step(state)
    path = tmp_path / "stream.safetensors"
    pipe.save_state(state, path)
    return path


def with_meta(path, **changes):
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    meta = {**json.loads(metadata["genstream_stream"]), **changes}
    save_file(load_file(path), path, metadata={"genstream_stream": json.dumps(meta)})


def test_saving_leaves_one_file(saved):
    assert [path.name for path in saved.parent.iterdir()] == ["stream.safetensors"]


def test_other_model(saved, build_pipeline):
    with pytest.raises(ValueError, match=r"stream\.safetensors.*another model"):
        build_pipeline(weights_seed=1).load_state(saved)


def test_other_dtype(saved, build_pipeline):
    import torch

    with pytest.raises(ValueError, match=r"stream\.safetensors.*model or dtype"):
        build_pipeline().to(torch.bfloat16).load_state(saved)


def test_other_format(saved, pipe):
    with_meta(saved, format=99)
    with pytest.raises(ValueError, match=r"stream\.safetensors.*format 3, got 99"):
        pipe.load_state(saved)


def test_truncated(saved, pipe):
    whole = saved.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"stream\.safetensors"):
            pipe.load_state(saved)


def test_other_file(pipe, tmp_path):
    save_file({}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"snapshot, got .*weights\.safetensors"):
        pipe.load_state(tmp_path / "weights.safetensors")


def test_missing_file(pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pipe.load_state(tmp_path / "nowhere")


def test_missing_tensor(saved, pipe):
    with safe_open(str(saved), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(saved)
    del tensors["history"]
    save_file(tensors, saved, metadata=metadata)
    with pytest.raises(ValueError, match="history"):
        pipe.load_state(saved)


def test_a_folder_that_does_not_exist(saved, pipe, tmp_path):
    state = pipe.load_state(saved)
    with pytest.raises(ValueError, match=r"path must lie in an existing folder, got .*missing"):
        pipe.save_state(state, tmp_path / "missing" / "state.safetensors")
    with pytest.raises(ValueError, match=r"path must name a file, got .* which is a folder"):
        pipe.save_state(state, tmp_path)


def test_a_full_disk_leaves_the_snapshot_before(saved, pipe, tmp_path):
    """A file size limit stands in for it."""
    before, state = saved.read_bytes(), pipe.load_state(saved)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        with pytest.raises(OSError, match=r"path .*stream\.safetensors' cannot be written: .*"):
            pipe.save_state(state, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["stream.safetensors"]
    assert saved.read_bytes() == before


def meta_of(path):
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["genstream_stream"])


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("request", {"settings": {"unheard_of": 1}}),
        ("request", {"schedule": {"kind": "Unheard", "timesteps": [1.0], "sigmas": [1.0]}}),
        ("counters", {"frame": "9"}),
        ("counters", {"paused": 1}),
    ],
)
def test_what_this_version_does_not_know(saved, pipe, part, change):
    with_meta(saved, **{part: {**meta_of(saved)[part], **change}})
    with pytest.raises(ValueError, match=r"path must be a snapshot of this version, got .*stream"):
        pipe.load_state(saved)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("history", r"must have a history of shape \[1, 4, any, 4, 4\], got"),
        ("kv.keys.0", r"keys\.0 must have the cache's shape"),
    ],
)
def test_tensors_of_another_shape(saved, pipe, name, message):
    with safe_open(str(saved), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(saved)
    tensors[name] = tensors[name][:, :1].clone()
    save_file(tensors, saved, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        pipe.load_state(saved)


def test_a_folder_is_no_snapshot(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"path must be a stream snapshot, got .* which is a folder"):
        pipe.load_state(tmp_path)
