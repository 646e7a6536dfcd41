import json
import shutil
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from genstream.data import vocabulary
from genstream.data.captions import LONGEST_WORDS
from genstream.data.toyworld import ToyWorld
from genstream.data.vocabulary import words
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.training.clips import encode_clips
from genstream.training.denoiser import Denoiser, copy_weights
from genstream.training.student import (
    StudentTrainee,
    StudentTrainingSettings,
    _redraw,
    train_student,
)
from genstream.vae.tiny import TinyVideoVAE

TINY = {
    "total_steps": 4,
    "batch_size": 2,
    "clips": 5,
    "evaluation_clips": 4,
    "clip_chunks": 6,
    "chunk_frames": 1,
    "window_chunks": 1,
    "width": 48,
    "layers": 1,
    "ffn_width": 48,
    "text_width": 16,
    "text_layers": 1,
    "checkpoint_steps": 2,
    "evaluate_steps": 2,
    "precision": "fp32",
}


def settings_for(**changes) -> StudentTrainingSettings:
    return StudentTrainingSettings(**{"vae": "none", **TINY, **changes})


def trainee_for(latents=None, **changes) -> StudentTrainee:
    settings = settings_for(**changes)
    if latents is None:
        count = settings.clips + settings.evaluation_clips
        latents = torch.randn(count, 4, 6 * settings.chunk_frames, 4, 4)
    module = Denoiser.new(settings, 4)
    return StudentTrainee(settings, module, settings.clip_set(temporal_ratio=4), latents)


def drawn(trainee, rng, among):
    """Sequence, clips and captions of a step."""
    return trainee._draw(rng, rng, among)


