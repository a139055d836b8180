"""Small objects that several test files build on; nothing here is downloaded."""

from __future__ import annotations

import string
import subprocess
import sys
import warnings
from typing import Literal

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def char_tokenizer(
    pad: Literal["own", "eos", "none"] = "own", *, bos: bool = False, chat_template: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character (ids 0 to 3 are special, 100 tokens in all).

    Args:
        pad: the padding token is its own (`<pad>`, id 0), the same as EOS (`<eos>`, id 1), or missing.
        bos: put `<bos>` (id 2) before a text where special tokens are asked for.
        chat_template: give it a chat template, `[role]content` and a newline for each message.
    """
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
        )
    tokens = {"eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    if pad != "none":
        tokens["pad_token"] = "<pad>" if pad == "own" else "<eos>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def said(caplog: pytest.LogCaptureFixture) -> str:
    """All that was logged, a line each."""
    return "\n".join(record.getMessage() for record in caplog.records)


def name_of_ended_process() -> str:
    """The name that a temporary file of a process has which is no longer there."""
    code = "from probe.files.atomic import temporary_name; print(temporary_name())"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def rendered(markdown):
    """The HTML that TensorBoard makes of Markdown."""
    with warnings.catch_warnings():
        # A part of TensorBoard warns of itself as it is imported.
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.plugin_util import markdown_to_safe_html

    return markdown_to_safe_html(markdown)
