"""Prompts to embeddings."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

import ftfy
from diffusers.models.modeling_utils import get_parameter_device
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel


def encode_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, tokens: int
) -> Tensor:
    """Embeddings `[B, tokens, text_dim]`, zero behind each prompt's end, as Wan and Self Forcing feed them.

    Args:
        prompts: one for each element of the batch, at most `tokens` long; an empty one says nothing.
        tokenizer: the encoder's tokenizer.
        encoder: the text encoder.
        tokens: length that the transformer was trained with.
    """
    cleaned = [clean(prompt) for prompt in prompts]
    batch = tokenizer(cleaned, padding="max_length", max_length=tokens, return_tensors="pt")
    device = get_parameter_device(encoder)  # where an offloaded encoder will run, not where it waits
    mask = batch.attention_mask.to(device)
    hidden: Tensor = encoder(batch.input_ids.to(device), attention_mask=mask).last_hidden_state
    embeds: Tensor = hidden * mask.unsqueeze(-1).to(hidden)
    return embeds


def clean(prompt: str) -> str:
    """The prompt as Wan's text encoder was trained to see it: quotes and encoding mended, spaces folded."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split())


def check_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
    """Raise ValueError for a prompt that is empty or longer than the text encoder takes."""
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError("prompt must not be empty")
        if not _is_text(prompt):
            raise ValueError(f"prompt must be text that UTF-8 holds, got {prompt[:60]!r}")
        cleaned = clean(prompt)
        length = len(tokenizer(cleaned).input_ids)
        if not tokenizer(cleaned, add_special_tokens=False).input_ids:
            raise ValueError(f"prompt must hold at least one word, got {prompt[:60]!r}")
        if length > tokens:
            raise ValueError(f"prompt must have at most {tokens} tokens, got {length}: {prompt[:60]!r}")


def _is_text(prompt: str) -> bool:
    """Whether it is free of the single surrogates that stand for bytes of another encoding."""
    return not any("\ud800" <= sign <= "\udfff" for sign in prompt)


def unknown_words(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words of the prompt that the tokenizer has no token for, in order and once each."""
    if not _is_text(prompt):
        return []  # `check_prompts` refuses it
    # Words, and signs that are no punctuation: emoji, for example.
    words = dict.fromkeys(re.findall(r"[\w'-]+|[^\w\s!-/:-@\[-`{-~\u2010-\u2027]", prompt.lower()))
    return [
        word
        for word in words
        if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids
    ]
