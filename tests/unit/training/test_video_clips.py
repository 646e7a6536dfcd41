"""Clips out of folders of captioned videos, and their latents."""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_vaes import small_vae
from small_videos import write_video

from genstream.io.reader import read_video
from genstream.training.clips import ClipSet, _fingerprint, encode_clips
from genstream.training.text import word_tokenizer
from genstream.training.video_clips import ClipGeometry, find_clips
from genstream.vae.tiny import TinyVideoVAE

GEOMETRY = ClipGeometry(chunks=3, frames=9, height=32, width=48)
LENGTHS = {"a.mp4": 40, "inner/b.webm": 9, "c.mp4": 23, "d.1": 20}
WORDS = ("a", "red", "circle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for index, (name, frames) in enumerate(LENGTHS.items()):
        captions = f"a circle {index}\n\n a red circle {index}\n"
        write_video(root / name.removesuffix(".1"), 40 * index, frames, captions)
    (root / "d").rename(root / "d.1")
    (root / "d.txt").rename(root / "d.1.txt")
    return root


def found(folder: Path, most: int = 99, evaluation: int = 2, geometry: ClipGeometry = GEOMETRY):
    return find_clips(str(folder), geometry, most, evaluation)


def test_clips_lie_behind_each_other_and_only_the_rest_is_left(folder):
    clips = found(folder, evaluation=1)
    trained = {clip.video.name for clip in clips.clips[:-1]}
    (held_out,) = {clip.video.name for clip in clips.clips[-1:]}
    assert trained == LENGTHS.keys() - {held_out}
    for name in trained:
        starts = sorted(clip.start for clip in clips.clips if clip.video.name == name)
        assert starts == [9 * place for place in range(LENGTHS[name] // 9)]


def test_frames_are_those_of_the_video_cut_to_size(folder):
    clips = found(folder)
    for number, clip in enumerate(clips.clips):
        frames = clips.frames(number)
        assert frames.shape == (9, 32, 48, 3)
        whole = [frame.astype(float).mean() for frame in read_video(clip.video.file.path)]
        expected = whole[clip.start : clip.start + 9]
        assert frames.mean(axis=(1, 2, 3)) == pytest.approx(expected, abs=1)


def test_no_video_is_in_training_and_evaluation(folder):
    for evaluation in (1, 2, 3):
        clips = found(folder, evaluation=evaluation)
        names = [clip.video.name for clip in clips.clips]
        assert clips.evaluation == evaluation
        assert names[:-evaluation] and not set(names[:-evaluation]) & set(names[-evaluation:])


def test_fewer_clips_are_some_of_all_and_are_evaluated_alike(folder):
    whole, few = found(folder), found(folder, most=2)
    assert few.count == 4
    assert set(few.clips[:2]) <= set(whole.clips[:-2])
    assert few.clips[2:] == whole.clips[-2:]


def test_every_line_is_a_caption(folder):
    clips = found(folder)
    for number, clip in enumerate(clips.clips):
        index = list(LENGTHS).index(clip.video.name)
        told = [clips.caption(number, variant) for variant in range(clips.caption_count(number))]
        assert told == [f"a circle {index}", f"a red circle {index}"]
        assert not clips.switches(number) and not clips.is_hard(number)


def test_videos_that_are_no_use_are_skipped_and_listed(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "videos")
    write_video(tmp_path / "videos" / "short.mp4", 0, frames=8, captions="a circle")
    write_video(tmp_path / "videos" / "untold.mp4", 0)
    write_video(tmp_path / "videos" / "empty.mp4", 0, captions=" \n")
    write_video(tmp_path / "videos" / "bytes.mp4", 0, captions="a circle")
    (tmp_path / "videos" / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "videos" / "text.mp4").write_text("not a video")
    assert found(tmp_path / "videos").identity() == found(folder).identity()
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "5 of 9 videos skipped:" in told
    assert "passed over" not in told
    for problem in (
        r"bytes\.txt' cannot be read",
        r"empty\.txt' is empty",
        r"short\.mp4' has 8 frames, the longest clip 9",
        r"text\.mp4' cannot be read",
        r"untold\.mp4' has no caption in 'untold\.txt' beside it",
    ):
        assert re.search(problem, told)


def test_too_few_clips_are_refused(folder):
    with pytest.raises(
        ValueError, match=r"evaluation_clips = 9 clips of 9 frames, .* got 9 clips in 4 videos"
    ):
        found(folder, evaluation=9)
    long = replace(GEOMETRY, frames=41)
    with pytest.raises(ValueError, match="videos must hold one of at least 41 frames with its caption"):
        found(folder, geometry=long)


def test_captions_that_are_too_long_are_refused_with_their_file(folder, caplog):
    tokenizer, clips = word_tokenizer(WORDS), found(folder)
    clips.check_captions([(tokenizer, 5)])
    assert (
        "4 words of the captions are unknown to the text encoder, which takes them all alike: " in caplog.text
    )
    caplog.clear()
    clips.check_captions([(tokenizer, 5), (word_tokenizer(WORDS), 5)])
    assert caplog.text.count("words of the captions") == 1
    with pytest.raises(
        ValueError, match=r"caption file '.*(a|b|c|d\.1)\.txt': prompt must have at most 4 tokens"
    ):
        clips.check_captions([(tokenizer, 5), (tokenizer, 4)])


def test_latents_belong_to_videos_as_they_are(folder, tmp_path):
    """Neither captions nor the place of the folder change them; another file of the same name does."""
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    before = found(folder).identity()
    (moved / "a.txt").write_text("a blue circle")
    assert found(moved).identity() == before
    (os_time,) = {(moved / "a.mp4").stat().st_mtime_ns}
    os.utime(moved / "a.mp4", ns=(os_time, os_time + 1))
    assert found(moved).identity() != before
    others = [found(folder, most=1), found(folder, geometry=replace(GEOMETRY, height=16))]
    assert all(clips.identity() != before for clips in others)


@pytest.mark.parametrize("name", ["tiny_video", "wan2.1", "wan21"])
def test_latents_are_those_of_the_vae(folder, tmp_path, name):
    vae, clips = small_vae(name), found(folder, most=2)
    latents = encode_clips(clips, vae, tmp_path)
    pixels = torch.from_numpy(np.stack([clips.frames(number) for number in range(4)]))
    pixels = pixels.permute(0, 4, 1, 2, 3).double() / 127.5 - 1
    torch.testing.assert_close(latents, vae.encode(pixels).half(), rtol=1e-3, atol=1e-3)
    (path,) = tmp_path.rglob("*.safetensors")
    written = path.stat().st_mtime_ns
    assert torch.equal(encode_clips(found(folder, most=2), vae, tmp_path), latents)
    assert path.stat().st_mtime_ns == written


def test_runs_side_by_side_leave_each_others_shards_alone(folder, tmp_path):
    vae, clips = small_vae("tiny_video"), found(folder)
    with ThreadPoolExecutor() as threads:
        first, *others = threads.map(lambda _: encode_clips(clips, vae, tmp_path), range(4))
    assert all(torch.equal(first, other) for other in others)
    assert [path.suffix for path in tmp_path.rglob("*.*")] == [".safetensors"]


def test_latents_of_the_toy_world_keep_their_folder():
    """They took an hour to encode."""
    sizes = {"encoder_width": 8, "decoder_widths": (8, 8, 8, 8), "first_frame_copies": 3}
    vae = TinyVideoVAE(latent_channels=4, **sizes)
    for weight in vae.parameters():
        torch.nn.init.constant_(weight, 0.01)
    clips = ClipSet(count=5, chunks=6, chunk_frames=1, temporal_ratio=4, size_px=64)
    assert _fingerprint(clips, vae) == "4eb07e8d51871a9e"
    assert _fingerprint(replace(clips, count=9, evaluation=4), vae) == "4eb07e8d51871a9e"


def test_clips_that_break_off_are_left_out(folder, tmp_path, caplog):
    videos = tmp_path / "videos"
    shutil.copytree(folder, videos)
    for index in range(3):
        write_video(videos / f"frames{index}", 0, frames=9, captions="a circle")
    clips = found(videos, evaluation=4)
    whole = {number for number, clip in enumerate(clips.clips) if not clip.video.name.startswith("frames")}
    for frame in videos.glob("frames*/frame_000004.png"):
        frame.write_bytes(b"no picture")
    latents = encode_clips(clips, small_vae("tiny_video"), tmp_path / "latents")
    assert caplog.text.count("skipped: ") == 3
    left, kept = clips.readable(latents)
    assert left.clips == tuple(clips.clips[number] for number in sorted(whole))
    assert torch.equal(kept, latents[sorted(whole)]) and bool(kept.isfinite().all())
    assert left.evaluation == len(whole & set(range(clips.count - 4, clips.count)))
    with pytest.raises(ValueError, match="that can be decoded, got 0 and 0"):
        clips.readable(torch.full_like(latents, torch.nan))
