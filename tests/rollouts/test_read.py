from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from probe.config.batches import BatchConfig
from probe.data.batch import RolloutBatch
from probe.errors.exceptions import DataError, LogError, RolloutError
from probe.estimators.advantages import group_advantages
from probe.results.diagnostics import doubt_counts
from probe.rollouts.read import read_rollouts
from probe.rollouts.tables import read_table
from probe.rollouts.write import write_rollouts
from tests.support.helpers import char_tokenizer

EOS = 1
CONFIG = BatchConfig()
CHARS = char_tokenizer()


def ids(text: str) -> list[int]:
    return CHARS(text, add_special_tokens=False)["input_ids"]


def write(path, rows) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path, tokenizer=CHARS, config=CONFIG, cap=100, **settings) -> RolloutBatch:
    return read_rollouts(path, tokenizer, config, cap, **settings)


def tokens(batch: RolloutBatch) -> list[list[int]]:
    return [row[own].tolist() for row, own in zip(batch.completion_ids, batch.mask, strict=True)]


def trl_rows(kind="grpo", step=7, weights=(1.0, 1.0)) -> list[dict]:
    """Rows as TRL logs them: a column for each reward function, and the advantage in float32."""
    prompts = ["1+1=", "1+1=", "2+2=", "2+2=", "3+3=", "3+3="]
    completions = ["2", "3", "4", " four", "6", "6"]
    exact, form = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.0, 0.25, 0.5, 0.5]
    total = torch.tensor([weights[0] * a + weights[1] * b for a, b in zip(exact, form, strict=True)])
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    advantages = group_advantages(total, group, kind).float().tolist()
    rows = zip(prompts, completions, exact, form, advantages, strict=True)
    return [
        {"step": step, "prompt": p, "completion": c, "exact": e, "form_reward": f, "advantage": a}
        for p, c, e, f, a in rows
    ]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_completions_that_trl_logs(tmp_path, ending, kind, caplog):
    with caplog.at_level(logging.INFO):
        batch = read(write(tmp_path / f"completions_00007.{ending}", trl_rows(kind)))
    assert batch.prompts == ("1+1=", "1+1=", "2+2=", "2+2=", "3+3=", "3+3=")
    assert batch.completions == ("2", "3", "4", " four", "6", "6")
    assert batch.prompt_ids[0] == tuple(ids("1+1="))
    assert tokens(batch)[3] == [*ids(" four"), EOS]
    assert batch.lengths.tolist() == [2, 2, 2, 6, 2, 2]
    assert not batch.truncated.any()
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.rewards.tolist() == [1.25, 0.5, 1.0, 0.25, 1.5, 1.5]
    assert batch.rewards.dtype == torch.float64
    torch.testing.assert_close(
        batch.advantages, group_advantages(batch.rewards, batch.group, kind), rtol=1e-6, atol=1e-6
    )
    assert batch.old_logprobs is None
    assert batch.bias_flags == ("retokenized",)
    assert batch.source.endswith(f"completions_00007.{ending}")
    assert "the reward is the sum of exact, form_reward" in caplog.text


def test_conversations_that_trl_logs(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": "hi", "name": None}],
            "completion": [{"role": "assistant", "content": text}],
            "reward": 1.0,
        }
        for text in ("yes", "no")
    ]
    batch = read(write(tmp_path / "a.parquet", rows), char_tokenizer(bos=True, chat_template=True))
    assert batch.prompts == ("[user]hi\n[assistant]",) * 2
    assert batch.prompt_ids[0] == tuple(ids("[user]hi\n[assistant]"))
    assert batch.completions == ("yes", "no")
    assert batch.group.tolist() == [0, 0]
    assert batch.rows[0] == {"prompt": [{"role": "user", "content": "hi"}]}


def test_special_tokens_before_a_text_prompt_as_in_sampling(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "c"}])
    assert read(path, char_tokenizer(bos=True)).prompt_ids == ((2, *ids("ab")),)
    assert tokens(read(path, char_tokenizer(bos=True))) == [[*ids("c"), EOS]]


@pytest.mark.parametrize("pad", ["own", "eos", "none"])
def test_eos_counts_whatever_the_padding_token_is(tmp_path, pad):
    rows = [{"prompt": "a", "completion": "bcd"}, {"prompt": "a", "completion": "b"}]
    batch = read(write(tmp_path / "a.jsonl", rows), char_tokenizer(pad))
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert tokens(batch) == [[*ids("bcd"), EOS], [*ids("b"), EOS]]


def test_truncation_by_the_cap(tmp_path):
    rows = [{"prompt": "a", "completion": text} for text in ("bcd", "bcde", "bc", "", "bcd<eos>")]
    batch = read(write(tmp_path / "a.jsonl", rows), cap=4)
    assert batch.truncated.tolist() == [False, True, False, False, False]
    assert batch.lengths.tolist() == [4, 4, 3, 1, 4]
    assert tokens(batch)[1] == ids("bcde")
    assert batch.bias_flags == ("retokenized",)


def test_responses_longer_than_the_cap_are_told(tmp_path, caplog):
    path = write(
        tmp_path / "a.jsonl", [{"prompt": "a", "completion": "bcde"}, {"prompt": "a", "completion": "b"}]
    )
    batch = read(path, cap=3)
    assert batch.truncated.tolist() == [True, False]
    assert batch.bias_flags == ("retokenized", "unknown_cap")
    assert "1 of 2 responses have more than generation.max_new_tokens = 3 tokens" in caplog.text