@pytest.fixture(scope="module")
def vae_folder(build_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    build_pipeline().vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(vae_folder, tmp_path_factory):
    """Settings and folder of a finished run."""
    settings, folder = settings_for(vae=str(vae_folder)), tmp_path_factory.mktemp("runs") / "student"
    train_student(settings, folder)
    return settings, folder


def test_loss_falls():
    torch.manual_seed(0)
    trainee = trainee_for(torch.randn(9, 4, 1, 1, 1).expand(9, 4, 6, 4, 4), batch_size=4)
    before = trainee.evaluate()["loss"]
    optimizer = torch.optim.AdamW(trainee.module.parameters(), lr=5e-3)
    for step in range(15):
        torch.manual_seed(step)
        optimizer.zero_grad()
        trainee.loss(step)[0].backward()
        optimizer.step()
    assert trainee.evaluate()["loss"] < 0.8 * before
    assert all(weight.grad is not None for weight in trainee.module.transformer.parameters())


@pytest.mark.parametrize("kind", ["first", "image_start", "middle", "switched"])
def test_every_kind_of_sequence(kind):
    shares = {"first": 0.0, "image_start": 0.0, "middle": 0.0, "switched": 0.0, kind: 1.0}
    trainee = trainee_for(**shares, chunk_frames=2)
    for step in range(3):
        loss, _ = trainee.loss(step)
        loss.backward()
        assert 0.1 < loss.item() < 20


def test_a_redrawn_context_is_near_the_true_one_and_carries_no_gradient():
    trainee = trainee_for(first=0.0, middle=1.0, switched=0.0, image_start=0.0)
    sequence, clips, _ = drawn(trainee, np.random.default_rng(0), range(5))
    context = trainee.latents[clips][:, :, sequence.clean_frames]
    redrawn = _redraw(
        trainee.module, context, sequence, trainee.module.embed(["a red circle"] * len(clips)), 0.8
    )
    assert redrawn.shape == context.shape
    assert not redrawn.requires_grad
    assert 0 < (redrawn - context).square().mean() < 4 * context.square().mean()


def test_targets_behind_a_switch_carry_the_new_caption():
    trainee = trainee_for(first=0.0, middle=0.0, switched=0.5, clips=12)
    for step in range(30):
        sequence, clips, caption = drawn(trainee, np.random.default_rng(step), range(12))
        switched = sequence.noisy_frames[0] >= 3 and len(set(sequence.noisy_frames)) == 1
        assert (caption == trainee.clips.caption_after_switch) == switched
        if switched:
            assert set(clips) <= {3, 7, 11}


def test_targets_in_the_middle_never_stand_behind_a_switch():
    trainee = trainee_for(first=0.0, middle=1.0, switched=0.0, image_start=0.0, clips=12)
    starts = set()
    for step in range(60):
        sequence, clips, _ = drawn(trainee, np.random.default_rng(step), range(12))
        assert not set(clips) & {3, 7, 11}
        starts.add(sequence.noisy_frames[0])
    assert starts == {3, 4, 5}


def test_evaluation_knows_no_clip_of_the_training():
    trainee = trainee_for()
    before = trainee.evaluate()["loss"]
    trainee.latents[:5] = torch.nan
    assert trainee.evaluate()["loss"] == before
    assert trainee.loss(0)[0].isnan()


def test_data_follow_from_the_step():
    trainee = trainee_for()
    losses = []
    for step in (0, 1, 0):
        torch.manual_seed(step)
        losses.append(trainee.loss(step)[0].item())
    assert losses[0] == losses[2] != losses[1]


def test_training_noise_covers_the_sampling_steps():
    trainee = trainee_for(batch_size=200)
    rng = np.random.default_rng(0)
    sigma = trainee._sigma(drawn(trainee, rng, range(5))[0], 200, rng)
    assert 0 <= sigma.min() and sigma.max() <= 1
    for level in (1.0, 36 / 37, 12 / 13, 0.8):
        assert 0.1 < ((sigma - level).abs() < 1e-6).float().mean() < 0.25


def test_diffusion_forcing_learns_every_chunk_at_a_level_of_its_own(monkeypatch):
    trainee, seen = trainee_for(forcing="diffusion", image_start=0.0, batch_size=4), []
    velocity = Denoiser.velocity

    def spied(module, x, sigma, *rest):
        seen.append(sigma)
        return velocity(module, x, sigma, *rest)

    monkeypatch.setattr(Denoiser, "velocity", spied)
    for step in range(60):
        assert trainee.loss(step)[0].isfinite()
    together = [sigma for sigma in seen if sigma.shape[1] == 3]  # sink, window and target, each noisy
    assert len(together) > 10
    assert all((sigma > 0).all() for sigma in together)
    assert torch.cat(together).diff(dim=1).ne(0).float().mean() > 0.5
    assert 0.1 < (torch.cat(together) < 0.3).float().mean() < 0.2  # half of them are anywhere in [0, 1]


def test_hard_clips_come_more_often():
    trainee = trainee_for(clips=40, hard_weight=3.0)
    hard = [trainee.clips.is_hard(clip) for clip in range(40)]
    chosen = [clip for step in range(500) for clip in trainee._choose(range(40), np.random.default_rng(step))]
    expected = 3 * sum(hard) / (3 * sum(hard) + 40 - sum(hard))
    assert 0.15 < np.mean(hard) < 0.6
    assert abs(np.mean([hard[clip] for clip in chosen]) - expected) < 0.05


def test_random_masks_come_in_all_sizes():
    changes = {"chunk_frames": 3, "window_chunks": 2, "clip_chunks": 8, "switched": 0.0}
    trainee, seen = trainee_for(random_masks=True, **changes), set()
    for step in range(1000):
        sequence, _, _ = drawn(trainee, np.random.default_rng(step), range(9))
        target = sequence.noisy[-1]
        context = [sequence.clean[index].frames for index in target.sees]
        window = [frames for frames in context if frames.start]
        chunks = [*window, target.frames]
        assert all(before.stop == after.start for before, after in pairwise(chunks))
        assert {len(frames) for frames in chunks} == {len(target.frames)}
        assert target.frames.stop <= 24
        seen.add((len(target.frames), len(window), len(window) < len(context)))
    for size in (1, 2, 3):
        for window in range(1, 6 // size + 1):
            assert {(size, window, True), (size, window, False)} <= seen


def test_random_masks_behind_a_switch_begin_a_chunk_there():
    changes = {"chunk_frames": 3, "window_chunks": 2, "clip_chunks": 8}
    shares = {"first": 0.0, "middle": 0.0, "image_start": 0.0, "switched": 1.0}
    trainee, seen = trainee_for(random_masks=True, **changes, **shares), set()
    switch = 3 * trainee.clips.switch_chunk
    for step in range(300):
        sequence, _, _ = drawn(trainee, np.random.default_rng(step), range(9))
        target = sequence.noisy[-1].frames
        assert switch <= target.start and target.stop <= 24
        for piece in sequence.clean[1:]:
            assert (piece.frames.start - switch) % len(target) == 0
        # What a re-cache made sees all of it; what came later does not.
        for index, piece in enumerate(sequence.clean):
            later = sequence.clean[index + 1 :]
            recached = [index + 1 + place for place, each in enumerate(later) if each.frames.stop <= switch]
            assert set(recached) <= set(piece.sees) or piece.frames.start >= switch
        seen.add(len(target))
    assert seen == {1, 2, 3}


@pytest.mark.parametrize("kind", ["first", "image_start", "middle", "switched"])
@pytest.mark.parametrize("forcing", ["teacher", "diffusion"])
def test_every_kind_of_sequence_with_random_masks(kind, forcing):
    shares = {"first": 0.0, "image_start": 0.0, "middle": 0.0, "switched": 0.0, kind: 1.0}
    trainee = trainee_for(**shares, chunk_frames=2, random_masks=True, forcing=forcing)
    for step in range(6):
        assert trainee.loss(step)[0].isfinite()


def test_captions_fit_the_prompt():
    world, trainee = ToyWorld(), trainee_for()
    captions = [world.caption(world.scene(seed), seed % 8) for seed in range(400)]
    tokens = trainee.module.tokenizer(captions).input_ids
    assert max(map(len, tokens)) <= LONGEST_WORDS + 1
    assert not any(trainee.module.tokenizer.unk_token_id in row for row in tokens)
    assert len(trainee.module.tokenizer) == len(words()) + 3


def test_the_longest_caption_fits_the_shortest_prompt():
    tokenizer = trainee_for(text_tokens=LONGEST_WORDS + 1).module.tokenizer

    def longest(choices) -> str:
        return max(choices, key=lambda choice: len(choice.split()))

    def longest_of(table) -> str:
        return longest(chain(*table.values()))

    moving = f"{longest(vocabulary.VERBS)} {longest_of(vocabulary.HEADINGS)}"
    words = [longest_of(table) for table in (vocabulary.SIZES, vocabulary.COLOURS, vocabulary.SHAPES)]
    item = " ".join(["a", *words, longest([moving, longest_of(vocabulary.OTHER_MOTIONS)])])
    background = longest(vocabulary.BACKGROUND_PHRASES).format(longest_of(vocabulary.BACKGROUNDS))
    caption = f"{item} {longest(vocabulary.JOINTS)} {item}, {background}"
    assert len(tokenizer(caption).input_ids) == LONGEST_WORDS + 1


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"vae": "transformer"}, "vae must be the folder of a trained VAE, got .*CausalDiT"),
        ({"vae": "text_encoder"}, "vae must be the folder of a trained VAE, got .*must name its class"),
        ({"vae": "nowhere"}, "vae must be the folder of a trained VAE, got .*nowhere"),
        ({"text_encoder": "vae"}, "text_encoder must be the folder of a text encoder, got .*a TinyVideoVAE"),
        ({"text_encoder": "nowhere"}, "text_encoder must be the folder of a text encoder"),
        ({"text_encoder": "text_encoder"}, "text_encoder must know the 101 tokens .* got 11"),
    ],
)
def test_folders_of_something_else_are_refused_before_anything_is_written(
    wrong, error, build_pipeline, tmp_path
):
    model = tmp_path / "model"
    build_pipeline().save_pretrained(model)
    folders = {name: str(model / place) for name, place in {"vae": "vae", **wrong}.items()}
    with pytest.raises(ValueError, match=error) as raised:
        train_student(settings_for(**folders), tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_sizes_that_make_no_whole_tokens_are_refused_before_anything_is_written(vae_folder, tmp_path):
    with pytest.raises(ValueError, match="size_px must be a positive multiple of 16, got 40"):
        train_student(settings_for(vae=str(vae_folder), size_px=40), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_run_leaves_its_settings_and_figures(trained):
    settings, folder = trained
    assert json.loads((folder / "settings.json").read_text())["width"] == settings.width
    assert len((folder / "evaluation.csv").read_text().splitlines()) == 3


def test_clips_are_encoded_once(trained):
    settings, folder = trained
    (shard,) = (folder.parent / "latents").rglob("*.safetensors")
    written = shard.stat().st_mtime_ns
    vae = TinyVideoVAE.from_pretrained(settings.vae)
    latents = encode_clips(settings.clip_set(4), vae, folder.parent / "latents")
    assert latents.shape == (9, 4, 6, 16, 16)
    assert torch.equal(latents, load_file(shard)["latents"])
    assert shard.stat().st_mtime_ns == written


def test_latents_of_another_vae_or_another_number_of_clips_are_not_mixed_in(build_pipeline, tmp_path):
    clips = settings_for(clips=4).clip_set(4)
    first, second = build_pipeline().vae, build_pipeline().vae
    with torch.no_grad():
        second.encoder[0].weight.add_(0.1)
    whole = encode_clips(clips, first, tmp_path)
    assert not torch.equal(encode_clips(clips, second, tmp_path), whole)
    more = encode_clips(settings_for(clips=6).clip_set(4), first, tmp_path)
    assert len(more) == 10
    assert torch.equal(more[:8], whole)


def test_first_chunks_are_those_of_the_clips_with_their_numbers(build_pipeline, tmp_path):
    vae, clips = build_pipeline().vae, settings_for(clips=6).clip_set(4)
    whole = encode_clips(clips, vae, tmp_path)
    first = encode_clips(replace(clips, count=5, chunks=1), vae, tmp_path, start=3)
    torch.testing.assert_close(first, whole[3:8, :, :1])


def test_steps_on_first_chunks_draw_from_further_clips():
    torch.manual_seed(0)
    plain = trainee_for(first=1.0, image_start=0.0, middle=0.0, switched=0.0, without_text=0.0)
    further = torch.randn(7, 4, 1, 4, 4)
    trainee = StudentTrainee(plain.settings, plain.module, plain.clips, plain.latents, further)
    rng = np.random.default_rng(0)
    _, clips, caption = drawn(trainee, rng, range(5))
    assert set(clips) <= set(range(9, 16)) and len(set(clips)) > 1
    assert caption(clips[0], 0) == ToyWorld().caption(ToyWorld().scene(clips[0]), 0)
    assert torch.equal(trainee._latents_of([9, 15]), further[[0, 6]])
    assert torch.equal(trainee._latents_of([0, 8]), plain.latents[[0, 8]])
    _, clips, _ = drawn(trainee, rng, range(5, 9))
    assert set(clips) <= set(range(5, 9))  # evaluation
    assert trainee.loss(0)[0].isfinite()


def test_a_run_with_further_first_chunks(trained, tmp_path):
    settings, _ = trained
    settings = replace(settings, first=1.0, image_start=0.0, middle=0.0, switched=0.0, first_clips=3)
    train_student(settings, tmp_path / "run")
    encoded = [load_file(path)["latents"].shape[:3] for path in (tmp_path / "latents").rglob("*.safetensors")]
    assert sorted(encoded) == [(3, 4, 1), (9, 4, 6)]


def test_the_result_is_a_pipeline(trained):
    settings, folder = trained
    before = load_file(folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    (folder / "model" / "left_over").touch()
    shutil.rmtree(folder / "model" / "training")
    train_student(settings, folder)  # no record: the result is written again
    assert not (folder / "model" / "left_over").exists()
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "evaluation.csv",
        "log.csv",
        "model",
        "origins.json",
        "settings.json",
    }
    record = json.loads((folder / "model" / "training" / f"{folder.name}.json").read_text())
    assert record["settings"]["batch_size"] == 2
    assert record["steps"] == 4
    log = folder / "model" / "training" / f"{folder.name}.csv"
    assert log.read_text() == (folder / "log.csv").read_text()
    pipe = CausalVideoPipeline.from_pretrained(folder / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.settings.sink_frames, pipe.settings.window_frames) == (1, 1)
    assert pipe.settings.guidance_scale == 3.0
    frames = pipe("a red circle moves right", num_frames=13, output_type="pt").frames
    assert frames.shape == (1, 13, 3, 128, 128)
    assert frames.isfinite().all()
    assert pipe.known_words() == sorted(words())
    assert all(
        torch.equal(weight, before[name].float()) for name, weight in pipe.transformer.state_dict().items()
    )


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"forcing": "self"}, "forcing must be 'teacher' or 'diffusion', got 'self'"),
        ({"window_chunks": 0, "random_masks": True}, "window_chunks must be at least 1, got 0"),
        ({"window_chunks": -1}, "window_chunks must be at least 0, got -1"),
        ({"hard_weight": 0.0}, "hard_weight must be a positive number, got 0.0"),
        ({"width": 50}, "width must be a multiple of 48, got 50"),
        ({"guidance_scale": 0.9}, r"guidance_scale must be at least 1 \(off\) and finite, got 0\.9"),
        ({"clip_chunks": 5}, "clip_chunks must be at least 6, got 5"),
        ({"clips": 3}, "clips must be at least 4, got 3"),
        ({"evaluation_clips": 0}, "evaluation_clips must be at least 4, got 0"),
        ({"middle": 1.5}, r"middle must be in \[0, 1\], got 1\.5"),
        ({"first": 0.8, "middle": 0.5}, "must add up to at most 1, got 1.45"),
        ({"image_start": -0.1}, r"image_start must be in \[0, 1\], got -0\.1"),
        ({"steps": (250.0, 500.0)}, r"steps must make a schedule, got \[250\.0, 500\.0\] with a shift of 12"),
        ({"steps": (1100.0,)}, r"steps must make a schedule, got \[1100\.0\]"),
        ({"steps": (float("nan"),)}, r"steps must make a schedule, got \[nan\]"),
        ({"steps": ()}, r"steps must make a schedule, got \[\]"),
        ({"shift": 0.0}, "shift must be a positive number, got 0.0"),
        ({"shift": float("nan")}, "shift must be a positive number, got nan"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"first_chunks": 0}, "first_chunks must be at least 1, got 0"),
        ({"text_tokens": 28}, "text_tokens must be more than 28, the words of the longest caption, got 28"),
        ({"text_width": 18}, "text_width must be a multiple of 4, got 18"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"size_px": 0}, "size_px must be at least 1, got 0"),
        ({"chunk_frames": 0}, "chunk_frames must be at least 1, got 0"),
        ({"context_noise": float("nan")}, "context_noise must be at least 0 and finite, got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be at least 1 .* got inf"),
    ],
)
def test_bad_settings(wrong, error):
    with pytest.raises(ValueError, match=error):
        settings_for(**wrong)


