"""A text encoder small enough to be trained with the student: UMT5 over whole words."""

import logging
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from genstream.conditioning.text import unknown_words
from genstream.training.processes import process

logger = logging.getLogger(__name__)

_SPECIAL = ("<pad>", "</s>", "<unk>")
TEXT_HEADS = 4
_SHOWN_WORDS = 10


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


def tell_unknown_words(
    name: str, texts: Iterable[str], tokenizers: Iterable[PreTrainedTokenizerBase]
) -> None:
    """Warn of words that one of the text encoders does not know; the main process alone does.

    Args:
        name: of the texts, such as "captions".
        texts: to be embedded.
        tokenizers: of the text encoders.
    """
    if not process().is_main_process:
        return
    every = " ".join(texts)
    unknown = list(dict.fromkeys(word for each in tokenizers for word in unknown_words(every, each)))
    if unknown:
        logger.warning(
            "%d words of the %s are unknown to the text encoder, which takes them all alike: %s",
            len(unknown),
            name,
            ", ".join(unknown[:_SHOWN_WORDS]),
        )