def test_truncation_by_its_column(tmp_path):
    rows = [
        {"prompt": "a", "completion": "bcde", "truncated": False},
        {"prompt": "a", "completion": "b", "truncated": True},
    ]
    batch = read(write(tmp_path / "a.jsonl", rows), cap=2)
    assert batch.truncated.tolist() == [False, True]
    assert tokens(batch) == [[*ids("bcde"), EOS], ids("b")]
    assert batch.bias_flags == ("retokenized",)


def test_exact_ids_are_taken_as_they_are(tmp_path):
    rows = [
        {"prompt": "a", "completion": "bc", "prompt_ids": [9, 9], "completion_ids": [20, EOS]},
        {"prompt": "a", "completion": "b", "prompt_ids": [9], "completion_ids": [20, 21, 22]},
        {"prompt": "a", "completion": "b", "prompt_ids": [9], "completion_ids": [0, 0, EOS]},
        {"prompt": "a", "completion": "", "prompt_ids": [9], "completion_ids": []},
    ]
    batch = read(write(tmp_path / "a.parquet", rows), cap=3)
    assert batch.prompt_ids == ((9, 9), (9,), (9,), (9,))
    assert tokens(batch) == [[20, EOS], [20, 21, 22], [0, 0, EOS], []]
    assert batch.truncated.tolist() == [False, True, False, False]
    assert batch.bias_flags == ()


def test_ids_that_the_policy_cannot_have_sampled_are_refused(tmp_path):
    row = {"prompt": "a", "completion": "b", "completion_ids": [20, EOS]}
    for padding in ([EOS, EOS], [0], [21]):
        padded = [row, {**row, "completion_ids": [20, EOS, *padding]}]
        with pytest.raises(DataError, match=r"row 1: expected completion_ids to end with their first EOS"):
            read(write(tmp_path / "a.jsonl", padded))
    for name in ("completion_mask", "tool_mask"):
        for mask in ([1, 0], [1]):
            with pytest.raises(DataError, match=f"expected {name} to be 1 for each of the 2"):
                read(write(tmp_path / "a.jsonl", [{**row, name: mask}]))
        assert read(write(tmp_path / "a.jsonl", [{**row, name: [1, 1]}])).bias_flags == ()


def test_responses_without_an_end_are_flagged(tmp_path):
    row = {"prompt": "a", "completion": "b", "completion_ids": [20, 21]}
    assert read(write(tmp_path / "a.jsonl", [row]), cap=9).bias_flags == ("ended_without_eos",)
    assert read(write(tmp_path / "a.jsonl", [row]), cap=2).bias_flags == ()
    assert read(write(tmp_path / "a.jsonl", [{**row, "truncated": False}]), cap=9).bias_flags == ()


def test_exact_ids_need_no_chat_template(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [
            {"role": "assistant", "content": "", "tool_calls": "x"},
            {"role": "tool", "content": "4"},
        ],
        "prompt_ids": ids("<hi>"),
        "completion_ids": [*ids("call"), EOS],
    }
    batch = read(write(tmp_path / "a.jsonl", [row]))
    assert batch.prompts == ("<hi>",)
    assert batch.completions == ("call",)


def test_old_logprobs(tmp_path):
    rows = [
        {"prompt": "a", "completion": "bc", "completion_ids": [20, 21, EOS], "old_logprobs": [-0.5, 0, -2.0]},
        {"prompt": "a", "completion": "b", "completion_ids": [EOS], "old_logprobs": [-0.125]},
    ]
    batch = read(write(tmp_path / "a.jsonl", rows))
    assert batch.old_logprobs.dtype == torch.float64
    assert batch.old_logprobs.tolist() == [[-0.5, 0.0, -2.0], [-0.125, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        ([-1.0], r"expected old_logprobs for 2 tokens, found 1; add a column completion_ids"),
        ([-1.0, math.nan], r"expected old_logprobs to be finite and not above 0, found nan"),
        ([-1.0, -math.inf], r"expected old_logprobs to be finite and not above 0, found -inf"),
        ([-1.0, 0.5], r"expected old_logprobs to be finite and not above 0, found 0.5"),
        (["-1", -1.0], r"expected old_logprobs to be a list of numbers, found \['-1'"),
        (None, r"expected old_logprobs to be a list of numbers, found None"),
    ],
)
def test_bad_old_logprobs(tmp_path, logprobs, message):
    rows = [
        {"prompt": "a", "completion": "b", "old_logprobs": [-1.0, -1.0]},
        {"prompt": "a", "completion": "b", "old_logprobs": logprobs},
    ]
    with pytest.raises(DataError, match=rf"a\.jsonl, row 1: {message}"):
        read(write(tmp_path / "a.jsonl", rows))


def test_groups_are_runs_of_the_same_prompt(tmp_path):
    rows = [{"prompt": prompt, "completion": "x"} for prompt in "aabbaac"]
    assert read(write(tmp_path / "a.jsonl", rows)).group.tolist() == [0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("name", ["group", "prompt_id"])
@pytest.mark.parametrize(("values", "expected"), [([5, -2, 5], [5, -2, 5]), (["x", "y", "x"], [0, 1, 0])])
def test_explicit_groups(tmp_path, name, values, expected):
    rows = [{"prompt": "a", "completion": "x", name: value} for value in values]
    assert read(write(tmp_path / "a.jsonl", rows)).group.tolist() == expected


@pytest.mark.parametrize("value", [None, True, 0.5])
def test_bad_group(tmp_path, value):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "x", "group": value}])
    with pytest.raises(DataError, match=f"row 0: expected group to be an integer or a text, found {value}"):
        read(path)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_last_of_several_steps_is_used(tmp_path, ending, caplog):
    rows = [*trl_rows(step=10), *trl_rows(step=9)[:2]]
    with caplog.at_level(logging.INFO):
        batch = read(write(tmp_path / f"a.{ending}", [*trl_rows(step=2), *rows]))
    assert len(batch) == 6
    assert "holds 3 steps: the 6 rows of step 10 are used" in caplog.text
    with pytest.raises(DataError, match=r"row 1: expected a number as step, found None"):
        read(write(tmp_path / f"b.{ending}", [rows[0], {**rows[1], "step": None}]))


