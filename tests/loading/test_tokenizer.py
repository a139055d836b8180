"""The tokenizer is the one that was saved, whatever class `AutoTokenizer` takes for the model beside it."""

from __future__ import annotations

import json
import logging

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from probe.demo.tokenizer import build_tokenizer
from probe.errors.exceptions import CheckpointError
from probe.loading.saved_tokenizer import load_saved_tokenizer
from tests.support.helpers import char_tokenizer
from tests.support.tiny_models import tiny_config

TEXTS = ("7 pears + 12 figs = ?", "Isn't it?\n\n  yes", "x" * 300)
SPECIAL = {"<pad>": 0, "<eos>": 1}


def bytes_tokenizer(*merges: tuple[str, str]) -> Qwen2Tokenizer:
    """A tokenizer of transformers' own class: bytes, and a few merges."""
    symbols = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocab = {token: index for index, token in enumerate(symbols)}
    return Qwen2Tokenizer(
        vocab=vocab, merges=list(merges), unk_token=None, eos_token="<eos>", pad_token="<pad>"
    )


def words(normalizer=None, pre_tokenizer=None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with parts of one's own."""
    known = ("7", "pears", "figs", "Pears", "+", "=", "?", "12", " ", "Isn", "'", "t", "it", "yes", "<unk>")
    vocab = {**SPECIAL, **{token: 2 + index for index, token in enumerate(known)}}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer or pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def own_bytes(**parts) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer that differs from the class of its model in some parts only."""
    backend = bytes_tokenizer(("p", "e"), ("a", "r")).backend_tokenizer
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def saved(folder, tokenizer):
    tiny_config().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "tokenizer",
    [
        char_tokenizer(),
        build_tokenizer(["7 pears + 12 figs = ?", "Isn't it?", " yes\n\nxxx"]),
        words(),
        words(normalizers.Lowercase()),
        words(pre_tokenizer=pre_tokenizers.Whitespace()),
        own_bytes(normalizer=normalizers.Lowercase()),
        own_bytes(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        own_bytes(pre_tokenizer=pre_tokenizers.ByteLevel(use_regex=False, add_prefix_space=False)),
    ],
)
def test_a_tokenizer_of_ones_own_beside_a_qwen2_model(tmp_path, tokenizer):
    loaded = load_saved_tokenizer(str(saved(tmp_path, tokenizer)), local_files_only=True)
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"] == file.encode(text).ids
        assert loaded.decode(loaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert loaded.eos_token_id == tokenizer.eos_token_id
    assert loaded.pad_token_id == tokenizer.pad_token_id
    assert len(loaded) == len(tokenizer)


def test_other_tokens_are_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        load_saved_tokenizer(str(saved(tmp_path, char_tokenizer())))
    assert "Qwen2Tokenizer differs from tokenizer.json in" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING


def test_the_class_of_the_model_stays_where_it_is_the_same(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="probe"):
        loaded = load_saved_tokenizer(str(saved(tmp_path, bytes_tokenizer(("p", "e"), ("a", "r")))))
    assert type(loaded) is Qwen2Tokenizer
    assert caplog.text == ""


def test_added_tokens_and_template_come_along(tmp_path):
    tokenizer = char_tokenizer(chat_template=True)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    loaded = load_saved_tokenizer(str(saved(tmp_path, tokenizer)))
    text = "<think>1+1</think><tool>2"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == "<think>1+1</think>2"


def test_bos_is_put_where_the_file_puts_it(tmp_path):
    loaded = load_saved_tokenizer(str(saved(tmp_path, char_tokenizer(bos=True))))
    assert loaded("7")["input_ids"] == char_tokenizer(bos=True)("7")["input_ids"]
    assert loaded("7")["input_ids"][0] == 2


def test_truncation_in_the_file_does_not_count(tmp_path):
    tokenizer = char_tokenizer()
    saved(tmp_path, tokenizer)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert (
        load_saved_tokenizer(str(tmp_path))("7 + 8 = ?")["input_ids"] == tokenizer("7 + 8 = ?")["input_ids"]
    )


def test_without_a_tokenizer_file_there_is_nothing_to_compare(tmp_path):
    saved(tmp_path, bytes_tokenizer(("p", "e")))
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\np e\n")
    assert (
        load_saved_tokenizer(str(tmp_path))("pear")["input_ids"]
        == bytes_tokenizer(("p", "e"))("pear")["input_ids"]
    )


def _one_off(self, text, **options):
    return {"input_ids": [5 for _ in text]}


def test_what_encodes_otherwise_than_the_file_is_refused(tmp_path, monkeypatch):
    saved(tmp_path, char_tokenizer())
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", _one_off)
    with pytest.raises(
        CheckpointError, match=r"expected .* tokens of its tokenizer\.json, .*checkpoint\.tokenizer_path"
    ):
        load_saved_tokenizer(str(tmp_path))


def test_what_numbers_its_tokens_otherwise_than_the_file_is_refused(tmp_path, monkeypatch):
    saved(tmp_path, char_tokenizer())
    monkeypatch.setattr(PreTrainedTokenizerFast, "get_vocab", lambda self: {"<pad>": 3})
    with pytest.raises(
        CheckpointError, match=r"expected the tokens of its tokenizer\.json, found .* with the id"
    ):
        load_saved_tokenizer(str(tmp_path))


class _AuthorsOwn(PreTrainedTokenizerFast):
    """A class outside transformers."""


def test_an_authors_own_class_is_kept_where_it_encodes_the_same(tmp_path, monkeypatch):
    saved(tmp_path, char_tokenizer())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: _AuthorsOwn.from_pretrained(*a))
    assert type(load_saved_tokenizer(str(tmp_path))) is _AuthorsOwn
