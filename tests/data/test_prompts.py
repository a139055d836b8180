from __future__ import annotations

import json
import random

import datasets
import numpy as np
import pytest
import torch

from probe.config.batches import BatchConfig
from probe.data.arithmetic import PROMPT_TEMPLATE, arithmetic_rows
from probe.data.named import NAMED_DATASETS, R1_TEMPLATE, default_reward
from probe.data.prompts import check_messages, load_prompts
from probe.data.reward_calls import resolve_rewards
from probe.errors.exceptions import DataError
from tests.support.helpers import char_tokenizer

GSM8K_ROWS = [
    {"question": "What is {3} times 4?", "answer": "3*4=<<3*4=12>>12\n#### 12"},
    {"question": "What is 1,000 + 200?", "answer": "It is 1,200.\n#### 1,200"},
    {"question": "And 5 - 7?", "answer": "#### -2"},
]


@pytest.fixture
def tokenizer():
    return char_tokenizer()


@pytest.fixture
def gsm8k_file(tmp_path):
    path = tmp_path / "test-00000-of-00001.parquet"
    datasets.Dataset.from_list(GSM8K_ROWS).to_parquet(path)
    return str(path)


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_gsm8k_from_a_parquet_file(tokenizer, gsm8k_file):
    examples = load_prompts(BatchConfig(dataset_name="gsm8k", dataset_path=gsm8k_file), tokenizer)
    assert [e.text for e in examples] == [f"Question: {row['question']}\nAnswer:" for row in GSM8K_ROWS]
    assert [dict(e.row) for e in examples] == GSM8K_ROWS
    assert [e.index for e in examples] == [0, 1, 2]
    assert all(e.add_special_tokens for e in examples)


def test_r1_template_and_its_rewards_fit_together(tokenizer, gsm8k_file):
    config = BatchConfig(dataset_name="gsm8k_r1_template", dataset_path=gsm8k_file)
    example = load_prompts(config, tokenizer)[1]
    assert example.text == R1_TEMPLATE.replace("{prompt}", "What is 1,000 + 200?")
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert tag in example.text
    parts = resolve_rewards(default_reward(config))
    completions = ["<think>7</think>\n<answer>1200</answer>", "1200", "<think>1200</think><answer>7</answer>"]
    columns = {"prompts": [example.text] * 3, "answer": [example.row["answer"]] * 3}
    assert [
        sum(x) for x in zip(*(part(completions=completions, **columns) for part in parts), strict=True)
    ] == [
        2.0,
        1.0,
        1.0,
    ]


def test_arithmetic_is_built_in(tokenizer):
    config = BatchConfig(dataset_name="arithmetic", split="train")
    examples = load_prompts(config, tokenizer)
    rows = arithmetic_rows("train")
    assert [e.row for e in examples] == rows
    assert examples[0].text == PROMPT_TEMPLATE.replace("{prompt}", rows[0]["question"])
    assert default_reward(config) == "exact_number"
    sliced = load_prompts(BatchConfig(dataset_name="arithmetic", split="train[2:5]"), tokenizer)
    assert [e.row for e in sliced] == rows[2:5]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv"])
def test_local_files(tokenizer, tmp_path, ending):
    path = tmp_path / f"data.{ending}"
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]
    if ending in ("jsonl", "json"):
        write_jsonl(path, rows)
    else:
        table = datasets.Dataset.from_list(rows)
        table.to_parquet(path) if ending == "parquet" else table.to_csv(path)
    examples = load_prompts(BatchConfig(dataset_name=str(path)), tokenizer)
    assert [(e.text, dict(e.row)) for e in examples] == [("a", rows[0]), ("b", rows[1])]


