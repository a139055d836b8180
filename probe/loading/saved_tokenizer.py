"""A tokenizer exactly as its files say."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors.exceptions import CheckpointError
from probe.limits import TOKENIZER_SECONDS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"


# Whitespace, case, digits, contractions, composed and decomposed accents, scripts, symbols of several bytes.
_TEXTS = (
    "The quick brown fox doesn't jump; it's 1234567 km away, isn't it?",
    "  leading  and   trailing \t tabs\n\nand\r\nnew lines  ",
    "def f(x_1: int) -> str:\n    return f'{x_1 + 2.50:>8}' # 100%\n",
    "\\frac{1}{2} + \\sqrt{9} = $3.5$ ### <answer> [INST] </answer>",
    "caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m \ufb01ne \u00bd \uff21\uff22",
    "\u4f60\u597d\u4e16\u754c \u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \U0001f600 \u200b.",
    "a" * 60 + "0" * 60 + " " * 60 + "!" * 60 + "\n" * 60 + "b",
)
_PARTS = ("normalizer", "pre_tokenizer", "model", "decoder", "post_processor", "added_tokens")
_REMEDY = (
    "save the tokenizer of the training again with `save_pretrained`, into a folder that you name in "
    "checkpoint.tokenizer_path"
)


def load_saved_tokenizer(source: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, encoding as its tokenizer.json does wherever it has one.

    Args:
        source: local folder or hub id.
        options: for `from_pretrained`: `revision`, `local_files_only`, `trust_remote_code`.

    Returns:
        The tokenizer that `AutoTokenizer` finds, or one that is built from tokenizer.json alone where the two are
        not the same.

    Raises:
        CheckpointError: what was loaded encodes otherwise than the file.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    found = AutoTokenizer.from_pretrained(source, **options)
    file = _tokenizer_file(source, options)
    if file is None:
        return found
    saved = Tokenizer.from_file(str(file))
    if not isinstance(found, PreTrainedTokenizerFast) or not type(found).__module__.startswith(
        "transformers."
    ):
        # An author's own code, or a library of another vendor, may be more than the file.
        _refuse_other_tokens(source, type(found).__name__, found, saved)
        return found
    plain = PreTrainedTokenizerFast.from_pretrained(source, **{**options, "trust_remote_code": False})
    differing = _differing_parts(found.backend_tokenizer, plain.backend_tokenizer)
    _refuse_other_tokens(source, type(plain).__name__, plain, saved)
    if not differing:
        return found
    harmless = all(_encoded(found, text) == _encoded(plain, text) for text in _TEXTS)
    logger.log(
        logging.INFO if harmless else logging.WARNING,
        "tokenizer %s: %s differs from tokenizer.json in %s; tokenizer.json is used, as it was saved",
        source,
        type(found).__name__,
        ", ".join(differing),
    )
    return plain


def _tokenizer_file(source: str, options: dict[str, Any]) -> Path | None:
    """tokenizer.json of a folder, or of a hub id in the cache; None where there is none."""
    from transformers.utils import cached_file

    if Path(source).is_dir():
        file = Path(source) / TOKENIZER_FILE
        return file if file.is_file() else None
    where = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    found = cached_file(
        source,
        TOKENIZER_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    return None if found is None else Path(found)


def _differing_parts(one: Tokenizer, other: Tokenizer) -> list[str]:
    """Names of the parts in which two tokenizers differ; truncation and padding are set anew at every call."""
    first, second = (json.loads(tokenizer.to_str()) for tokenizer in (one, other))
    return [part for part in _PARTS if first.get(part) != second.get(part)]


def _refuse_other_tokens(source: str, kind: str, tokenizer: Any, saved: Tokenizer) -> None:
    """Compare with the file: every token's id, and the ids of texts. Tokens may have been added to those it has."""
    vocabulary = tokenizer.get_vocab()
    for token, index in saved.get_vocab(with_added_tokens=True).items():
        if vocabulary.get(token) != index:
            raise CheckpointError(
                f"tokenizer {source}: expected the tokens of its tokenizer.json, found {token!r:.60} with the id "
                f"{vocabulary.get(token)} instead of {index} in {kind}; {_REMEDY}"
            )
    for text, wanted in zip(_TEXTS, _saved_ids(source, saved), strict=True):
        ids = _encoded(tokenizer, text)
        if ids != wanted:
            raise CheckpointError(
                f"tokenizer {source}: expected {text!r:.40} in the {len(wanted)} tokens of its tokenizer.json, found "
                f"{len(ids)} others from {kind}; {_REMEDY}"
            )


def _saved_ids(source: str, saved: Tokenizer) -> list[list[int]]:
    """The ids of the texts; a pattern that never ends is left behind in a thread, as nothing can end it."""
    saved.no_truncation()
    saved.no_padding()
    done: list[list[int]] = []

    def encode() -> None:
        with contextlib.suppress(BaseException):  # a panic of the library is no Exception
            done.extend(e.ids for e in saved.encode_batch(list(_TEXTS), add_special_tokens=False))

    worker = threading.Thread(target=encode, daemon=True)
    worker.start()
    worker.join(TOKENIZER_SECONDS)
    if worker.is_alive():
        raise CheckpointError(
            f"tokenizer {source}: expected a few short texts in tokens within {TOKENIZER_SECONDS:g} seconds, found "
            "a pattern in its tokenizer.json that does not come to an end; name another in checkpoint.tokenizer_path"
        )
    if len(done) != len(_TEXTS):
        raise CheckpointError(
            f"tokenizer {source}: expected a tokenizer.json that turns texts into tokens, found one that fails on "
            "a few short texts; name another in checkpoint.tokenizer_path"
        )
    return done


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