def test_messages_name_the_row_of_the_file_also_after_a_choice_of_steps(tmp_path):
    rows = [{"prompt": "a", "completion": "x", "step": 1}, {"prompt": "a", "completion": 3, "step": 2}]
    with pytest.raises(
        DataError, match=r"row 1, completion: expected a text or a list of messages, found int 3"
    ):
        read(write(tmp_path / "a.jsonl", rows))


def test_the_reward_column_comes_before_other_numbers(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "reward": 2, "other": 3.0}]
    assert read(write(tmp_path / "a.jsonl", rows)).rewards.tolist() == [2.0]


def test_named_reward_columns(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "reward": 2, "x": 3.0, "id": 1, "advantage": 0.3}]
    path = write(tmp_path / "a.jsonl", rows)
    assert read(path, config=BatchConfig(reward_columns=["x", "id"])).rewards.tolist() == [4.0]
    with pytest.raises(
        DataError, match=r"reward_columns: expected a column 'rewards' in .*; did you mean reward\?"
    ):
        read(path, config=BatchConfig(reward_columns=["rewards"]))


def test_no_reward(tmp_path):
    row = {
        "prompt": "a",
        "completion": "b",
        "step": 1,
        "answer": 4,
        "passed": True,
        "text": "c",
        "none": None,
    }
    row |= {"advantage": 0.5, "completion_length": 3, "__index_level_0__": 1}
    assert read(write(tmp_path / "a.jsonl", [row])).rewards is None


def test_reward_functions_that_do_not_apply_are_left_out(tmp_path):
    rows = [
        {"prompt": "a", "completion": "b", "x": None, "y": 1.0},
        {"prompt": "a", "completion": "b", "x": 2.0},
    ]
    rows[1]["y"] = math.nan
    path = write(tmp_path / "a.parquet", rows)
    assert read(path, config=BatchConfig(reward_columns=["x", "y"])).rewards.tolist() == [1.0, 2.0]


def test_of_several_columns_that_may_be_the_reward_none_is_chosen(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "x": 1.0, "y": 2.0}])
    with pytest.raises(DataError, match=r"expected one column with the reward .* found x, y; name those"):
        read(path)
    assert read(path, part="E").rewards is None


def test_integers_that_no_float_can_hold(tmp_path):
    row = {"prompt": "a", "completion_ids": [5, EOS]}
    for name, value, message in (
        ("reward", 10**400, "row 0: expected a finite reward, found reward = 1000"),
        ("advantage", -(10**400), "row 0: expected a finite number as advantage, found -1000"),
        ("old_logprobs", [-(10**400), -1.0], "expected old_logprobs to be finite"),
        ("loss_tokens", 10**400, "expected one positive number in all rows"),
    ):
        with pytest.raises(DataError, match=message):
            read(write(tmp_path / "a.jsonl", [{**row, name: value}]))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (None, math.nan, "expected a finite reward, found x = None, y = nan; leave its whole group out"),
        (math.inf, 1.0, "expected a finite reward, found x = inf, y = 1.0"),
        ("1", 1.0, "expected a number as x, found '1'"),
        (True, 1.0, "expected a number as x, found True"),
    ],
)
def test_bad_rewards(tmp_path, x, y, message):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "x": x, "y": y}])
    with pytest.raises(DataError, match=f"row 0: {message}"):
        read(path, config=BatchConfig(reward_columns=["x", "y"]))


def test_logged_advantages_are_the_truth_whatever_the_columns_of_rewards(tmp_path):
    """Weights, a column of the user's own, one of two functions that is called reward: none changes the advantages."""
    weighted = trl_rows(weights=(1.0, 4.0))
    extra = [{**row, "n_words": i} for i, row in enumerate(trl_rows())]
    renamed = [{"reward": row.pop("exact"), **row} for row in trl_rows()]
    constant = [{**row, "exact": 0.0, "form_reward": 0.0} for row in trl_rows()]
    undefined = [{**row, "exact": None, "form_reward": None} for row in trl_rows()]
    for rows, rewards in (
        (weighted, None),
        (extra, None),
        (renamed, read(write(tmp_path / "plain.jsonl", trl_rows())).rewards.tolist()),
        (constant, None),
        (undefined, None),
    ):
        batch = read(write(tmp_path / "a.jsonl", rows))
        assert batch.advantages.tolist() == [row["advantage"] for row in rows]
        assert (None if batch.rewards is None else batch.rewards.tolist()) == rewards
    config = BatchConfig(reward_columns=["exact", "form_reward"])
    assert read(write(tmp_path / "b.jsonl", extra), config=config).rewards[0] == 1.25


@pytest.mark.parametrize("G", [8, 4])
def test_groups_of_a_prompt_that_was_drawn_twice_in_a_row(tmp_path, G):
    advantages = [1.0, -1.0, 0.5, -0.5, -1.0, 1.0, 0.25, -0.25, *[0.0] * 4]
    advantages = [
        a for k in range(0, 12, 4) for a in (advantages[k], advantages[k + 2], *advantages[k + 1 : k + 4 : 2])
    ]
    rows = [
        {"prompt": "a" if i < 8 else "b", "completion": "x", "advantage": a} for i, a in enumerate(advantages)
    ]
    found = read(write(tmp_path / "a.jsonl", rows), config=BatchConfig(G=G))
    assert found.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("value", [None, "x", math.nan, True])
