"""`genstream vae`: names, figures against a clock that is known, small VAEs measured and compared."""

import copy
import dataclasses
import json
import sys
from math import inf

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_vaes import adapter, own_vae, small_vae

import genstream
from genstream.cli.__main__ import main
from genstream.cli.vae_benchmark import (
    BenchSettings,
    Measurements,
    VAEFigures,
    measure,
    section_title,
    table,
)
from genstream.cli.vae_comparison import picture, reconstruct
from genstream.cli.vae_names import ARCHITECTURES, open_decoder, open_vae, split_pair
from genstream.data.toyworld import ToyWorld
from genstream.training.distilled_vae import VAEDistillationSettings, distill_vae
from genstream.vae.adapters.scale import LatentScale
from genstream.vae.tiny import TinyVideoVAE
from genstream.vae.turbo import TurboVAED
from genstream.vae.wan import WanVideoVAE

CPU = torch.device("cpu")
SMALL = {"latent_channels": 4, "encoder_width": 8, "decoder_widths": (8, 8, 8, 8)}


def plain(name):
    return own_vae(name, [0.0] * 4, [1.0] * 4)


@pytest.fixture
def tiny_folder(tmp_path):
    torch.manual_seed(0)
    TinyVideoVAE(**SMALL, first_frame_copies=3).save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def wan_folder(tmp_path):
    torch.manual_seed(1)
    wan = WanVideoVAE(
        latent_channels=4,
        encoder_widths=(4,) * 5,
        decoder_widths=(4,) * 5,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    wan.save_pretrained(tmp_path / "wan")
    return str(tmp_path / "wan")


@pytest.fixture(scope="module")
def clip():
    world = ToyWorld(height=64, width=64)
    return world.frames(world.scene(0, "eval"), 9)


def test_figures_of_known_chunks():
    chunk_s = [0.1] * 10 + [0.2] * 81 + [0.4] * 9
    turns = [(0.1, 0.3), (0.9, 0.2), (0.2, 0.7)]
    measured = Measurements(
        chunk_s=chunk_s,
        memory=range(1000, 1100),
        turns=turns,
        chunk_frames=4,
        state_bytes=7,
        peak_memory_bytes=2000,
        flop=10**9,
    )
    figures = measured.figures()
    assert figures.chunks == 100
    assert figures.frame_rate == pytest.approx(400 / sum(chunk_s))
    assert (figures.chunk_median_s, figures.chunk_p95_s) == (0.2, 0.4)
    assert figures.frame_new_s == pytest.approx(0.2 / 4)
    assert figures.frame_late_s == pytest.approx(0.3 / 4)
    assert (figures.memory_first_bytes, figures.memory_last_bytes) == (1004.5, 1094.5)
    assert figures.share_of(5 * 10.0**10) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["tiny_video", "wan2.1", "causal", "turbo", "turbo_windows", "tiled"])
def test_every_kind_of_vae_is_measured(name):
    vae = plain(name)
    figures = measure(vae, name, BenchSettings(width=64, height=32, chunks=10))
    chunk = vae.spec.chunk_latents
    assert (figures.chunk_latents, figures.dtype, figures.device) == (chunk, "float64", "cpu")
    assert figures.decode.chunk_frames == chunk * vae.spec.temporal_ratio
    assert (figures.encode is None) == name.startswith("turbo")
    for stream in (figures.decode, figures.encode or figures.decode):
        assert stream.chunks == 10
        assert stream.state_bytes > 0 and stream.flop_per_chunk > 0
        assert 0 < stream.chunk_median_s <= stream.chunk_p95_s
        assert 0 < stream.share_of(figures.matmul_flop_per_s) < 1.5
    assert VAEFigures.from_json(json.loads(json.dumps(dataclasses.asdict(figures)))) == figures
    faster = dataclasses.replace(figures, matmul_flop_per_s=2 * figures.matmul_flop_per_s)
    share = figures.decode.share_of(faster.matmul_flop_per_s)
    assert table([figures, faster]).count(f" | {100 * share:.0f} % | ") >= 2  # one ceiling for all
    text = table([figures])
    assert text.count(f"| {name} | decode") == 2
    few = dataclasses.replace(figures, decode=dataclasses.replace(figures.decode, chunks=9), encode=None)
    assert table([few]).count(f"| {name} | decode") == 1
    assert "not measured: there were fewer than 10 chunks" in table([few])
    assert section_title(figures) == "Speed at 64x32, float64 on cpu"


