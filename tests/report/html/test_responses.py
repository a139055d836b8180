"""The tokens of U on their way to a page."""

from __future__ import annotations

import json
import math

import pytest

from probe.report.html.responses import response_data
from probe.text import printable


@pytest.fixture
def document(logged):
    return logged.document


def test_every_token_has_its_numbers(document):
    data = response_data(document)
    assert data["attributed"]
    assert data["left_out"] == 0
    assert len(data["responses"]) == 16
    tokens = {one["index"]: one for one in document["tokens"]["U"]}
    for one in data["responses"]:
        own = tokens[one["i"]]
        assert [data["texts"][k] for k in one["t"]] == [printable(text) for text in own["text"]]
        for name, column in (
            ("c", "contribution_deltaH1_tok"),
            ("h", "entropy_before"),
            ("l", "logprob_before"),
        ):
            assert one[name] == pytest.approx(own[column], rel=5e-3)
    sizes = [abs(one["contribution"]) for one in data["responses"]]
    assert sizes == sorted(sizes, reverse=True)
    assert data["largest"] == max(abs(c) for one in data["responses"] for c in one["c"])


def test_what_tokens_add_is_what_their_response_adds(document):
    for one in response_data(document)["responses"]:
        size = sum(abs(c) for c in one["c"])
        assert math.fsum(one["c"]) == pytest.approx(one["contribution"], abs=1e-2 * size)


def test_of_too_many_tokens_the_largest_responses_stay(document):
    whole = response_data(document)["responses"]
    most = whole[0]["n"] + whole[1]["n"]
    data = response_data(document, most)
    assert [one["i"] for one in data["responses"]] == [one["i"] for one in whole[:2]]
    assert data["left_out"] == 14
    assert data["tokens"] == most


def test_one_response_of_too_many_tokens_is_cut(document):
    data = response_data(document, 2)
    assert len(data["responses"]) == 1
    assert {len(data["responses"][0][name]) for name in "tchl"} == {2}


def test_without_texts_there_are_numbers(document):
    del document["sequences"]["prompts"]
    for one in document["sequences"]["U"]:
        del one["completion"], one["completion_ids"]
    for one in document["tokens"]["U"]:
        del one["id"], one["text"]
    data = response_data(document)
    assert data["texts"] == data["prompts"] == []
    assert all(
        "t" not in one and "text" not in one and len(one["c"]) == one["n"] for one in data["responses"]
    )


def test_without_tokens_there_are_responses(document):
    del document["tokens"]
    data = response_data(document)
    assert all(one["text"] and "c" not in one for one in data["responses"])
    assert data["largest"] == 0.0


def test_without_an_attribution_responses_keep_their_order(document):
    for one in document["sequences"]["U"]:
        for name in [name for name in one if name.startswith("contribution")]:
            del one[name]
    data = response_data(document)
    assert not data["attributed"]
    assert [one["i"] for one in data["responses"]] == list(range(16))


def test_a_log_without_sequences_has_none(document):
    del document["sequences"]
    assert response_data(document) is None


def test_unprintable_texts_are_escapes(document):
    document["tokens"]["U"][0]["text"][0] = "\x1b[31m\u202e\ud83d"
    document["sequences"]["prompts"][document["sequences"]["U"][0]["prompt"]]["text"] = "\u200f\x07"
    data = response_data(document)
    assert "\\x1b[31m\\u202e\\ud83d" in data["texts"]
    assert "\\u200f\\x07" in data["prompts"]
    json.dumps(data, allow_nan=False).encode("utf-8")