def test_bad_advantages(tmp_path, value):
    rows = [{"prompt": "a", "completion": "x", "advantage": value}]
    with pytest.raises(DataError, match="row 0: expected a finite number as advantage"):
        read(write(tmp_path / "a.jsonl", rows))


def test_other_columns_are_the_row(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "answer": "4", "level": 2, "group": 1, "reward": 0.0}]
    assert read(write(tmp_path / "a.jsonl", rows)).rows == ({"answer": "4", "level": 2},)
    assert read(write(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}])).rows == ()


def test_max_prompt_tokens(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "abc", "completion": "b"}])
    with pytest.raises(
        DataError, match=r"max_prompt_tokens: expected at most 2 tokens, found 1 of 1 prompts"
    ):
        read(path, config=BatchConfig(max_prompt_tokens=2))


def make_batch(**changes) -> RolloutBatch:
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    fields = {
        "prompts": ('1+1\u2028"=', "2+\n2=", "3"),
        "completions": ("ab\u00e9", "", "x"),
        "prompt_ids": ((4, 5), (6,), (7,)),
        "completion_ids": torch.tensor([[14, 15, EOS], [EOS, 0, 0], [0, 0, 0]]),
        "mask": mask,
        "truncated": torch.tensor([False, True, False]),
        "group": torch.tensor([3, -1, 3]),
        "rewards": torch.tensor([1 / 3, -2.0, 0.1], dtype=torch.float64),
        "old_logprobs": torch.tensor([[-0.1, -1 / 3, -1e-9], [-2.0, 0, 0], [0, 0, 0]], dtype=torch.float64),
        "rows": ({"answer": "4", "prompt": "raw", "n": [1, None]}, {"answer": 0.1, "deep": {"x": "y"}}, {}),
        "bias_flags": ("truncated_support",),
    }
    return RolloutBatch(**{**fields, **changes})


def assert_equal(found: RolloutBatch, expected: RolloutBatch) -> None:
    for name in ("prompts", "completions", "prompt_ids", "rows", "bias_flags"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("completion_ids", "mask", "truncated", "group", "rewards", "old_logprobs"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype), name


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "changes", [{}, {"rewards": None, "old_logprobs": None, "rows": (), "bias_flags": ()}]
)
def test_writing_and_reading_gives_the_same_batch(tmp_path, ending, changes):
    batch = make_batch(**changes)
    path = write_rollouts(tmp_path / "new" / f"a.{ending}", batch)
    found = read(str(path), cap=2)
    assert_equal(found, batch)
    assert found.source == str(path)
    again = read(str(write_rollouts(tmp_path / f"b.{ending}", found)))
    assert_equal(again, batch)


def test_a_read_file_written_again_keeps_its_flag(tmp_path):
    batch = read(write(tmp_path / "a.parquet", trl_rows()))
    found = read(str(write_rollouts(tmp_path / "b.jsonl", batch)))
    assert_equal(found, batch)
    assert found.bias_flags == ("retokenized",)


def test_advantages_are_written_and_read(tmp_path):
    batch = make_batch(advantages=torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64))
    path = str(write_rollouts(tmp_path / "a.jsonl", batch))
    assert read_table(path).column("advantage") == [0.5, 0.0, -0.5]
    assert read(path).advantages.tolist() == [0.5, 0.0, -0.5]


def test_padding_of_old_logprobs_may_be_anything(tmp_path):
    logprobs = make_batch().old_logprobs
    garbage = torch.where(make_batch().mask, logprobs, torch.nan)
    path = write_rollouts(tmp_path / "a.parquet", make_batch(old_logprobs=garbage))
    assert torch.equal(read(str(path)).old_logprobs, logprobs)


def test_what_json_cannot_hold_is_written_as_text(tmp_path):
    batch = make_batch(rows=({"x": 1 + 2j}, {}, {}))
    assert read(str(write_rollouts(tmp_path / "a.parquet", batch))).rows[0] == {"x": "(1+2j)"}


def test_writing_refuses_other_endings_and_non_finite_numbers(tmp_path):
    with pytest.raises(DataError, match=r"expected a file ending in .jsonl or .parquet, found '.csv'"):
        write_rollouts(tmp_path / "a.csv", make_batch())
    with pytest.raises(DataError, match="reward: expected finite numbers to write, found nan"):
        write_rollouts(tmp_path / "a.jsonl", make_batch(rewards=torch.tensor([0.0, math.nan, 1.0])))
    with pytest.raises(DataError, match="old_logprobs: expected finite numbers to write, found -inf"):
        write_rollouts(tmp_path / "a.jsonl", make_batch(old_logprobs=torch.full((3, 3), -math.inf)))
    assert list(tmp_path.iterdir()) == []


