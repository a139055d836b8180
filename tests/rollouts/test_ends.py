"""How responses ended is read from the file, follows from the settings, or is not known; it is never made up."""

from __future__ import annotations

import json

import pytest

from probe.config.batches import BatchConfig
from probe.errors.exceptions import DataError
from probe.rollouts.read import read_rollouts
from tests.support.helpers import char_tokenizer

EOS, CAP = 1, 9
CHARS = char_tokenizer()


def ids(text: str) -> list[int]:
    return CHARS(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def read(tmp_path):
    def read(*rows, stop_strings=(), eos_ids=None):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"prompt": "p", **row}) + "\n" for row in rows))
        settings = {"stop_strings": stop_strings, "eos_ids": eos_ids}
        return read_rollouts(str(path), CHARS, BatchConfig(), CAP, **settings)

    return read


def ends(batch) -> list[tuple[str, bool, bool]]:
    """Of each response: text of its tokens, whether the last one is EOS, whether it was cut off."""
    found = []
    for row, mask, cut in zip(batch.completion_ids, batch.mask, batch.truncated.tolist(), strict=True):
        own = row[mask].tolist()
        found.append((CHARS.decode(own, skip_special_tokens=True), own[-1:] == [EOS], cut))
    return found


SAID = {
    "vLLM, EOS": ({"finish_reason": "stop", "stop_reason": None}, ("ab", True, False)),
    "vLLM, stop string cut off the text": (
        {"finish_reason": "stop", "stop_reason": "#"},
        ("ab#", False, False),
    ),
    "vLLM, stop string kept": ({"finish_reason": "stop", "stop_reason": "b"}, ("ab", False, False)),
    "vLLM, token": ({"finish_reason": "stop", "stop_reason": ids("z")[0]}, ("abz", False, False)),
    "vLLM, cap": ({"finish_reason": "length", "stop_reason": None}, ("ab", False, True)),
    "TGI, EOS": ({"finish_reason": "eos_token"}, ("ab", True, False)),
    "TGI, cap": ({"finish_reason": "length"}, ("ab", False, True)),
    "messages, end": ({"stop_reason": "end_turn"}, ("ab", True, False)),
    "messages, cap": ({"stop_reason": "max_tokens"}, ("ab", False, True)),
    "messages, string": ({"stop_reason": "stop_sequence", "stop_sequence": "#"}, ("ab#", False, False)),
    "a stop string as the reason": ({"stop_reason": "b"}, ("ab", False, False)),
    "words of others": ({"finish_reason": "length_capped"}, ("ab", False, True)),
    "words of others, EOS": ({"stop_reason": "eos_reached"}, ("ab", True, False)),
    "SGLang, EOS": ({"finish_reason": {"type": "stop", "matched": EOS}}, ("ab", True, False)),
    "SGLang, string": ({"finish_reason": {"type": "stop", "matched": "#"}}, ("ab#", False, False)),
    "SGLang, cap": ({"finish_reason": {"type": "length", "length": 2}}, ("ab", False, True)),
    "SGLang, as text": ({"finish_reason": '{"type": "length", "length": 2}'}, ("ab", False, True)),
    "an enumeration": ({"finish_reason": "FinishReason.LENGTH"}, ("ab", False, True)),
    "a truth value": ({"is_truncated": True}, ("ab", False, True)),
    "two that agree": ({"is_truncated": True, "finish_reason": "length"}, ("ab", False, True)),
}


@pytest.mark.parametrize("case", SAID)
def test_the_file_says_how_a_text_ended(read, case):
    columns, expected = SAID[case]
    batch = read({"completion": "ab", **columns})
    assert ends(batch) == [expected]
    assert batch.bias_flags == ("retokenized",)


@pytest.mark.parametrize("reason", ["abort", "content_filter", "something new"])
def test_an_end_that_is_no_decision_of_the_policy_is_not_made_one(read, reason):
    batch = read({"completion": "ab", "finish_reason": reason})
    assert ends(batch) == [("ab", False, False)]
    assert batch.bias_flags == ("retokenized", "ended_without_eos")
    assert batch.doubts == (("no_end",),)