@pytest.mark.parametrize("name", ["cogvideox", "hunyuan"])
def test_measured_chunks_give_their_frames_at_once(name):
    """In the middle of a stream: what a VAE holds back at its start does not count."""
    vae = small_vae(name)
    counts = []

    class Watched(type(vae)):
        def decode_chunk(self, latents, state):
            frames = super().decode_chunk(latents, state)
            counts.append(frames.shape[2])
            return frames

    measured = measure(Watched(vae.vae), name, BenchSettings(width=64, height=64, chunks=10))
    assert set(counts[-11:]) == {measured.decode.chunk_frames}


def test_arithmetic_is_counted():
    """One more latent frame in a chunk costs as much as the first."""
    one, two = (
        measure(plain("taehv"), "x", BenchSettings(width=32, height=32, chunks=10, chunk_latents=count))
        for count in (1, 2)
    )
    assert two.decode.flop_per_chunk == 2 * one.decode.flop_per_chunk
    assert two.encode.flop_per_chunk == 2 * one.encode.flop_per_chunk
    first = 2 * 9 * 4 * 8 * 16  # 3x3 from 4 to 8 channels at 4x4 pixels
    assert one.decode.flop_per_chunk > first


def test_a_measurement_may_end_early():
    figures = measure(
        plain("tiny_video"), "x", BenchSettings(width=32, height=32, chunks=10**6, max_seconds=0.05)
    )
    assert 1 <= figures.decode.chunks < 10**6


def test_chunks_must_be_whole_pieces():
    settings = BenchSettings(width=64, height=64, chunk_latents=3)
    with pytest.raises(ValueError, match=r"must be a positive multiple of 2, which .*, got 3"):
        measure(plain("turbo_windows"), "x", settings)