def test_a_run_goes_on_from_another_and_its_record_tells_both(trained, tmp_path):
    settings, folder = trained
    more = settings_for(vae=settings.vae, initial=str(folder), total_steps=1, learning_rate=1e-12)
    train_student(more, tmp_path / "second")
    first = CausalVideoPipeline.from_pretrained(folder / "model").transformer.state_dict()
    second = CausalVideoPipeline.from_pretrained(tmp_path / "second" / "model").transformer.state_dict()
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=1e-3)
    record = tmp_path / "second" / "model" / "training"
    assert {path.stem for path in record.glob("*.json")} == {folder.name, "second"}
    assert "--initial" in json.loads((record / "second.json").read_text())["command"]


def test_a_run_goes_on_from_one_with_larger_patches():
    larger, student = trainee_for().module, trainee_for(patch_size=1).module
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    copy_weights(larger, student)
    weights = larger.state_dict()
    for name, weight in student.state_dict().items():
        is_end = "patch_embedding.weight" in name or "proj_out" in name
        assert torch.equal(weight, before[name] if is_end else weights[name])


@pytest.mark.parametrize("layers", [3, 4, 7])
def test_a_run_goes_on_from_one_with_fewer_layers(layers):
    shallow, deep = trainee_for(layers=2).module, trainee_for(layers=layers).module
    with torch.no_grad():
        for weight in shallow.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    copy_weights(shallow, deep)
    x, sigma = torch.randn(2, 4, 3, 4, 4), torch.rand(2, 3)
    prompts = ["a red circle moving right", "a blue square"]
    expected = shallow.velocity(x, sigma, shallow.embed(prompts))
    torch.testing.assert_close(deep.velocity(x, sigma, deep.embed(prompts)), expected)
    with pytest.raises(ValueError, match="no deeper"):
        copy_weights(deep, shallow)


def test_initial_must_be_a_model_of_the_same_size(trained, tmp_path):
    settings, folder = trained
    wrong = settings_for(vae=settings.vae, initial=str(folder), width=96)
    with pytest.raises(ValueError, match="initial must be a model of the same widths, and no deeper"):
        train_student(wrong, tmp_path / "run")
    for place in ("nowhere", tmp_path):
        with pytest.raises(
            ValueError,
            match="initial must be an installed model or the folder of a model or of a finished run, got",
        ):
            train_student(settings_for(vae=settings.vae, initial=str(place)), tmp_path / "run")