def test_a_changed_local_file_is_read_anew(tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    config = BatchConfig(dataset_name=write_jsonl(path, [{"prompt": "old"}]))
    assert load_prompts(config, tokenizer)[0].text == "old"
    write_jsonl(path, [{"prompt": "new"}])
    assert load_prompts(config, tokenizer)[0].text == "new"


@pytest.mark.parametrize("readme", [False, True])
def test_folder_of_a_cloned_data_set_reads_its_own_configuration(tokenizer, tmp_path, readme):
    for config_name in ("main", "socratic"):
        for split in ("train", "test"):
            table = datasets.Dataset.from_list([{"question": f"{config_name} {split}", "answer": "#### 1"}])
            table.to_parquet(tmp_path / config_name / f"{split}-00000-of-00001.parquet")
    if readme:
        (tmp_path / "README.md").write_text("# A data set\n")
    config = BatchConfig(dataset_name="gsm8k", dataset_path=str(tmp_path), prompt_template="{prompt}")
    assert [e.text for e in load_prompts(config, tokenizer)] == ["main test"]
    other = BatchConfig(
        dataset_name="gsm8k",
        dataset_path=str(tmp_path),
        dataset_config="socratic",
        split="train",
        prompt_template="{prompt}",
    )
    assert [e.text for e in load_prompts(other, tokenizer)] == ["socratic train"]


def test_plain_folder(tokenizer, gsm8k_file, tmp_path):
    config = BatchConfig(dataset_name="gsm8k", dataset_path=str(tmp_path))
    assert len(load_prompts(config, tokenizer)) == 3
    assert len(load_prompts(BatchConfig(dataset_name=str(tmp_path)), tokenizer)) == 3


def test_folders_of_save_to_disk(tokenizer, tmp_path):
    table = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "both")
    config = BatchConfig(dataset_name=str(tmp_path / "one"), split="test[:1]")
    assert [e.text for e in load_prompts(config, tokenizer)] == ["a"]
    assert [e.text for e in load_prompts(BatchConfig(dataset_name=str(tmp_path / "both")), tokenizer)] == [
        "b"
    ]


def test_hub_data_set_gets_source_and_configuration(tokenizer, monkeypatch):
    seen = []

    def load_dataset(*args, **kwargs):
        seen.append((args, kwargs))
        return datasets.DatasetDict(test=datasets.Dataset.from_list(GSM8K_ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_prompts(BatchConfig(dataset_name="gsm8k"), tokenizer)
    load_prompts(BatchConfig(dataset_name="org/name", dataset_config="x"), tokenizer)
    assert seen == [(("openai/gsm8k", "main"), {}), (("org/name", "x"), {})]


def test_columns_are_found_and_the_answer_is_renamed(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "p", "question": "q", "solution": "s"}])
    named = BatchConfig(dataset_name=path, prompt_column="problem", answer_column="solution")
    example = load_prompts(named, tokenizer)[0]
    assert example.text == "p"
    assert example.row == {"problem": "p", "question": "q", "solution": "s", "answer": "s"}
    assert load_prompts(BatchConfig(dataset_name=path), tokenizer)[0].text == "q"
    assert "answer" not in load_prompts(BatchConfig(dataset_name=path), tokenizer)[0].row


def test_braces_in_prompts_and_templates_are_kept(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "{x} {} {prompt"}])
    config = BatchConfig(dataset_name=path, prompt_template="{json} {prompt} {}")
    assert load_prompts(config, tokenizer)[0].text == "{json} {x} {} {prompt {}"


def test_chat_template(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "hi", "answer": "4"}])
    config = BatchConfig(
        dataset_name=path, use_chat_template=True, system_prompt="Be {brief}.", prompt_template="Q: {prompt}"
    )
    example = load_prompts(config, char_tokenizer(bos=True, chat_template=True))[0]
    assert example.text == "[system]Be {brief}.\n[user]Q: hi\n[assistant]"
    assert not example.add_special_tokens
    assert example.row["prompt"] == [
        {"role": "system", "content": "Be {brief}."},
        {"role": "user", "content": "Q: hi"},
    ]


