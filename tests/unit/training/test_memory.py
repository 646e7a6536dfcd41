"""The dry run of a distillation against what is known of it."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from sparse_models import write_wan

from genstream.cli.__main__ import main
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.training.denoiser import Denoiser, DenoiserSettings
from genstream.training.memory import distillation_memory
from genstream.training.self_forcing import SelfForcingSettings

MODEL = DenoiserSettings(width=48, layers=3, ffn_width=96, text_width=16, text_layers=1)
GIB = 2**30
LARGE = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}


@pytest.fixture(scope="module")
def small(build_pipeline, tmp_path_factory):
    """Folders of a small student and its teacher."""
    folder = tmp_path_factory.mktemp("small")
    for name, frames, seen in (("student", 1, 1), ("teacher", 3, 0), ("streaming", 1, 1)):
        denoiser = Denoiser.new(MODEL, 4)
        CausalVideoPipeline(
            denoiser.tokenizer,
            denoiser.text_encoder,
            denoiser.transformer,
            build_pipeline().vae,
            FewStepScheduler(),
            chunk_frames=frames,
            sink_frames=seen,
            window_frames=seen,
            positions="window",
            text_tokens=32,
            default_height=64,
            default_width=64,
        ).save_pretrained(folder / name)
    return folder


def memory_of(folder, processes=1, **settings):
    places = {"teacher": str(folder / "teacher"), "initial": str(folder / "student")}
    return distillation_memory(SelfForcingSettings(**{**places, "batch_size": 2, **settings}), processes)


def test_weights_and_caches_are_counted_exactly(small):
    found = memory_of(small)
    denoiser = Denoiser.new(MODEL, 4)
    transformer, encoder = (
        sum(weight.nbytes for weight in part.parameters())
        for part in (denoiser.transformer, denoiser.text_encoder)
    )
    assert found.trained_bytes == 2 * 5 * transformer
    assert found.frozen_bytes == transformer + 2 * encoder
    assert found.gathered_bytes == 0
    # Three frames of 4 x 4 tokens with keys and values of three blocks, and the sink's keys before rotation.
    assert found.cache_bytes == 2 * 3 * 16 * 48 * 4 * (3 + 3 + 1)


def test_all_models_are_whole_on_the_host(small):
    pipe = CausalVideoPipeline.from_pretrained(small / "student")
    transformer, encoder, vae = (
        sum(weight.numel() for weight in part.parameters())
        for part in (pipe.transformer, pipe.text_encoder, pipe.vae)
    )
    for processes in (1, 8):
        assert memory_of(small, processes).host_bytes == 4 * (3 * transformer + 2 * (encoder + vae))


def test_a_text_encoder_that_both_models_have_counts_once(small, tmp_path):
    shutil.copytree(small / "teacher", tmp_path / "teacher")
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(tmp_path / "teacher" / part)
        shutil.copytree(small / "student" / part, tmp_path / "teacher" / part)
    encoder = sum(weight.nbytes for weight in Denoiser.new(MODEL, 4).text_encoder.parameters())
    found, shared = memory_of(small), memory_of(small, teacher=str(tmp_path / "teacher"))
    assert found.frozen_bytes - shared.frozen_bytes == encoder
    assert found.host_bytes - shared.host_bytes == encoder


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_changes_passes_and_nothing_that_is_kept(small, checkpointing):
    """Half of what a graph keeps, but for norms; and copies of the weights in bfloat16 besides."""
    more = {"batch_size": 16, "gradient_checkpointing": checkpointing}
    full, half = memory_of(small, **more, precision="fp32"), memory_of(small, **more)
    for name in ("trained_bytes", "frozen_bytes", "gathered_bytes", "cache_bytes", "host_bytes"):
        assert getattr(half, name) == getattr(full, name)
    transformer = Denoiser.new(MODEL, 4).transformer
    layers = [part for part in transformer.modules() if isinstance(part, torch.nn.Linear | torch.nn.Conv3d)]
    copied = 2 * sum(weight.numel() for layer in layers for weight in layer.parameters())
    assert 0.5 * full.critic_bytes < half.critic_bytes - copied < 0.95 * full.critic_bytes
    assert 0.5 * full.student_bytes < half.student_bytes - 2 * copied < 0.98 * full.student_bytes


def test_more_processes_share_what_is_kept_and_nothing_else(small):
    alone, eight = memory_of(small), memory_of(small, processes=8)
    assert eight.trained_bytes == alone.trained_bytes // 8
    assert eight.frozen_bytes == alone.frozen_bytes // 8
    assert eight.gathered_bytes > 0
    assert (eight.cache_bytes, eight.student_bytes) == (alone.cache_bytes, alone.student_bytes)


def test_checkpointing_and_fewer_streams_take_less(small):
    found = [
        memory_of(small, batch_size=8),
        memory_of(small, batch_size=8, gradient_checkpointing=True),
        memory_of(small, batch_size=1, gradient_checkpointing=True),
    ]
    for more, less in pairwise(found):
        assert less.student_bytes < 0.7 * more.student_bytes
        assert less.critic_bytes < 0.8 * more.critic_bytes


def test_what_the_critic_keeps_is_what_autograd_saves(small):
    found = memory_of(small, batch_size=8, precision="fp32")
    denoiser, saved = Denoiser.new(MODEL, 4), {}
    weights = {weight.untyped_storage().data_ptr() for weight in denoiser.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(8, 4, 3, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        text = torch.randn(8, 32, 16)
        result = denoiser.transformer(x, torch.zeros(8, 3), text, return_dict=False)[0]
    kept = sum(saved.values()) + result.nbytes
    # Attention on the CPU keeps other things; the pass needs some more for its gradient.
    assert 0.7 * kept < found.critic_bytes < 2 * kept


def test_a_streaming_critic_keeps_a_pass_for_each_chunk_of_a_piece(small):
    whole, streaming = memory_of(small), memory_of(small, teacher=str(small / "streaming"))
    assert streaming.student_bytes > whole.student_bytes
    # Three passes of three frames, of which one is at its peak, in place of one.
    assert 2 * whole.critic_bytes < streaming.critic_bytes < 3 * whole.critic_bytes


@pytest.mark.parametrize(("size", "parameters"), [({}, 1.42e9), (LARGE, 14.3e9)], ids=["1.3B", "14B"])
def test_published_sizes_without_weights(tmp_path, capsys, size, parameters):
    whole = {"chunk_frames": 21, "sink_frames": 0, "window_frames": 0}
    for name, values in (("student", {"chunk_frames": 3}), ("teacher", whole)):
        path = write_wan(tmp_path / name, **size) / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    found = memory_of(tmp_path, processes=64, batch_size=1, stream_chunks=7, gradient_checkpointing=True)
    assert found.trained_bytes == pytest.approx(2 * 5 * 4 * parameters / 64, rel=0.02)
    # The teacher and one text encoder for both, of 5.68 billion.
    assert found.frozen_bytes == pytest.approx(4 * (parameters + 5.68e9) / 64, rel=0.02)
    places = ["--teacher", str(tmp_path / "teacher"), "--initial", str(tmp_path / "student")]
    options = ["--batch-size", "1", "--stream-chunks", "7", "--gradient-checkpointing", "true"]
    assert main(["distill", "student", *places, *options, "--dry-run", "--processes", "64"]) == 0
    printed = capsys.readouterr().out
    assert "on each of 64 GPUs, passes in bfloat16, what is kept in float32, 1 streams each:" in printed
    assert f"{found.peak_bytes / GIB:.2f} GiB  most at once" in printed
    assert f"{found.host_bytes / GIB:.2f} GiB  on the host of each process, while loading" in printed


def test_help_lists_the_options_of_the_dry_run(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "student", "--help"])
    listed = capsys.readouterr().out
    assert all(option in listed for option in ("--dry-run", "--processes", "--stream-chunks"))
    with pytest.raises(SystemExit):
        main(["distill", "causal", "--help"])
    assert "--dry-run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--processes", "0"], "processes (--processes) must be at least 1, got 0"),
        (["--stream-chunks", "2"], "stream_chunks must be at least 3, what the teacher sees, got 2"),
        (["--objective", "sid"], "objective must be 'dmd' for a dry run, got 'sid'"),
        (
            ["--teacher", "nowhere"],
            "teacher must be an installed model or the folder of a model or of a finished run",
        ),
    ],
)
def test_bad_input(small, capsys, options, error):
    places = ["--teacher", str(small / "teacher"), "--initial", str(small / "student")]
    assert main(["distill", "student", *places, "--dry-run", *options]) == 2
    assert error in capsys.readouterr().err


def test_several_processes_are_for_the_dry_run_alone(small, capsys):
    assert main(["distill", "student", "--processes", "8"]) == 2
    assert "processes (--processes) is for --dry-run, got 8" in capsys.readouterr().err
