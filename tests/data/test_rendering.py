"""Conversations are rendered as a training rendered them: options, tools and continuation of the chat template."""

from __future__ import annotations

import json

import datasets
import pytest
from trl.data_utils import apply_chat_template

from probe.config.batches import BatchConfig
from probe.data.prompts import load_prompts
from probe.data.rendering import template_options
from probe.errors.exceptions import DataError
from tests.support.helpers import CHAT_TEMPLATE, char_tokenizer

TEMPLATE = (
    "{% if tools %}<{% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}>{% endif %}"
    + CHAT_TEMPLATE
    + "{% if add_generation_prompt and thinking is defined and not thinking %}(no){% endif %}"
)
USER = [{"role": "user", "content": "hi"}]
PREFILLED = [*USER, {"role": "assistant", "content": "So"}]
SCHEMA = {
    "type": "function",
    "function": {"name": "lookup", "description": "d", "parameters": {"type": "object"}},
}


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


@pytest.fixture
def tokenizer():
    found = char_tokenizer(chat_template=True)
    found.chat_template = TEMPLATE
    return found


def load(tokenizer, tmp_path, rows, **settings):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        e.text
        for e in load_prompts(BatchConfig(dataset_name=str(path), split="train", **settings), tokenizer)
    ]


@pytest.mark.parametrize("prompt", [USER, PREFILLED])
@pytest.mark.parametrize("options", [None, {"thinking": False}])
@pytest.mark.parametrize("tools", [None, [SCHEMA], ["tests.data.test_rendering:add"]])
def test_settings_render_as_trl_does(tokenizer, tmp_path, prompt, options, tools):
    functions = [add] if tools and isinstance(tools[0], str) else tools
    expected = apply_chat_template({"prompt": prompt}, tokenizer, functions, **(options or {}))["prompt"]
    found = load(tokenizer, tmp_path, [{"prompt": prompt}], chat_template_kwargs=options, tools=tools)
    assert found == [expected]


def test_columns_of_a_row_come_before_the_settings(tokenizer, tmp_path):
    rows = [
        {"prompt": USER, "chat_template_kwargs": {"thinking": True}, "tools": json.dumps([SCHEMA])},
        {"prompt": USER, "chat_template_kwargs": {"thinking": None}, "tools": None},
    ]
    found = load(tokenizer, tmp_path, rows, chat_template_kwargs={"thinking": False})
    assert found == ["<lookup >[user]hi\n[assistant]", "[user]hi\n[assistant](no)"]
    table = datasets.Dataset.from_list([{"prompt": USER, "tools": [SCHEMA]}])
    table.to_parquet(tmp_path / "a.parquet")
    config = BatchConfig(dataset_name=str(tmp_path / "a.parquet"), split="train")
    assert load_prompts(config, tokenizer)[0].text == "<lookup >[user]hi\n[assistant]"


def test_a_question_with_a_chat_template_takes_the_options_too(tokenizer, tmp_path):
    settings = {"use_chat_template": True, "chat_template_kwargs": {"thinking": False}}
    assert load(tokenizer, tmp_path, [{"prompt": "hi"}], **settings) == ["[user]hi\n[assistant](no)"]


def test_a_final_message_of_the_assistant_is_continued_or_followed_by_a_new_turn(tokenizer, tmp_path):
    for value, text in ((None, "So"), (True, "So"), (False, "So\n[assistant]")):
        found = load(tokenizer, tmp_path, [{"prompt": PREFILLED}], continue_final_message=value)
        assert found == [f"[user]hi\n[assistant]{text}"]


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (
            {"prompt": "hi"},
            {"chat_template_kwargs": {"thinking": False}},
            "found texts in .*use_chat_template: true",
        ),
        ({"prompt": USER, "tools": "{x"}, {}, "row 0, tools: expected JSON, found '{x'"),
        ({"prompt": USER, "tools": [3]}, {}, r"row 0, tools: expected a list of JSON schemas, found \[3\]"),
        (
            {"prompt": USER, "chat_template_kwargs": "[1]"},
            {},
            "row 0, chat_template_kwargs: expected a mapping",
        ),
        ({"prompt": USER}, {"tools": ["tests.data.test_rendering:nothing"]}, "batch_config.tools: "),
        ({"prompt": USER}, {"tools": ["no_such_module_at_all:f"]}, "batch_config.tools: "),
        (
            {"prompt": USER},
            {"tools": [3]},
            "batch_config.tools: expected JSON schemas or module:function, found 3",
        ),
    ],
)
def test_what_cannot_be_rendered_is_one_line(tokenizer, tmp_path, row, settings, message):
    with pytest.raises(DataError, match=message):
        load(tokenizer, tmp_path, [row], **settings)


def test_a_turn_that_calls_tools_need_not_say_anything(tokenizer, tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = {"role": "tool", "name": "add", "content": "3"}
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ message['content'] }}",
        "{{ message['content'] or '' }}{% for c in message.tool_calls %}{{ c.function.arguments }}{% endfor %}",
    )
    found = load(tokenizer, tmp_path, [{"prompt": [*USER, calling, answer]}])
    assert found == ["[user]hi[assistant]{'a': 1}[tool]3[assistant]"]


def test_options_are_the_names_that_a_template_is_not_given_by_itself():
    assert template_options(TEMPLATE) == ("thinking",)
    marked = (
        "{% for m in messages %}{%- generation %}{{ m.content }}{% endgeneration -%}{% break %}{% endfor %}"
    )
    assert template_options(marked + "{% set x = 1 %}{{ x + eos_token + strftime_now('%d') }}") == ()
    assert template_options(marked + "{{ date_string }}") == ("date_string",)
    assert template_options("{% no such tag %}") == ()