def test_message_lists_go_through_the_chat_template(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    prefilled = [*messages, {"role": "assistant", "content": "So", "tool": "x"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": messages}, {"prompt": prefilled}])
    tokenizer = char_tokenizer(chat_template=True)
    examples = load_prompts(BatchConfig(dataset_name=path), tokenizer)
    assert [e.text for e in examples] == ["[user]hi\n[assistant]", "[user]hi\n[assistant]So"]
    assert [e.row["prompt"] for e in examples] == [messages, prefilled]
    assert not any(e.add_special_tokens for e in examples)
    system = BatchConfig(dataset_name=path, use_chat_template=True, system_prompt="S")
    assert load_prompts(system, tokenizer)[0].text == "[system]S\n[user]hi\n[assistant]"


def test_max_prompt_tokens(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "abc"}, {"prompt": "abcde"}])
    tokenizer = char_tokenizer(bos=True)
    assert len(load_prompts(BatchConfig(dataset_name=path, max_prompt_tokens=6), tokenizer)) == 2
    with pytest.raises(
        DataError, match=r"at most 5 tokens, found 1 of 2 prompts with more \(prompt 1 has 6\)"
    ):
        load_prompts(BatchConfig(dataset_name=path, max_prompt_tokens=5), tokenizer)


def test_global_state_is_left_alone(tokenizer, gsm8k_file):
    datasets.enable_progress_bars()
    states = (torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate())
    load_prompts(BatchConfig(dataset_name="gsm8k", dataset_path=gsm8k_file), tokenizer)
    assert not datasets.are_progress_bars_disabled()
    with pytest.raises(DataError):
        load_prompts(BatchConfig(dataset_name="gsm8k", dataset_path=gsm8k_file, prompt_column="x"), tokenizer)
    assert not datasets.are_progress_bars_disabled()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_progress_bars_that_were_off_stay_off(tokenizer, gsm8k_file, monkeypatch):
    monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS", raising=False)
    datasets.disable_progress_bars()
    try:
        load_prompts(BatchConfig(dataset_name=gsm8k_file), tokenizer)
        assert datasets.are_progress_bars_disabled()
    finally:
        datasets.enable_progress_bars()


def test_progress_bars_are_off_while_loading_and_back_after_an_error(tokenizer, monkeypatch):
    seen = []

    def load_dataset(*args, **kwargs):
        seen.append(datasets.are_progress_bars_disabled())
        raise OSError("no")

    datasets.enable_progress_bars()
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS", raising=False)
    with pytest.raises(DataError):
        load_prompts(BatchConfig(), tokenizer)
    assert seen == [True]
    assert not datasets.are_progress_bars_disabled()
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")
    with pytest.raises(DataError):
        load_prompts(BatchConfig(), tokenizer)
    assert seen == [True, False]


def test_offline_names_the_remedy(tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"^batch_config\.dataset_name: cannot load 'gsm8k' .*dataset_path"
    ) as info:
        load_prompts(BatchConfig(dataset_name="gsm8k", dataset_config="no-such-config-cached"), tokenizer)
    assert "\n" not in str(info.value)


def test_unknown_name_points_to_the_nearest(tokenizer, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'gsm8' doesn't exist\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"cannot load 'gsm8' from .*doesn't exist on the Hub; check .*; did you mean gsm8k\?"
    ):
        load_prompts(BatchConfig(dataset_name="gsm8"), tokenizer)


def test_missing_local_file(tokenizer, tmp_path):
    with pytest.raises(
        DataError, match=r"dataset_name: expected a file or folder, found nothing at 'no/x.jsonl'"
    ):
        load_prompts(BatchConfig(dataset_name="no/x.jsonl"), tokenizer)
    with pytest.raises(DataError, match=r"dataset_path: expected a file or folder, found nothing at"):
        load_prompts(BatchConfig(dataset_name="gsm8k", dataset_path=str(tmp_path / "x")), tokenizer)


def test_unreadable_local_files(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b" "c"}\n')
    with pytest.raises(DataError, match=r"dataset_name: cannot read .*a.jsonl': .*JSON parse error"):
        load_prompts(BatchConfig(dataset_name=str(path)), tokenizer)
    path.write_text("")
    with pytest.raises(DataError, match=r"expected rows in .*a.jsonl', found an empty file"):
        load_prompts(BatchConfig(dataset_name=str(path)), tokenizer)
    text = tmp_path / "a.txt"
    text.write_text("a")
    with pytest.raises(
        DataError, match=r"dataset_path: expected a file ending in .jsonl, .json, .parquet, .csv"
    ):
        load_prompts(BatchConfig(dataset_name="gsm8k", dataset_path=str(text)), tokenizer)


def test_empty_data_set(tokenizer, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,answer\n")
    with pytest.raises(DataError, match=r"dataset_name: expected rows in .*a\.csv', found none"):
        load_prompts(BatchConfig(dataset_name=str(path)), tokenizer)
    with pytest.raises(
        DataError, match=r"expected at least one row in 'test\[3:3\]' of arithmetic, found none"
    ):
        load_prompts(BatchConfig(dataset_name="arithmetic", split="test[3:3]"), tokenizer)


@pytest.mark.parametrize("split", ["tset", "tset[:2]", "test[x]", "test["])
def test_missing_split(tokenizer, tmp_path, split):
    table = datasets.Dataset.from_list([{"prompt": "a"}])
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "both")
    with pytest.raises(
        DataError, match=r"split: expected one of train, test in .*both, or a slice .*; did you mean test\?"
    ):
        load_prompts(BatchConfig(dataset_name=str(tmp_path / "both"), split=split), tokenizer)


def test_missing_columns(tokenizer, gsm8k_file):
    with pytest.raises(
        DataError, match=r"prompt_column: expected a column 'questions' in .*; did you mean question\?"
    ):
        load_prompts(BatchConfig(dataset_name=gsm8k_file, prompt_column="questions"), tokenizer)
    with pytest.raises(
        DataError, match=r"answer_column: expected a column 'x' in .*, found question, answer$"
    ):
        load_prompts(BatchConfig(dataset_name=gsm8k_file, answer_column="x"), tokenizer)


def test_no_column_that_could_be_the_prompt(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(
        DataError, match=r"prompt_column: expected a column prompt or question in .*, found text; set"
    ):
        load_prompts(BatchConfig(dataset_name=path), tokenizer)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("  \n", "row 1, column 'prompt': expected a prompt, found an empty text"),
        (None, "row 1, column 'prompt': expected a text or a list of messages, found NoneType None"),
    ],
)
def test_prompts_that_are_no_text(tokenizer, tmp_path, prompt, message):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": prompt}])
    with pytest.raises(DataError, match=message):
        load_prompts(BatchConfig(dataset_name=path), tokenizer)


def test_a_number_is_no_prompt(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": 3}])
    with pytest.raises(DataError, match="expected a text or a list of messages, found int 3"):
        load_prompts(BatchConfig(dataset_name=path), tokenizer)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"x: expected a text or a list of messages, found list \[\]"),
        ([{"role": "user"}], "x: expected messages with a text as role and as content, found dict"),
        ([{"role": "user", "content": ["image"]}], "x: expected messages with a text"),
        (["hi"], "x: expected messages with a text as role and as content, found str 'hi'"),
        (["h" * 100], r"found str 'h{76}\.\.\.$"),
    ],
)
def test_malformed_messages(value, message):
    with pytest.raises(DataError, match=message):
        check_messages(value, "x")