def test_writing_where_a_folder_stands(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(LogError, match=r"cannot write .*a\.jsonl"):
        write_rollouts(tmp_path / "a.jsonl", make_batch())


def test_padding_beyond_the_longest_response_is_dropped(tmp_path):
    batch = make_batch()
    first = replace(
        batch,
        **{name: getattr(batch, name)[1:] for name in ("prompts", "completions", "prompt_ids", "rows")},
        **{name: getattr(batch, name)[1:] for name in ("completion_ids", "mask", "truncated", "group")},
        rewards=None,
        old_logprobs=None,
    )
    found = read(str(write_rollouts(tmp_path / "a.jsonl", first)))
    assert found.completion_ids.shape == (2, 1)
    assert tokens(found) == tokens(first)


@pytest.mark.parametrize("missing", ["prompt", "completion"])
def test_missing_columns(tmp_path, missing):
    row = {"prompt": "a", "completion": "b", f"{missing}s": "c"}
    del row[missing]
    with pytest.raises(
        DataError, match=rf"expected a column '{missing}', found .*; did you mean {missing}s\?"
    ):
        read(write(tmp_path / "a.jsonl", [row]))


def test_empty_files(tmp_path):
    for ending in ("jsonl", "parquet"):
        path = tmp_path / f"a.{ending}"
        if ending == "jsonl":
            path.write_text("\n\n")
        else:
            pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
        with pytest.raises(DataError, match="expected rollouts, found a file without rows"):
            read(str(path))


def test_malformed_json_names_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a" "completion"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: expected JSON, found '\{\"prompt\": \"a\" "):
        read(str(path))
    path.write_text("[1, 2]\n")
    with pytest.raises(DataError, match="line 1: expected a JSON object with the columns, found list"):
        read(str(path))


def test_unreadable_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: cannot read it as UTF-8 text"):
        read(str(path))
    other = tmp_path / "a.parquet"
    other.write_text("not parquet")
    with pytest.raises(DataError, match=r"a\.parquet: cannot read it as Parquet"):
        read(str(other))


def test_paths_that_are_no_rollout_file(tmp_path):
    with pytest.raises(DataError, match=r"no\.jsonl: expected a rollout file, found nothing there"):
        read(str(tmp_path / "no.jsonl"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"expected a file ending in .jsonl or .parquet, found '.csv'"):
        read(str(tmp_path / "a.csv"))
    folder = tmp_path / "completions"
    folder.mkdir()
    with pytest.raises(DataError, match=r"expected a .jsonl or .parquet file, found a folder$"):
        read(str(folder))
    for step in (5, 60):
        write(folder / f"completions_{step:05d}.parquet", trl_rows())
    with pytest.raises(DataError, match=r"found a folder; its last one is .*completions_00060\.parquet$"):
        read(str(folder))


@pytest.mark.parametrize(
    "row",
    [{"completion": ""}, {"completion": "x", "completion_ids": []}, {"completion": "", "truncated": True}],
)
def test_all_responses_empty(tmp_path, row):
    with pytest.raises(
        RolloutError, match=r"a\.jsonl: expected a response with tokens, found all 2 of them empty"
    ):
        read(write(tmp_path / "a.jsonl", [{"prompt": "a", **row}] * 2))


@pytest.mark.parametrize("name", ["prompt_ids", "completion_ids"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            [5, 100],
            "below the 100 tokens of the policy's vocabulary, found 100; the file was made with another tokenizer",
        ),
        ([-1], "below the 100 tokens of the policy's vocabulary, found -1"),
        ([1.5], r"to be a list of token ids, found \[1.5\]"),
        ([True], r"to be a list of token ids, found \[True\]"),
        (None, "to be a list of token ids, found None"),
        ("12", "to be a list of token ids, found 12"),
    ],
)
def test_bad_token_ids(tmp_path, name, value, message):
    rows = [{"prompt": "a", "completion": "b", name: [5]}, {"prompt": "a", "completion": "b", name: value}]
    with pytest.raises(DataError, match=rf"row 1: expected {name} {message}"):
        read(write(tmp_path / "a.jsonl", rows))


def test_bad_truncated(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "truncated": 0}])
    with pytest.raises(DataError, match="row 0: expected truncated to be true or false, found 0"):
        read(path)


@pytest.mark.parametrize(
    "completion",
    [
        [{"role": "user", "content": "x"}],
        [{"role": "assistant", "content": "x", "reasoning_content": "y"}],
        [{"role": "assistant", "content": "x"}, {"role": "tool", "content": "y"}],
    ],
)
def test_completions_whose_text_is_not_what_was_sampled(tmp_path, completion):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": completion}])
    with pytest.raises(
        DataError, match=r"row 0, completion: expected one assistant message .*add a column completion"
    ):
        read(path)


def test_prompts_that_are_no_text(tmp_path):
    with pytest.raises(DataError, match="row 0, prompt: expected a text or a list of messages, found int 3"):
        read(write(tmp_path / "a.jsonl", [{"prompt": 3, "completion": "b"}]))
    with pytest.raises(DataError, match="row 0: expected a prompt of at least one token, found none in ''"):
        read(write(tmp_path / "a.jsonl", [{"prompt": "", "completion": "b"}]))
    with pytest.raises(DataError, match="row 0: expected a tokenizer with a chat template, found none"):
        read(write(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}]))


def test_tokenizer_without_eos(tmp_path):
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "bc"}])
    with pytest.raises(DataError, match="expected a tokenizer with an EOS token to end the responses with"):
        read(path, tokenizer)
    assert tokens(read(path, tokenizer, cap=2)) == [ids("bc")]


def test_bad_row_and_flags(tmp_path):
    base = {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match=r"row 0: expected row to be JSON, found '\{x'"):
        read(write(tmp_path / "a.jsonl", [{**base, "row": "{x"}]))
    with pytest.raises(DataError, match="row 0: expected row to be a mapping of columns, found list"):
        read(write(tmp_path / "a.jsonl", [{**base, "row": "[]"}]))
    with pytest.raises(DataError, match="row 0: expected bias_flags to be a list of texts, found 'x'"):
        read(write(tmp_path / "a.jsonl", [{**base, "bias_flags": "x"}]))


