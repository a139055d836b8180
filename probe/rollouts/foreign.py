"""Rollout tables of other trainers, brought into the columns of `probe.rollouts.read`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from probe.errors.exceptions import DataError, nearest
from probe.rollouts.tables import RolloutTable

PROMPTS = ("prompt", "input", "query")
RESPONSES = ("completion", "output", "response")
TOTALS = ("reward", "score", "reward_score", "rewards")
"""Names of a whole reward, in the order in which they are looked for; what stands beside one describes it."""
IDS = {
    "prompt_token_ids": "prompt_ids",
    "response_ids": "completion_ids",
    "response_token_ids": "completion_ids",
}
OTHERS = {"advantages": "advantage", "old_log_probs": "old_logprobs", "uid": "group", "group_id": "group"}
"""Columns of tables that verl (`input`, `output`, `score`), OpenRLHF (`input` or `prompt`, `output` or `response`,
`reward`) and others write, in the order in which they are looked for."""
MASKED = ("token_ids", "token_loss_mask")
"""NeMo RL writes prompt and response as one row of tokens, with a mask of those that the loss acts on."""
SPECIAL_TOKENS_LEFT_OUT = "input"
"""The column whose writer decodes prompts without their special tokens."""


def own_columns(table: RolloutTable) -> RolloutTable:
    """The table in the columns of `probe.rollouts.read`; a table that has them already is returned as it is.

    In a table of another trainer the reward is the column `reward`, `score` or `rewards`; further columns of numbers
    describe it and are not added up.

    Raises:
        DataError: prompt or response cannot be found; the message names the columns that are there.
    """
    there = set(table.columns)
    if there & {"prompt", "prompt_ids"} and there & {"completion", "completion_ids"} and "input" not in there:
        label = next((name for name in ("uid", "group_id") if name in there), None)
        if label is None or there & {"group", "prompt_id"}:
            return table
        return _renamed(table, {label: "group"})
    if set(MASKED) <= there:
        return _from_masked(table)
    prompt = next((name for name in PROMPTS if name in there), None)
    response = next((name for name in RESPONSES if name in there), None)
    names = {name: own for name, own in {**IDS, **OTHERS}.items() if name in there and own not in there}
    named = there | set(names.values())
    if (prompt is None and "prompt_ids" not in named) or (response is None and "completion_ids" not in named):
        raise _not_found(table, prompt, response)
    names |= {name: own for name, own in ((prompt, "prompt"), (response, "completion")) if name is not None}
    total = next((name for name in TOTALS if name in there), None)
    if total is not None:
        names[total] = "reward"
    left_out = names.get(SPECIAL_TOKENS_LEFT_OUT) == "prompt"
    return _grouped(replace(_renamed(table, names), rendered=True, special_tokens_left_out=left_out))


def _not_found(table: RolloutTable, prompt: str | None, response: str | None) -> DataError:
    """Which column is missing, and which there are."""
    if prompt is None and response is None:
        missing, near = "columns 'prompt' and 'completion'", ""
    else:
        name = "prompt" if prompt is None else "completion"
        missing, near = f"a column {name!r}", nearest(name, table.columns)
    return DataError(
        f"{table.path}: expected {missing}, found {', '.join(table.columns)}; prompts may also be called "
        f"{' or '.join(PROMPTS[1:])}, responses {' or '.join(RESPONSES[1:])}, or be token ids in prompt_ids and "
        f"completion_ids, or in {' with '.join(MASKED)}{near}"
    )


def _renamed(table: RolloutTable, names: dict[str, str]) -> RolloutTable:
    """The table with some columns under other names."""
    columns = tuple(names.get(name, name) for name in table.columns)
    rows = tuple({names.get(name, name): value for name, value in row.items()} for row in table.rows)
    return replace(table, rows=rows, columns=columns)


def _grouped(table: RolloutTable) -> RolloutTable:
    """The table with a group for each prompt, where it names none: these trainers draw a prompt once for an update.

    They also put responses into another order, so that those to one prompt need not stand together.
    """
    if {"group", "prompt_id"} & set(table.columns):
        return table
    key = "prompt_ids" if "prompt_ids" in table.columns else "prompt"
    rows = tuple({**row, "group": _digest(row[key])} for row in table.rows)
    return replace(table, rows=rows, columns=(*table.columns, "group"))


def _digest(prompt: Any) -> str:
    """A name for a prompt that is the same in every file."""
    return hashlib.blake2b(repr(prompt).encode(), digest_size=8).hexdigest()


def _from_masked(table: RolloutTable) -> RolloutTable:
    """Tables of rows of tokens with a mask: the run of masked tokens is the response, what precedes it the prompt."""
    per_token = {
        "prev_logprobs": "old_logprobs",
        "generation_logprobs": "sampling_logprobs",
        "advantages": "advantage",
    }
    dropped = {
        *MASKED,
        *per_token,
        "content",
        "input_lengths",
        "sample_loss_mask",
        "idx",
    }
    total = next((name for name in TOTALS if name in table.columns), None)
    rows: list[dict[str, Any]] = []
    for i, row in enumerate(table.rows):
        if row.get("sample_loss_mask", 1) not in (None, 1):
            raise DataError(
                f"{table.where(i)}: expected sample_loss_mask to be 1 (the loss acts on the response), found "
                f"{row['sample_loss_mask']!r}; give such a response the advantage 0, or leave the row out"
            )
        start, end = _masked_run(table, i)
        own = {name: value for name, value in row.items() if name not in dropped and name != total}
        own |= {"prompt_ids": row["token_ids"][:start], "completion_ids": row["token_ids"][start:end]}
        if total is not None:
            own["reward"] = row[total]
        for name, target in per_token.items():
            values = row.get(name)
            if values is None:
                continue
            if not isinstance(values, list):
                own[target] = values
                continue
            if len(values) < end:
                raise DataError(
                    f"{table.where(i)}: expected {name} for each of the {len(row['token_ids'])} token_ids, found "
                    f"{len(values)}"
                )
            sampled = values[start:end]
            own[target] = _only(table, i, sampled) if target == "advantage" else sampled
        rows.append(own)
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return _grouped(RolloutTable(table.path, tuple(rows), table.numbers, columns))


def _masked_run(table: RolloutTable, i: int) -> tuple[int, int]:
    """Start and end of the response in a row of tokens."""
    ids, mask = (table.rows[i][name] for name in MASKED)
    if not isinstance(ids, list) or not isinstance(mask, list) or len(ids) != len(mask):
        raise DataError(
            f"{table.where(i)}: expected token_ids and token_loss_mask to be lists of one length, found "
            f"{str(ids)[:40]} and {str(mask)[:40]}"
        )
    chosen = [t for t, m in enumerate(mask) if m]
    if not chosen or len(chosen) != chosen[-1] - chosen[0] + 1:
        raise DataError(
            f"{table.where(i)}: expected token_loss_mask to be one run of sampled tokens, found "
            f"{'none' if not chosen else 'several'}; tokens that the policy did not sample cannot be part of a "
            "response here"
        )
    return chosen[0], chosen[-1] + 1


def _only(table: RolloutTable, i: int, values: Sequence[Any]) -> Any:
    """The advantage that all tokens of a response share."""
    if any(value != values[0] for value in values):
        raise DataError(
            f"{table.where(i)}: expected one advantage for all tokens of the response, found several; leave the "
            "column out"
        )
    return values[0]
