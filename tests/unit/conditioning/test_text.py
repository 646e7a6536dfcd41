import pytest
import torch

from genstream.conditioning.text import check_prompts, clean, encode_prompts, unknown_words
from genstream.training.text import tiny_text_encoder, word_tokenizer

WORDS = ("a", "red", "blue", "circle", "slowly", "moving", "light", "its")


@pytest.fixture(scope="module")
def encode():
    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS)
    encoder = tiny_text_encoder(len(tokenizer), width=16, layers=1).eval()

    def encode(*prompts, tokens=8):
        return encode_prompts(prompts, tokenizer, encoder, tokens)

    return encode


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS)


def test_zero_behind_the_prompt(encode):
    embeds = encode("a red circle", "red")
    assert embeds.shape == (2, 8, 16)
    for row, length in zip(embeds, (4, 2), strict=True):  # the words and the end
        assert (row[:length].abs().sum(-1) > 0).all()
        assert (row[length:] == 0).all()


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("it\u2019s a fox", "it's a fox"),
        ("it&#39;s a fox", "it's a fox"),
        ("  a\n red\t\tfox ", "a red fox"),
        ("a red fox", "a red fox"),
    ],
)
def test_prompts_are_cleaned(prompt, cleaned, encode):
    assert clean(prompt) == cleaned
    assert torch.equal(encode(prompt), encode(cleaned))


def test_padding_and_batch_change_nothing(encode):
    alone = encode("a red circle")
    torch.testing.assert_close(encode("blue", "a red circle moving")[0], encode("blue")[0])
    torch.testing.assert_close(encode("a red circle", "red")[:1], alone)
    torch.testing.assert_close(encode("a red circle", tokens=5), alone[:, :5])


@pytest.mark.parametrize("same", ["A Red Circle", "a red, circle.", " a  red\ncircle!", "a red-circle"])
def test_spelling_that_does_not_matter(encode, same):
    assert torch.equal(encode(same), encode("a red circle"))


@pytest.mark.parametrize("other", ["red a circle", "a red", "a blue circle", "a red circle circle"])
def test_order_and_words_matter(encode, other):
    assert not torch.allclose(encode(other), encode("a red circle"))


def test_one_token_for_each_word(tokenizer):
    for word in WORDS:
        ids = tokenizer(word).input_ids
        assert len(ids) == 2
        assert tokenizer.decode(ids, skip_special_tokens=True) == word
    assert len(set(tokenizer.get_vocab().values())) == len(WORDS) + 3


def test_tokenizer_survives_a_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded("a red circle, elephant").input_ids == tokenizer("a red circle, elephant").input_ids


@pytest.mark.parametrize("empty", ["", " ", "\n\t"])
def test_empty_prompt(tokenizer, empty):
    with pytest.raises(ValueError, match="prompt must not be empty"):
        check_prompts(["a", empty], tokenizer, 8)


def test_long_prompt(tokenizer):
    check_prompts(["red " * 7], tokenizer, 8)
    with pytest.raises(ValueError, match="prompt must have at most 8 tokens, got 9: 'red red"):
        check_prompts(["red " * 8], tokenizer, 8)


def test_unknown_words(tokenizer):
    assert unknown_words("A red elephant, a blue Zebra, an elephant.", tokenizer) == [
        "elephant",
        "zebra",
        "an",
    ]
    assert unknown_words("a light-red circle", tokenizer) == []
    assert unknown_words("a red circle \U0001f680!", tokenizer) == ["\U0001f680"]
    assert unknown_words("a red circle, (a); a: \u201cred\u201d \u2013 a 'red' circle...?!", tokenizer) == []
