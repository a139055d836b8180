"""The demo policy's tokenizer: whole words and numbers of a closed vocabulary, each with the space before it."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    r"""A word-level tokenizer whose vocabulary is what occurs in `texts`.

    A token is a word or a number together with the one space before it, or any other character: concatenated
    tokens give the text back exactly, and a completion that starts with a space tokenises the same alone and after
    its prompt.

    Args:
        texts: texts that hold every token; their order does not matter.

    Returns:
        The tokenizer, with distinct `eos` and `pad` tokens. What is not in `texts` becomes `<unk>`.

    >>> build_tokenizer(["Answer: 7."]).tokenize("Answer: 7.")
    ['Answer', ':', ' 7', '.']
    """
    # Digits and letters are told apart, so "7." or "7:" never become words of their own.
    split = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?[0-9]+|[^A-Za-z0-9]"), behavior="isolated")
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {token: index for index, token in enumerate((PAD, EOS, UNKNOWN, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