def test_reconstructions_are_streamed_and_judged(clip):
    vae = plain("tiny_video")
    row = reconstruct(clip, "tiny", vae, vae)
    again = vae.decode(vae.encode(torch.from_numpy(clip).permute(3, 0, 1, 2)[None].double() / 127.5 - 1))
    expected = ((again[0] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()
    assert np.abs(row.frames.astype(int) - expected).max() <= 1
    assert row.psnr_db < inf and -1 <= row.ssim < 1 and row.flicker > 0
    assert row.encode_frame_rate > 0 and row.decode_frame_rate > 0
    assert "frames" not in row.as_json()


def test_encoders_of_taehv_start_with_a_whole_group(clip):
    """With three copies in front its latents stand where those of other VAEs stand."""
    torch.manual_seed(0)
    published, aligned = TinyVideoVAE(**SMALL), TinyVideoVAE(**SMALL, first_frame_copies=3)
    aligned.load_state_dict(published.state_dict())
    rows = [reconstruct(clip, "x", vae.eval(), vae.eval()) for vae in (published, aligned)]
    assert np.array_equal(rows[0].frames, rows[1].frames)


def test_one_vae_may_decode_what_another_encoded(clip):
    wan, tiny = plain("wan2.1"), plain("taehv")
    row = reconstruct(clip, "wan+taehv", wan, tiny)
    assert row.frames.shape == clip.shape
    with pytest.raises(
        ValueError, match=r"must name two VAEs with the same latents.*\(4, 4, 8, 1\).*\(4, 4, 16, 1\)"
    ):
        reconstruct(clip, "wan+wan2.2", wan, plain("wan2.2"))
    with pytest.raises(ValueError, match=r"frames \(--frames\) must be 1 \+ 4n for wan, got 8"):
        reconstruct(clip[:8], "wan", wan, wan)
    with pytest.raises(ValueError, match=r"turbo must start with a VAE that encodes, as ENCODER\+DECODER"):
        reconstruct(clip, "turbo", plain("turbo"), plain("turbo"))


def test_frames_that_are_not_finite_are_refused(clip):
    tiny = plain("taehv")
    with torch.no_grad():
        next(tiny.decoder.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="taehv gives frames that are not finite"):
        reconstruct(clip, "taehv", tiny, tiny)


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not let peaks begin anew")
def test_the_peak_of_memory_is_that_of_one_comparison(clip):
    vae = plain("tiny_video")
    before = reconstruct(clip, "x", vae, vae).peak_memory_bytes
    large = torch.ones(400, 2**20, dtype=torch.uint8)
    with_large = reconstruct(clip, "x", vae, vae).peak_memory_bytes
    del large
    after = reconstruct(clip, "x", vae, vae).peak_memory_bytes
    assert with_large - before > 300 * 2**20
    assert with_large - after > 300 * 2**20


def test_late_frames_are_compared_too(clip):
    vae = adapter("hunyuan")
    row = reconstruct(clip, "hunyuan", vae, vae)
    assert row.frames.shape == clip.shape


def test_the_picture_shows_frames_and_errors(clip):
    clip = np.maximum(clip, 10)
    vae = plain("tiny_video")
    exact = dataclasses.replace(reconstruct(clip, "x", vae, vae), frames=clip)
    wrong = dataclasses.replace(exact, frames=clip - 10)
    sheet = np.asarray(picture(clip, [exact, wrong]))
    height, width = 18 + 64 + 4, 64 + 4
    rows = [sheet[index * height + 18 : (index + 1) * height - 4] for index in range(3)]
    assert np.array_equal(rows[0][:, :64], clip[0])
    assert np.array_equal(rows[0][:, 3 * width : 3 * width + 64], clip[8])
    assert np.array_equal(rows[1][:, : 4 * width], rows[0][:, : 4 * width])
    assert np.array_equal(rows[2][:, :64], clip[0] - 10)
    for row, error in ((rows[1], 128), (rows[2], 128 - 80)):
        errors = [row[:, place * width : place * width + 64] for place in range(4, 8)]
        assert (np.concatenate(errors) == error).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_the_settings_of_their_classes(name):
    known = ARCHITECTURES[name]
    with torch.device("meta"):
        vae = getattr(genstream, known.kind)(**known.config)
    assert "channels" not in known.text or f"{vae.spec.latent_channels} channels" in known.text
    published = {
        "wan2.1": 126.9,
        "wan2.2": 704.7,
        "taew2_1": 11.3,
        "taew2_2": 11.4,
        "taew2_2_super": 20.5,
        "taehv1_5": 11.4,
        "turbo": 40.7,
        "turbo-causal": 40.7,
        "taeltx_2": 11.8,
    }
    if name in published:
        assert sum(weight.numel() for weight in vae.parameters()) / 1e6 == pytest.approx(
            published[name], abs=0.1
        )


def test_vaes_by_name_folder_and_file(tiny_folder, tmp_path):
    assert isinstance(open_vae("toyworld", torch.float32, CPU), TinyVideoVAE)
    assert isinstance(open_vae(tiny_folder, torch.float64, CPU), TinyVideoVAE)
    assert open_vae(tiny_folder, torch.float64, CPU).dtype == torch.float64
    assert open_vae("AutoencoderTiny", torch.float32, CPU).spec.temporal_ratio == 1
    save_file(TinyVideoVAE(**SMALL).state_dict(), tmp_path / "tae.safetensors")
    assert isinstance(open_vae(str(tmp_path / "tae.safetensors"), torch.float32, CPU), TinyVideoVAE)
    wan = WanVideoVAE(encoder_widths=(4,) * 5, decoder_widths=(4,) * 5)
    save_file(wan.state_dict(), tmp_path / "wan.safetensors")
    assert isinstance(open_vae(str(tmp_path / "wan.safetensors"), torch.float32, CPU), WanVideoVAE)
    save_file(plain("turbo").float().state_dict(), tmp_path / "turbo.safetensors")
    assert isinstance(open_vae(str(tmp_path / "turbo.safetensors"), torch.float32, CPU), TurboVAED)
    with pytest.raises(ValueError, match=r"one of wan2.1, wan2.2, .*causal, got 'wan3'"):
        open_vae("wan3", torch.float32, CPU)
    weights = [open_vae("taehv", torch.float32, CPU).decoder[1].weight for _ in range(2)]
    assert torch.equal(*weights)


def test_pairs_of_encoder_and_decoder(tmp_path, monkeypatch):
    assert split_pair("wan2.1") == ("wan2.1", "wan2.1")
    assert split_pair("wan2.1+taehv") == ("wan2.1", "taehv")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b").mkdir()
    assert split_pair("a+b") == ("a+b", "a+b")


@pytest.mark.parametrize("adapted", [False, True])
def test_a_published_turbo_decoder_takes_the_statistics_of_its_pair(adapted, tmp_path):
    torch.manual_seed(0)
    mean, std = [0.7, -3.0, 0.0, 11.0], [0.3, 5.0, 1.0, 0.06]
    path = str(tmp_path / "turbo.safetensors")
    bare = {name: value for name, value in plain("turbo").state_dict().items() if "latents" not in name}
    save_file(bare, path)
    encoder = TinyVideoVAE(**SMALL, latents_mean=mean, latents_std=std)
    if adapted:
        encoder = copy.copy(small_vae("cogvideox"))
        encoder.scale = LatentScale.per_channel(mean, std, 4)
    decoder = open_decoder(path, encoder, torch.float32, CPU)
    latents = torch.randn(1, 4, 3, 2, 2)
    raw = latents * torch.tensor(std).view(-1, 1, 1, 1) + torch.tensor(mean).view(-1, 1, 1, 1)
    torch.testing.assert_close(decoder.decode(latents), open_vae(path, torch.float32, CPU).decode(raw))
    assert not open_vae(path, torch.float32, CPU).has_statistics


def test_a_distilled_turbo_decoder_takes_normalised_latents_as_they_are(tmp_path):
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.7, -3.0, 0.0, 11.0], "latents_std": [0.3, 5.0, 1.0, 0.06]}
    teacher = TinyVideoVAE(**SMALL, **statistics, first_frame_copies=3)
    teacher.save_pretrained(tmp_path / "teacher")
    settings = VAEDistillationSettings(
        teacher=str(tmp_path / "teacher"),
        student="turbo",
        layers=1,
        total_steps=1,
        size_px=32,
        crop_px=(32,),
        clip_latents=(2,),
        evaluation_clips=1,
    )
    distill_vae(settings, tmp_path / "run")
    folder = str(tmp_path / "run" / "vae")
    decoder, alone = open_decoder(folder, teacher, torch.float32, CPU), open_vae(folder, torch.float32, CPU)
    assert list(alone.config.decoder_block_out_channels) == [16, 32, 64, 128]
    latents = torch.randn(1, 4, 3, 4, 4)
    assert torch.equal(decoder.decode(latents), alone.decode(latents))