def test_the_rows_are_those_of_the_update_after_the_checkpoint(tmp_path):
    """TRL writes `completions_N` after update N, and checkpoint-N has that update in its weights already."""
    folder = tmp_path / "completions"
    folder.mkdir()
    for step in (59, 60, 61):
        write(folder / f"completions_{step:05d}.parquet", trl_rows(step=step))

    def update(path, number):
        return read_rollouts(str(path), char_tokenizer(), BatchConfig(), 256, update=number)

    assert update(folder, 61).source == str(folder / "completions_00061.parquet")
    assert len(update(folder / "completions_00061.parquet", 61)) == len(trl_rows())
    with pytest.raises(
        DataError,
        match=r"rows of update 61 .* step 60, found those of 60; give .*completions_00061\.parquet, or",
    ):
        update(folder / "completions_00060.parquet", 61)
    with pytest.raises(
        DataError, match=r"expected one file of update 70, .* step 69, found those of 59, 60, 61; "
    ):
        update(folder, 70)
    with pytest.raises(DataError, match="found those of 61; give the file of that update, or leave"):
        update(folder / "completions_00061.parquet", 70)
    write(folder / "rollouts_00061.jsonl", trl_rows(step=61))
    with pytest.raises(DataError, match=r"found 2 \(completions_00061.parquet, rollouts_00061.jsonl\)"):
        update(folder, 61)
    several = write(tmp_path / "all.jsonl", [*trl_rows(step=60), *trl_rows(step=61), *trl_rows(step=62)])
    assert len(update(several, 61)) == len(trl_rows())
    plain = [{"prompt": "a", "completion": "b", "reward": 1.0}]
    assert len(update(write(tmp_path / "own.jsonl", plain), 61)) == 1


def test_log_probs_of_the_engine_that_sampled(tmp_path):
    """Null where it gave none; written and read back alike."""
    rows = [
        {
            "prompt": "a",
            "completion": "bc",
            "completion_ids": [20, 21, EOS],
            "sampling_logprobs": [-0.5, None, -2.0],
        },
        {"prompt": "a", "completion": "b", "completion_ids": [EOS], "sampling_logprobs": [-0.125]},
    ]
    batch = read(write(tmp_path / "a.jsonl", rows))
    assert batch.sampling_logprobs[1].tolist() == [-0.125, 0.0, 0.0]
    assert torch.isnan(batch.sampling_logprobs).tolist() == [[False, True, False], [False] * 3]
    for ending in ("jsonl", "parquet"):
        again = read(str(write_rollouts(tmp_path / f"b.{ending}", batch)))
        torch.testing.assert_close(again.sampling_logprobs, batch.sampling_logprobs, equal_nan=True)
    rows[1]["sampling_logprobs"] = [0.5]
    with pytest.raises(
        DataError, match=r"expected sampling_logprobs to be finite and not above 0, found 0\.5"
    ):
        read(write(tmp_path / "c.jsonl", rows))


# ---------------------------------------------------------------- token ids


def test_token_ids_need_no_texts(tmp_path):
    rows = [{"prompt_ids": ids(p), "completion_ids": [*ids(c), EOS]} for p, c in (("ab", "c"), ("ab", "de"))]
    batch = read(write(tmp_path / "a.parquet", rows))
    assert batch.prompts == ("ab", "ab")
    assert batch.completions == ("c", "de")
    assert batch.group.tolist() == [0, 0]
    assert batch.bias_flags == batch.doubts == ()


def test_several_ids_end_a_response(tmp_path):
    """As when sampling: those of the generation config, and the tokenizer's."""
    row = {"prompt": "a", "completion_ids": [20, 9]}
    path = write(tmp_path / "a.jsonl", [row, {"prompt": "a", "completion_ids": [20, EOS]}])
    assert read(path, eos_ids=[9, EOS]).bias_flags == ()
    assert read(path).bias_flags == ("ended_without_eos",)
    assert read(path, eos_ids=[9, EOS], cap=2).truncated.tolist() == [False, False]
    assert read(path, cap=2).truncated.tolist() == [True, False]
    padded = write(tmp_path / "b.jsonl", [row, {"prompt": "a", "completion_ids": [20, 9, 0, 0]}])
    with pytest.raises(
        DataError, match=r"row 1: expected completion_ids to end with .* EOS \(9\), found 2 tok"
    ):
        read(padded, eos_ids=[EOS, 9])
    text = write(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b<eos><pad>"}])
    with pytest.raises(
        DataError, match=r"row 0: expected completion to end with their first EOS \(1\), found 1"
    ):
        read(text)


# ---------------------------------------------------------------- what texts leave open


def word_tokenizer():
    """Words that can also be cut into pieces; bytes are not in the vocabulary."""
    vocabulary = {
        t: i for i, t in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *"helo ", "he", "llo", "hello"])
    }
    backend = Tokenizer(models.Unigram([(t, -float(len(t) < 5)) for t in vocabulary], unk_id=3))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def test_doubts_say_which_texts_need_not_be_the_sampled_tokens(tmp_path):
    texts = ["hello", "eo", "eo?", "e\ufffd"]
    rows = [{"prompt": "h", "completion": text, "finish_reason": "eos_token"} for text in texts]
    batch = read(write(tmp_path / "a.jsonl", rows), word_tokenizer())
    assert batch.doubts == (("tokens",), (), ("text",), ("text",))
    assert batch.bias_flags == ("retokenized",)
    assert doubt_counts(batch) == {"of": 4, "text": 2, "tokens": 1}
    found = read(str(write_rollouts(tmp_path / "b.parquet", batch)), word_tokenizer())
    assert found.doubts == batch.doubts
    assert batch.subset(torch.tensor([0, 2])).doubts == (("tokens",), ("text",))