def test_messages_do_not_go_into_a_template(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": [{"role": "system", "content": "hi"}]}])
    tokenizer = char_tokenizer(chat_template=True)
    with pytest.raises(
        DataError, match="expected a text to put into the prompt template, found a list of messages"
    ):
        load_prompts(BatchConfig(dataset_name=path, prompt_template="Q {prompt}"), tokenizer)
    with pytest.raises(
        DataError, match=r"expected no system message beside batch_config\.system_prompt, found one"
    ):
        load_prompts(BatchConfig(dataset_name=path, use_chat_template=True, system_prompt="S"), tokenizer)


def test_further_variables_of_the_chat_template(tmp_path):
    tokenizer = char_tokenizer(chat_template=True)
    tokenizer.chat_template = "{{ messages[0].content }}{% if not enable_thinking %} /no_think{% endif %}"
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": [{"role": "user", "content": "Why?"}]}])
    for options, text in (
        ({"enable_thinking": True}, "Why?"),
        ({"enable_thinking": False}, "Why? /no_think"),
    ):
        config = BatchConfig(dataset_name=path, split="train", chat_template_kwargs=options)
        assert load_prompts(config, tokenizer)[0].text == text


def test_system_prompt_without_chat_template(tokenizer):
    with pytest.raises(
        DataError, match=r"system_prompt: expected use_chat_template: true with it, found false"
    ):
        load_prompts(BatchConfig(dataset_name="arithmetic", system_prompt="S"), tokenizer)


def test_tokenizer_without_chat_template(tokenizer):
    with pytest.raises(
        DataError, match=r"row 0, .*: expected a tokenizer with a chat template, found none; use"
    ):
        load_prompts(BatchConfig(dataset_name="arithmetic", use_chat_template=True), tokenizer)


def test_chat_template_that_fails():
    tokenizer = char_tokenizer(chat_template=True)
    tokenizer.chat_template = "{{ raise_exception('only users') }}"
    with pytest.raises(DataError, match="the chat template failed with TemplateError: only users"):
        load_prompts(BatchConfig(dataset_name="arithmetic", use_chat_template=True), tokenizer)


def test_path_that_contradicts_the_name(tokenizer, gsm8k_file):
    with pytest.raises(DataError, match="dataset_path: arithmetic is built in, expected no path with it"):
        load_prompts(BatchConfig(dataset_name="arithmetic", dataset_path=gsm8k_file), tokenizer)
    with pytest.raises(
        DataError, match=r"dataset_path: dataset_name is the file .*, expected no path with it"
    ):
        load_prompts(BatchConfig(dataset_name=gsm8k_file, dataset_path=gsm8k_file), tokenizer)


def test_default_reward():
    assert default_reward(BatchConfig()) == ["gsm8k", "tag_format"]
    assert default_reward(BatchConfig(dataset_name="gsm8k")) == "gsm8k"
    assert default_reward(BatchConfig(dataset_name="gsm8k", reward="a:b")) == "a:b"
    assert default_reward(BatchConfig(dataset_name="x/y", reward=["tag_format"])) == ["tag_format"]
    with pytest.raises(
        DataError, match=r"batch_config.reward: expected a reward, as data set 'x/y' has none"
    ):
        default_reward(BatchConfig(dataset_name="x/y"))


def test_the_default_data_set_is_registered():
    assert BatchConfig().dataset_name in NAMED_DATASETS


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_halves_of_characters_are_replaced(tokenizer, tmp_path, ending):
    r"""JSON can write them (`\\ud83d`), and neither tokenizers nor Arrow take them."""
    rows = [{"prompt": "a \ud83d", "answer": "\udc00 4"}, {"prompt": "\U0001f600", "answer": "5"}]
    path = tmp_path / f"a.{ending}"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows) if ending == "jsonl" else json.dumps(rows)
    )
    examples = load_prompts(BatchConfig(dataset_name=str(path), split="train"), tokenizer)
    assert [e.text for e in examples] == ["a \ufffd", "\U0001f600"]
    assert [e.row["answer"] for e in examples] == ["\ufffd 4", "5"]
    path.write_bytes(path.read_bytes().replace(b"\\ud83d ", b"\xed\xa0\xbd "))
    assert load_prompts(BatchConfig(dataset_name=str(path), split="train"), tokenizer)[0].text == "a \ufffd"
    template = BatchConfig(dataset_name=str(path), split="train", prompt_template="\ud83d{prompt}")
    assert load_prompts(template, tokenizer)[1].text == "\ufffd\U0001f600"
