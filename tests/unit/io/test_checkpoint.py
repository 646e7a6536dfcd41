"""Weight files: what they hold is found without reading it, and nothing in them is ever run."""

import json
import os
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from genstream.io.checkpoint import open_checkpoint
from genstream.io.shards import PlannedTensor, write_safetensors, write_shards

BASE = torch.arange(60.0).reshape(3, 4, 5)
TENSORS = {
    "plain": BASE,
    "view": BASE[1:, 2],
    "transposed": BASE.transpose(0, 2),
    "expanded": BASE[:1].expand(3, 4, 5),
    "half": BASE.to(torch.bfloat16),
    "double": BASE.double() / 3,
    "scalar": torch.tensor(7.0),
    "none": torch.zeros(0, 4),
    "parameter": torch.nn.Parameter(BASE + 1),
}
OTHER = {name: tensor + 1 for name, tensor in TENSORS.items()}


def same(checkpoint, expected):
    assert checkpoint.tensors.keys() == expected.keys()
    for name, stored in checkpoint.tensors.items():
        read = stored.read()
        assert read.dtype == stored.dtype == expected[name].dtype
        assert checkpoint.shapes[name] == tuple(expected[name].shape)
        torch.testing.assert_close(read, expected[name].detach(), rtol=0, atol=0)


@pytest.fixture(scope="module")
def torch_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("torch") / "weights.pt"
    torch.save({"critic": OTHER, "generator_ema": TENSORS, "step": 3, "settings": {"rate": [1.0]}}, path)
    return path


def test_torch_file(torch_file):
    checkpoint = open_checkpoint(torch_file, None)
    assert checkpoint.weights == "generator_ema"
    assert checkpoint.others == ("critic", "settings.rate", "step")
    same(checkpoint, TENSORS)


def test_the_user_chooses_the_weights(torch_file):
    same(open_checkpoint(torch_file, "critic"), OTHER)
    with pytest.raises(ValueError, match="one of 'critic', 'generator_ema', got 'ema'"):
        open_checkpoint(torch_file, "ema")


def test_a_choice_that_only_the_user_can_make(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"one": {"a": BASE}, "two": {"a": BASE}}, path)
    with pytest.raises(ValueError, match=r"must be given .*: one of 'one', 'two'"):
        open_checkpoint(path, None)


class Evil:
    """Writes a file when it is unpickled the usual way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_torch_file_is_not_run(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"generator": TENSORS, "extra": Evil(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match=r"more than plain tensors \(\w+\.mkdir\)"):
        open_checkpoint(path, None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0.99, 0.3])
def test_a_torch_file_that_is_cut_off(torch_file, tmp_path, keep):
    path = tmp_path / "weights.pt"
    whole = torch_file.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ValueError, match="no whole torch file"):
        open_checkpoint(path, None)


def test_safetensors_of_others(tmp_path):
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    same(open_checkpoint(tmp_path / "weights.safetensors", None), TENSORS)
    same(open_checkpoint(tmp_path, None), TENSORS)


def planned(tensors):
    return [
        PlannedTensor(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), read=tensor.detach)
        for name, tensor in tensors.items()
    ]


@pytest.mark.parametrize("limit", [1, 250, 500, 10**9])
def test_shards(tmp_path, limit):
    paths = write_shards(tmp_path, "model", planned(TENSORS), limit)
    same(open_checkpoint(tmp_path, None), TENSORS)
    read = [load_file(path) for path in paths]
    assert {name for held in read for name in held} == TENSORS.keys()
    for held in read:
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit
    assert (len(paths) > 1) == (tmp_path / "model.safetensors.index.json").is_file() == (limit < 10**9)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive: list[weakref.ref] = []

    def read():
        assert all(reference() is None for reference in alive)
        tensor = torch.ones(100, 100)
        alive.append(weakref.ref(tensor))
        return tensor

    tensors = [
        PlannedTensor(name=f"{number}", dtype=torch.float32, shape=(100, 100), read=read)
        for number in range(5)
    ]
    write_shards(tmp_path, "model", tensors, 100_000)
    assert len(alive) == 5


def test_a_number_that_is_none_is_not_written(tmp_path):
    for value in (float("nan"), float("inf")):
        bad = torch.ones(4).index_fill(0, torch.tensor([2]), value)
        with pytest.raises(ValueError, match="'bad' holds NaN or infinity"):
            write_safetensors(tmp_path / "a.safetensors", planned({"good": BASE, "bad": bad}), {})


def test_large_numbers_are_numbers(tmp_path):
    large = {"large": torch.full((4,), 3e38)}  # their sum is infinite
    write_safetensors(tmp_path / "a.safetensors", planned(large), {})
    same(open_checkpoint(tmp_path / "a.safetensors", None), large)


def test_shards_that_disagree_with_their_index(tmp_path):
    write_shards(tmp_path, "model", planned(TENSORS), 250)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = index["weight_map"].pop("view")
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="disagree on 'ghost': only the index has it"):
        open_checkpoint(tmp_path, None)


def test_a_tensor_in_two_shards(tmp_path):
    paths = write_shards(tmp_path, "model", planned(TENSORS), 250)
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(ValueError, match=r"is in two files, 'model-00001.*' and 'model-00002"):
        open_checkpoint(tmp_path, None)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_weights_that_are_no_numbers_of_ours(tmp_path, dtype):
    save_file({"a": BASE.to(dtype)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="'a' must be of dtype float64, float32, float16, bfloat16, got"):
        open_checkpoint(tmp_path / "weights.safetensors", None)


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    for path, error in (
        (tmp_path / "weights.gguf", "must be a folder or one of"),
        (tmp_path, "it holds weights.gguf"),
    ):
        with pytest.raises(ValueError, match=error):
            open_checkpoint(path, None)