def test_lone_surrogates_are_replaced_wherever_they_stand(tmp_path):
    row = {
        "prompt": "a\ud83d",
        "completion": "b\udc00",
        "answer": ["\ud83d"],
        "reward": 1.0,
        "group": "\ud83d",
    }
    batch = read(write(tmp_path / "a.jsonl", [row]))
    assert batch.prompts == ("a\ufffd",)
    assert batch.completions == ("b\ufffd",)
    assert batch.rows[0]["answer"] == ["\ufffd"]
    assert "text" in batch.doubts[0]
    write_rollouts(tmp_path / "b.parquet", batch)
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "a", "completion": "b\xed\xa0\xbd"}')
    assert read(str(tmp_path / "d.jsonl")).completions == ("b\ufffd",)
    messages = {"prompt": [{"role": "user", "content": "\ud83d"}], "completion": "x"}
    path = write(tmp_path / "c.jsonl", [messages])
    assert read(path, char_tokenizer(chat_template=True)).prompts == ("[user]\ufffd\n[assistant]",)


# ---------------------------------------------------------------- tables of other trainers


def test_columns_of_other_trainers(tmp_path):
    """The reward is the score alone: verl writes parts of it beside it."""
    verl = {"input": "1+1=", "output": "2", "gts": "2", "score": 0.5, "step": 3, "acc": 1.0}
    openrlhf = {"input": "1+1=", "output": "2", "reward": 0.5}
    other = {"prompt": "1+1=", "response": "2", "rewards": 0.5, "response_ids": [*ids("2"), EOS]}
    own_ids = {"prompt_token_ids": ids("1+1="), "response_token_ids": [*ids("2"), EOS], "reward": 0.5}
    for name, row in (("verl", verl), ("openrlhf", openrlhf), ("other", other), ("ids", own_ids)):
        batch = read(write(tmp_path / f"{name}.jsonl", [row, row]), update=3)
        assert batch.prompts == ("1+1=", "1+1=")
        assert tokens(batch) == [[*ids("2"), EOS]] * 2
        assert batch.rewards.tolist() == [0.5, 0.5]
        assert batch.bias_flags == (() if name in ("other", "ids") else ("retokenized",))
    with pytest.raises(DataError, match=r"expected rows of update 4 .* found those of 3"):
        read(str(tmp_path / "verl.jsonl"), update=4)
    begun = write(tmp_path / "begun.jsonl", [{**verl, "input": "<bos>1+1="}, verl])
    assert read(begun, char_tokenizer(bos=True)).prompt_ids == ((2, *ids("1+1=")),) * 2
    chat = read(str(tmp_path / "verl.jsonl"), char_tokenizer(chat_template=True))
    assert chat.bias_flags == (
        "retokenized",
        "prompt_uncertain",
    )  # decoded without the template's special tokens


def test_responses_to_one_prompt_are_a_group_of_other_trainers_in_any_order(tmp_path):
    rows = [{"input": p, "output": c, "score": 1.0} for p, c in zip("abab", "wxyz", strict=True)]
    assert read(write(tmp_path / "a.jsonl", rows)).group.tolist() == [0, 1, 0, 1]
    named = [{**row, "uid": uid} for row, uid in zip(rows, "stuv", strict=True)]
    assert read(write(tmp_path / "b.jsonl", named)).group.tolist() == [0, 1, 2, 3]


def test_rows_of_tokens_with_a_mask(tmp_path):
    row = {
        "idx": 0,
        "content": ["1+1=", "2"],
        "token_ids": [*ids("1+1="), *ids("2"), EOS, 0, 0],
        "token_loss_mask": [0, 0, 0, 0, 1, 1, 0, 0],
        "prev_logprobs": [0.0, -1.0, -1.0, -1.0, -0.5, -0.25, 0.0, 0.0],
        "generation_logprobs": [0.0, 0.0, 0.0, 0.0, -0.625, -0.25, 0.0, 0.0],
        "advantages": [0.75] * 8,
        "rewards": 1.0,
        "input_lengths": 6,
    }
    batch = read(write(tmp_path / "train_data_step3.jsonl", [row]))
    assert batch.prompts == ("1+1=",)
    assert tokens(batch) == [[*ids("2"), EOS]]
    assert batch.old_logprobs.tolist() == [[-0.5, -0.25]]
    assert batch.sampling_logprobs.tolist() == [[-0.625, -0.25]]
    assert batch.advantages.tolist() == [0.75]
    assert batch.rewards is None or batch.rewards.tolist() == [1.0]
    for change, message in (
        (
            {"token_loss_mask": [0, 1, 0, 0, 1, 1, 0, 0]},
            "row 0: expected token_loss_mask to be one run .* several",
        ),
        ({"token_loss_mask": [0] * 8}, "to be one run of sampled tokens, found none"),
        ({"token_loss_mask": [1]}, "to be lists of one length"),
        ({"advantages": [float(t) for t in range(8)]}, "expected one advantage for all tokens"),
        ({"prev_logprobs": [-1.0]}, "expected prev_logprobs for each of the 8 token_ids, found 1"),
    ):
        with pytest.raises(DataError, match=message):
            read(write(tmp_path / "a.jsonl", [{**row, **change}]))


def test_tables_without_prompt_and_response_name_their_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a", "score": 1.0}])
    with pytest.raises(
        DataError, match=r"expected columns 'prompt' and 'completion', found text, score; prompts may"
    ):
        read(path)


# ---------------------------------------------------------------- rendering


