import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from genstream.data import vocabulary
from genstream.data.captions import TRAINING_STYLE, Phrase, describe, phrases
from genstream.data.scene import sample_scene
from genstream.io.model_folder import RESULT_FOLDER
from genstream.training.student import StudentTrainingSettings, train_student
from genstream.training.text import word_tokenizer
from genstream.training.text_encoder import (
    TextTrainee,
    TextTrainingSettings,
    _labels,
    _scene,
    load_text_encoder,
    text_encoder_folder,
    train_text_encoder,
)

TINY = {"width": 16, "layers": 1, "batch_size": 4, "checkpoint_steps": 2, "evaluate_steps": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "text"
    train_text_encoder(TextTrainingSettings(**TINY, total_steps=4), folder)
    return folder


def test_labels_are_those_of_the_object_that_each_word_speaks_of():
    tokenizer = word_tokenizer(vocabulary.words())
    for seed in range(300):
        caption = phrases(sample_scene(seed, "train"), np.random.default_rng(seed))
        text = "".join(phrase.text for phrase in caption)
        labels = _labels(caption, tokenizer, 32)
        assert len(labels) == 32
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        spoken = [
            phrase for phrase in caption for _ in tokenizer(phrase.text, add_special_tokens=False).input_ids
        ]
        assert len(spoken) == len(tokens) - 1  # the end
        for token, phrase, numbers in zip(tokens, spoken, labels, strict=False):
            for (name, words), number in zip(vocabulary.ATTRIBUTES.items(), numbers, strict=True):
                about = phrase if name == "background" else phrase.item
                value = None if about is None else getattr(about, name)
                if number != -100:
                    assert list(words)[number] == value
                if value is not None and name != "motion":
                    # What a word says itself is told.
                    assert token not in words[value] or number != -100
                if name == "background":
                    assert (number == -100) == (phrase.background is None)
        assert all(number == -100 for numbers in labels[len(spoken) :] for number in numbers)


def test_an_attribute_that_a_caption_leaves_out_is_not_learnt():
    tokenizer = word_tokenizer(vocabulary.words())
    item = sample_scene(0, "train").objects[0]
    told = _labels([Phrase(f"a {item.colour} object", item)], tokenizer, 3)[0]
    assert [number == -100 for number in told] == [False, True, True, True, True]


def test_phrases_together_are_the_caption():
    for seed in range(200):
        scene = sample_scene(seed, "eval")
        caption = phrases(scene, np.random.default_rng(seed))
        assert "".join(phrase.text for phrase in caption) == describe(scene, np.random.default_rng(seed))
        assert {phrase.item for phrase in caption} - {None} == set(scene.objects)
    assert TRAINING_STYLE.omitted > 0


def test_scenes_have_as_many_objects_as_asked_for_and_only_evaluation_sees_held_out_ones():
    rng = np.random.default_rng(0)
    for pair in (False, True):
        scenes = [_scene(rng, "train", pair=pair) for _ in range(50)]
        assert {len(scene.objects) for scene in scenes} == {2 if pair else 1}
        assert not any(scene.held_out for scene in scenes)
    assert any(_scene(rng, "eval", pair=True).held_out for _ in range(50))


@pytest.mark.slow
def test_words_learn_what_belongs_together():
    torch.manual_seed(0)
    settings = TextTrainingSettings(width=64, total_steps=1)
    trainee = TextTrainee(settings)
    before = trainee.evaluate()
    optimizer = torch.optim.AdamW(trainee.module.parameters(), lr=3e-3)
    for step in range(200):
        optimizer.zero_grad()
        trainee.loss(step)[0].backward()
        optimizer.step()
    after = trainee.evaluate()
    assert after["loss"] < 0.3 * before["loss"]
    # A word that knew nothing of its neighbours would tell the others' attributes no better than by chance.
    assert min(after[name] for name in ("colour", "shape", "motion")) > 0.75


def test_a_run_is_saved_with_its_record(trained):
    folder = text_encoder_folder(str(trained))
    assert folder == trained / "text_encoder" == text_encoder_folder(str(folder))
    encoder = load_text_encoder(str(trained), 16, 1)
    assert encoder.dtype == torch.float32
    assert {path.name for path in (folder / "training").iterdir()} == {"text.json", "text.csv"}


def test_a_resumed_run_ends_with_the_same_weights(trained, tmp_path, monkeypatch):
    settings = TextTrainingSettings(**TINY, total_steps=4)
    taken = TextTrainee.loss

    def killed(trainee, step):
        if step == 3:
            raise KeyboardInterrupt
        return taken(trainee, step)

    with monkeypatch.context() as context:
        context.setattr(TextTrainee, "loss", killed)
        with pytest.raises(KeyboardInterrupt):
            train_text_encoder(settings, tmp_path / "text")
    train_text_encoder(settings, tmp_path / "text")
    weights = [load_file(run / "text_encoder" / "model.safetensors") for run in (trained, tmp_path / "text")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_model_takes_a_text_encoder_and_leaves_it_as_it_is(trained, build_pipeline, tmp_path):
    build_pipeline().vae.save_pretrained(tmp_path / "vae")
    settings = StudentTrainingSettings(
        vae=str(tmp_path / "vae"),
        text_encoder=str(trained),
        total_steps=2,
        batch_size=2,
        clips=5,
        evaluation_clips=4,
        clip_chunks=6,
        chunk_frames=1,
        window_chunks=1,
        width=48,
        layers=1,
        ffn_width=48,
        text_width=16,
        text_layers=1,
        size_px=64,
        precision="fp32",
    )
    train_student(settings, tmp_path / "student")
    model = tmp_path / "student" / RESULT_FOLDER
    ours = load_file(model / "text_encoder" / "model.safetensors")
    theirs = load_file(trained / "text_encoder" / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name].half()) for name in ours)
    assert {path.stem for path in (model / "training").glob("*.json")} == {"text", "student"}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"text_encoder": "nowhere"}, "text_encoder must be the folder of a text encoder or .* 'nowhere'"),
        ({"text_width": 32}, "text_width 32 and text_layers 1, got 16 and 1"),
        ({"text_layers": 2}, "text_width 16 and text_layers 2, got 16 and 1"),
    ],
)
def test_a_text_encoder_that_does_not_fit_is_refused_before_anything_is_written(
    trained, build_pipeline, tmp_path, changes, error
):
    build_pipeline().vae.save_pretrained(tmp_path / "vae")
    values = {"text_encoder": str(trained), "text_width": 16, "text_layers": 1, **changes}
    settings = StudentTrainingSettings(vae=str(tmp_path / "vae"), **values)
    with pytest.raises(ValueError, match=error):
        train_student(settings, tmp_path / "student")
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"width": 6}, "width must divide by 4, the heads, got 6"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"pairs": 1.5}, r"pairs must be in \[0, 1\], got 1.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
    ],
)
def test_bad_settings(changes, error):
    with pytest.raises(ValueError, match=error):
        TextTrainingSettings(**changes)