def test_a_word_without_a_meaning_is_no_stop_string(read):
    for row in ({"completion": "ab"}, {"completion_ids": ids("ab")}):
        assert read({**row, "stop_reason": "done"}).doubts == (("no_end",),)
    batch = read({"completion": "ab", "stop_reason": "#"}, stop_strings=["#"])
    assert ends(batch) == [("ab#", False, False)]


def test_stop_strings_of_the_settings_end_texts(read):
    texts = ["ab#", "ab", "abcdefghi", "abcdefgh#", "abcdefg"]
    batch = read(*({"completion": text} for text in texts), stop_strings=["#"])
    assert ends(batch) == [
        ("ab#", False, False),
        ("ab", True, False),
        ("abcdefghi", False, True),
        ("abcdefgh#", False, False),  # the string was completed by the last token allowed
        ("abcdefg", True, False),
    ]
    assert batch.doubts == ((), ("end",), (), (), ("end",))
    assert batch.bias_flags == ("retokenized",)


def test_a_stop_string_that_goes_on_did_not_end_a_text(read):
    batch = read({"completion": "a#b"}, {"completion": "a#"}, stop_strings=["#"])
    assert ends(batch) == [("a#b", True, False), ("a#", False, False)]


def test_without_a_sign_that_stop_strings_are_kept_the_end_is_not_known(read):
    batch = read({"completion": "ab"}, {"completion": "c"}, stop_strings=["#"])
    assert [end[1] for end in ends(batch)] == [False, False]
    assert batch.doubts == (("no_end",), ("no_end",))
    assert "ended_without_eos" in batch.bias_flags
    said = read({"completion": "ab", "truncated": False}, stop_strings=["#"])
    assert said.doubts == (("no_end",),)


def test_which_of_several_eos_ids_ended_a_text_is_a_doubt(read):
    batch = read({"completion": "ab", "finish_reason": "eos_token"}, eos_ids=[9, EOS])
    assert ends(batch) == [("ab", True, False)]  # the tokenizer's own
    assert batch.doubts == (("end",),)
    named = read({"completion": "ab", "finish_reason": "stop", "stop_reason": 9}, eos_ids=[9, EOS])
    assert named.completion_ids[0, -1] == 9
    assert named.doubts == ()


def test_exact_ids_stay_as_they_are(read):
    rows = [{"completion_ids": ids(text)} for text in ("ab#", "ab", "abcdefghi", "abcdefgh#")]
    batch = read(*rows, {"completion_ids": [*ids("ab"), EOS]}, stop_strings=["#"])
    assert batch.truncated.tolist() == [False, False, True, False, False]
    assert batch.lengths.tolist() == [3, 2, 9, 9, 3]
    assert batch.doubts == ((), ("no_end",), (), (), ())
    assert batch.bias_flags == ("ended_without_eos",)


@pytest.mark.parametrize(
    ("columns", "truncated", "missing"),
    [
        ({"finish_reason": "length"}, True, False),
        ({"finish_reason": "eos_token"}, False, True),
        ({"finish_reason": "stop"}, False, True),
        ({"finish_reason": "stop", "stop_reason": "#"}, False, False),
        ({"finish_reason": "abort"}, False, True),
        ({"truncated": False}, False, False),
        ({"is_truncated": True}, True, False),
    ],
)
def test_what_a_file_says_of_exact_ids_without_eos(read, columns, truncated, missing):
    batch = read({"completion_ids": ids("ab"), **columns})
    assert batch.truncated.tolist() == [truncated]
    assert ("ended_without_eos" in batch.bias_flags) == missing
    assert batch.lengths.tolist() == [2]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"is_truncated": True, "finish_reason": "stop"},
            "row 0: expected columns that agree .* is_truncated = True",
        ),
        ({"truncated": True, "is_truncated": False}, "expected columns that agree"),
        ({"is_truncated": "no"}, "row 0: expected is_truncated to be true or false, found 'no'"),
        ({"finish_reason": 3}, "row 0: expected finish_reason to be a text such as stop or length, found 3"),
    ],
)
def test_columns_that_cannot_be_understood(read, columns, message):
    with pytest.raises(DataError, match=message):
        read({"completion": "ab", **columns})
