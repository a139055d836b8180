"""What E's prompts are drawn from."""

from __future__ import annotations

from typing import Any

import pytest

from probe.data.batch import PromptExample
from probe.errors.exceptions import DataError, RolloutError
from probe.live.prompts import MOST_PROMPTS, prompt_examples
from tests.live.test_attach import one_line
from tests.support.helpers import char_tokenizer
from tests.support.live_loops import adamw, attach, full_model


class Rows:
    """A large data set that says which rows were read."""

    def __init__(self, size: int) -> None:
        self.size, self.read = size, []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        self.read.append(index)
        return {"prompt": f"row {index}", "answer": index}

    def __iter__(self) -> Any:
        return (self[i] for i in range(self.size))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts: expected at least one, found an empty list"),
        (iter([]), "prompts: expected at least one, found an empty list"),
        (
            "3+4=",
            "prompts: expected a list of texts or of message lists, found str; put a single one into a list",
        ),
        ({"prompt": "a"}, "found dict; put a single one into a list"),
        (7, "found int"),
        (["a", ""], "prompts[1]: expected a prompt, found an empty text"),
        (["a", " \n"], "prompts[1]: expected a prompt, found an empty text"),
        ([{"question": "a", "answer": 1}], "prompts[0]: expected a column `prompt`, found question, answer"),
        (["a", 3], "prompts[1]: expected a text or a list of messages, found int 3"),
        ([None], "prompts[0]: expected a text or a list of messages, found NoneType None"),
        ([[]], "prompts[0]: expected a text or a list of messages, found list []"),
        ([[{"role": "user"}]], "prompts[0]: expected messages with a text as role and as content"),
        ([[{"role": "user", "content": "a"}]], "prompts[0]"),  # no chat template
    ],
)
def test_bad_prompts(prompts, message):
    model = full_model()
    with pytest.raises(DataError) as error:
        attach(model, adamw(model), prompts)
    assert message in one_line(error)
    if message == "prompts[0]":
        assert "chat template" in str(error.value)


def test_prompts_of_all_kinds():
    tokenizer = char_tokenizer(chat_template=True)
    messages = [{"role": "user", "content": "hi", "name": None}]
    ready = PromptExample("as it is", {"x": 1}, 5)
    rows = ["a", messages, {"prompt": "b", "answer": 2}, {"prompt": messages}, ready]
    found = prompt_examples(rows, tokenizer)
    assert [e.text for e in found] == ["a", "[user]hi\n[assistant]", "b", "[user]hi\n[assistant]", "as it is"]
    assert [e.add_special_tokens for e in found] == [True, False, True, False, True]
    assert found[2].row == {"prompt": "b", "answer": 2}
    assert found[4] is ready
    assert [e.index for e in found] == [0, 1, 2, 3, 5]


def test_a_large_data_set_is_not_read_as_a_whole():
    rows = Rows(50 * MOST_PROMPTS)
    found = prompt_examples(rows, char_tokenizer(), seed=3)
    assert len(found) == len(rows.read) == len(set(rows.read)) == MOST_PROMPTS
    assert found == prompt_examples(Rows(rows.size), char_tokenizer(), seed=3)
    assert found != prompt_examples(Rows(rows.size), char_tokenizer(), seed=4)
    mean, spread = sum(rows.read) / MOST_PROMPTS, rows.size / (12 * MOST_PROMPTS) ** 0.5
    assert abs(mean - rows.size / 2) < 4 * spread  # from all over it
    assert len(prompt_examples(Rows(MOST_PROMPTS), char_tokenizer())) == MOST_PROMPTS


def test_responses_that_do_not_fit(caplog):
    model = full_model()
    watched = attach(model, adamw(model), ["x", "y" * 100], max_new_tokens=29)
    assert [prompt.text for prompt in watched._probe.source.prompts] == ["x"]
    assert "1 of 2 prompts are left out: with a response of 29 tokens they are longer" in caplog.text
    with pytest.raises(RolloutError) as error:
        attach(model, adamw(model), ["y" * 100], max_new_tokens=29)
    expected = (
        "max_new_tokens: expected at most 28 (the model has 128 positions and the longest prompt 100 tokens)"
    )
    assert one_line(error).startswith(expected)
    attach(model, adamw(model), ["x", "y" * 100], max_new_tokens=28)