def test_prompts_of_conversations_are_rendered_as_the_training_rendered_them(tmp_path):
    tokenizer = char_tokenizer(chat_template=True)
    tokenizer.chat_template += "{% if brief is defined %}!{% endif %}"
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "So"}
    row = {"prompt": [user], "completion": "b"}
    path = write(tmp_path / "a.jsonl", [row])
    config = BatchConfig(chat_template_kwargs={"brief": True})
    assert read(path, tokenizer, config).prompts == ("[user]hi\n[assistant]!",)
    assert read(path, tokenizer, config).bias_flags == ("retokenized",)
    assert read(path, tokenizer).prompts == ("[user]hi\n[assistant]",)
    assert read(path, tokenizer).bias_flags == (
        "retokenized",
        "prompt_uncertain",
    )  # the template has an option
    assert read(path, tokenizer, BatchConfig(chat_template_kwargs={})).bias_flags == ("retokenized",)
    own = write(tmp_path / "b.jsonl", [{**row, "chat_template_kwargs": {"brief": 1}}])
    assert read(own, tokenizer).prompts == ("[user]hi\n[assistant]!",)
    prefilled = write(tmp_path / "c.jsonl", [{"prompt": [user, assistant], "completion": "b"}])
    plain = char_tokenizer(chat_template=True)
    texts = {None: "[user]hi\n[assistant]So", True: "[user]hi\n[assistant]So"}
    texts[False] = "[user]hi\n[assistant]So\n[assistant]"
    for value, text in texts.items():
        batch = read(prefilled, plain, BatchConfig(continue_final_message=value))
        assert batch.prompts == (text,)
        assert ("prompt_uncertain" in batch.bias_flags) == (value is None)


def test_an_evaluation_batch_of_another_update_is_not_sent_to_the_updates_own_file(tmp_path):
    file = write(
        tmp_path / "rollouts_00001.jsonl", [{"prompt": "a", "completion": "b", "step": 1, "reward": 0.0}]
    )
    for part, remedy in (
        ("U", "give the file of that update"),
        ("E", "leave batch_config.E_rollouts out to sample E"),
    ):
        with pytest.raises(DataError, match=f"expected rows of update 3 .*{remedy}"):
            read_table(str(file), 3, part)


def test_the_tokens_that_a_loss_was_divided_by(tmp_path):
    rows = [{"prompt": "a", "completion": text, "loss_tokens": 12.5} for text in ("b", "c")]
    batch = read(write(tmp_path / "a.jsonl", rows))
    assert batch.loss_tokens == 12.5
    assert batch.rewards is None
    assert read(str(write_rollouts(tmp_path / "b.parquet", batch))).loss_tokens == 12.5
    for wrong in (3, 0, None, "many"):
        rows[1]["loss_tokens"] = wrong
        with pytest.raises(
            DataError, match="expected one positive number in all rows of the column loss_tokens"
        ):
            read(write(tmp_path / "c.jsonl", rows))


@pytest.mark.parametrize("name", ["completion_mask", "tool_mask", "response_mask", "loss_mask"])
def test_tokens_that_were_not_sampled_are_refused_by_any_name_of_their_mask(tmp_path, name):
    row = {"prompt": "a", "completion_ids": [20, 21, EOS], "reward": 1.0}
    assert len(read(write(tmp_path / "a.jsonl", [{**row, name: [1, 1, 1]}])))
    with pytest.raises(DataError, match=f"expected {name} to be 1 for each of the 3 completion_ids"):
        read(write(tmp_path / "b.jsonl", [{**row, name: [1, 0, 1]}]))


def test_a_response_that_the_loss_leaves_out_is_refused(tmp_path):
    row = {"token_ids": [20, 21, EOS], "token_loss_mask": [0, 1, 1], "reward": 1.0}
    assert len(read(write(tmp_path / "a.jsonl", [{**row, "sample_loss_mask": 1.0}])))
    with pytest.raises(DataError, match="expected sample_loss_mask to be 1"):
        read(write(tmp_path / "b.jsonl", [{**row, "sample_loss_mask": 0.0}]))


@pytest.mark.parametrize("total", ["reward", "score", "reward_score", "rewards"])
def test_what_measures_a_response_is_no_reward(tmp_path, total):
    measured = {"response_length": 7, "gen_seconds": 0.3, "num_turns": 2, "kl_loss": 0.1}
    rows = [{"prompt": "a", "completion": text, total: float(k), **measured} for k, text in enumerate("bc")]
    assert read(write(tmp_path / "a.jsonl", rows)).rewards.tolist() == [0.0, 1.0]
    parts = [
        {"prompt": "a", "completion": t, "format": 1.0, "math": float(k), "num_turns": 2}
        for k, t in enumerate("bc")
    ]
    path = write(tmp_path / "b.jsonl", parts)
    with pytest.raises(
        DataError, match=r"expected one column with the reward .* found format, math; name those"
    ):
        read(path)
    assert read(path, config=BatchConfig(reward_columns=["format", "math"])).rewards.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("name", ["uid", "group_id", "group", "prompt_id"])
def test_shuffled_groups_are_known_by_their_names(tmp_path, name):
    names = ["u", 2**64 + 1, "u", 2**64 + 1] if name == "group" else ["u", "v", "u", "v"]
    rows = [
        {"prompt": "ab"[k % 2], "completion": "c", "reward": 0.0, name: own} for k, own in enumerate(names)
    ]
    assert read(write(tmp_path / "a.jsonl", rows)).group.tolist() == [0, 1, 0, 1]
    for row in rows:
        del row[name]
    with pytest.raises(DataError, match="one draw of a prompt one after the other, or a column group"):
        read(write(tmp_path / "b.jsonl", rows))
