"""A text encoder small enough to be trained with the student: UMT5 over whole words."""

from collections.abc import Sequence

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

_SPECIAL = ("<pad>", "</s>", "<unk>")
TEXT_HEADS = 4


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token for each word; case and punctuation do not matter; "</s>" ends a prompt."""
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(r"-", " "), normalizers.Replace(r"'", "")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_text_encoder(vocabulary_size: int, width: int = 128, layers: int = 2) -> UMT5EncoderModel:
    """A UMT5 encoder with fresh weights."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary_size,
            d_model=width,
            d_kv=width // TEXT_HEADS,
            d_ff=2 * width,
            num_heads=TEXT_HEADS,
            num_layers=layers,
            pad_token_id=0,
            eos_token_id=1,
            dropout_rate=0.0,
        )
    )