def test_a_turbo_decoder_without_spread_is_refused(tmp_path):
    weights = plain("turbo").float().state_dict() | {"latents_std": torch.zeros(4)}
    save_file(weights, tmp_path / "turbo.safetensors")
    with pytest.raises(ValueError, match="latents_std must be above 0 for every channel"):
        open_vae(str(tmp_path / "turbo.safetensors"), torch.float32, CPU)


def test_pictures_are_png(tmp_path, capsys):
    assert main(["vae", "compare", "toyworld", "--picture", str(tmp_path / "a.jpg")]) == 2
    assert "picture (--picture) must end in .png" in capsys.readouterr().err


def test_a_turbo_decoder_with_statistics_keeps_them(tmp_path):
    turbo = own_vae("turbo", [1.0] * 4, [2.0] * 4).float()
    turbo.save_pretrained(tmp_path)
    decoder = open_decoder(str(tmp_path), TinyVideoVAE(**SMALL), torch.float32, CPU)
    assert decoder.latents_mean.tolist() == [1.0] * 4
    assert decoder.latents_std.tolist() == [2.0] * 4


def test_bench_prints_and_writes(tiny_folder, tmp_path, capsys):
    output = tmp_path / "vae.md"
    output.write_text("# Video VAEs\n\n## Other\n\nstays\n")
    arguments = ["vae", "bench", tiny_folder, "--size", "32x32", "--chunks", "10", "--output", str(output)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"| {tiny_folder} | encode | 1 |" in printed
    assert printed.strip() in output.read_text()
    assert "## Other\n\nstays" in output.read_text()
    assert "## Speed at 32x32, float32 on cpu" in output.read_text()


def test_several_vaes_are_measured_in_processes_of_their_own(tiny_folder, tmp_path, capfd):
    arguments = [
        "vae",
        "bench",
        tiny_folder,
        "AutoencoderKLAllegro",
        "--size",
        "32x32",
        "--chunks",
        "10",
        "--json",
    ]
    assert main(arguments) == 2
    printed = capfd.readouterr()
    (figures,) = json.loads(printed.out)
    assert figures["vae"] == tiny_folder and figures["decode"]["chunks"] == 10
    assert "could not measure AutoencoderKLAllegro at 32x32" in printed.err
    assert "it sees the whole clip" in printed.err


def test_compare_prints_writes_and_draws(tiny_folder, wan_folder, tmp_path, capsys):
    output, sheet = tmp_path / "vae.md", tmp_path / "vaes.png"
    names = [tiny_folder, wan_folder, f"{wan_folder}+{tiny_folder}"]
    arguments = ["vae", "compare", *names, "--size", "64x32", "--frames", "5"]
    assert main([*arguments, "--output", str(output), "--picture", str(sheet)]) == 0
    printed = capsys.readouterr().out
    assert "5 frames of 64x32" in printed
    assert all(f"| {name} | " in printed for name in names)
    assert f"## Quality\n\n{printed.strip()}" in output.read_text()
    with Image.open(sheet) as image:
        assert image.size == (2 * 4 * (64 + 4) - 4, 4 * (18 + 32 + 4) - 4)
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [item["vae"] for item in rows] == names
    assert rows[0]["psnr_db"] > 0


def test_compare_shows_what_it_could(tiny_folder, capsys):
    arguments = ["vae", "compare", tiny_folder, "taeltx_2", "--size", "64x32", "--frames", "5"]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert f"| {tiny_folder} |" in shown.out
    assert "could not compare taeltx_2: frames (--frames) must be" in shown.err


def test_compare_takes_a_video(tiny_folder, tmp_path, capsys):
    path = tmp_path / "clip.mp4"
    writer = imageio_ffmpeg.write_frames(str(path), (96, 64), fps=8)
    writer.send(None)
    for value in range(6):
        writer.send(np.full((64, 96, 3), 40 * value, np.uint8))
    writer.close()
    assert main(["vae", "compare", tiny_folder, "--video", str(path), "--frames", "5"]) == 0
    assert "clip.mp4, 5 frames of 96x64" in capsys.readouterr().out
    arguments = ["vae", "compare", tiny_folder, "--video", str(path), "--frames", "5", "--size", "32x16"]
    assert main(arguments) == 0
    assert "clip.mp4, 5 frames of 32x16" in capsys.readouterr().out
    assert main(["vae", "compare", tiny_folder, "--video", str(path), "--frames", "9"]) == 2
    assert "must have 9 frames or more (--frames), got 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (["bench", "--chunks", "5", "--size", "32x32"], "chunks (--chunks) must be at least 10, got 5"),
        (["bench", "--max-seconds", "0", "--size", "32x32"], "max_seconds (--max-seconds) must be positive"),
        (["bench", "--size", "30x32"], "width (--size) must be a positive multiple of 16, got 30"),
        (["bench", "--size", "32"], "must be WIDTHxHEIGHT"),
        (
            ["bench", "--output", "no/such.md"],
            "output must be a markdown file in a folder that exists, got 'no/such.md'",
        ),
        (["bench", "wan2.1+taehv", "--size", "32x32"], "got 'wan2.1+taehv'"),
        (["bench", "--output", "."], "output must be a markdown file in a folder that exists, got '.'"),
        (["bench", "toyworld", "nothing", "--chunks", "10"], "weight file (.safetensors, .pth"),
        (["bench", "toyworld", "--chunks", "0"], "chunks (--chunks) must be at least 10, got 0"),
        (["compare", "toyworld", "nothing.ckpt"], "got 'nothing.ckpt'"),
        (["compare"], "VAE"),
        (["compare", "toyworld+"], "VAE must name an encoder and a decoder around +, got 'toyworld+'"),
        (["compare", "toyworld", "--frames", "1"], "frames (--frames) must be at least 2, got 1"),
        (["compare", "toyworld", "--frames", "6"], "frames (--frames) must be 1 + 4n for toyworld, got 6"),
        (
            ["compare", "toyworld", "--picture", "no/such.png"],
            "picture (--picture) must be a file in a folder that exists, got 'no/such.png'",
        ),
        (["compare", "toyworld", "--video", "nothing.mp4"], "video 'nothing.mp4' does not exist"),
    ],
)
def test_bad_input(wrong, error, capsys):
    assert main(["vae", *wrong]) == 2
    assert error in capsys.readouterr().err


def test_help_lists_what_a_vae_may_be(capsys):
    with pytest.raises(SystemExit):
        main(["vae", "bench", "--help"])
    text = capsys.readouterr().out
    assert all(f"    {name}" in text for name in ARCHITECTURES)
