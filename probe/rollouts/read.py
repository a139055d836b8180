"""Rollout batches from files: those that TRL logs, those of a loop of one's own, and exact ones.

The columns of a file:

- `prompt_ids`, `completion_ids`: token ids, taken as they are: what was sampled. They need no texts beside them.
- `prompt`, `completion`: texts, or lists of messages. Without ids they are tokenised again, which need not give the
  tokens that were sampled; `chat_template_kwargs` and `tools` are used where messages are rendered.
- rewards, see below. Optional.
- `old_logprobs`: log-probs of the response's tokens under the policy that sampled.
- `sampling_logprobs`: those that the engine which sampled gave, null for a token that it gave none for.
- `loss_tokens`: the number of tokens that the update's loss was divided by, the same in all rows (of losses that are a
  mean over the tokens of the update).
- `finish_reason`, `stop_reason`, `truncated`, `is_truncated`: how the response ended, see `probe.rollouts.ends`.
- `group` or `prompt_id`: equal for the responses to the same draw of a prompt.
- `step`: the update that the rows were used for; it has to be the one after the checkpoint's, where that is known.
- `row`: the data set's row, `bias_flags` and `doubts`: those of the batch; written by `write_rollouts`.

The column `advantage`, which TRL logs and `write_rollouts` writes, is what the update was made with, whatever weights
and scales its rewards had. Rewards beside it are described and nothing more, and only where they explain it.

The reward is the sum of `batch_config.reward_columns`; without it the first column of `TOTALS`; without that the one
column of numbers that may be a reward, and of several of these none is chosen. Beside a column `advantage` it is the
sum of them all, as TRL logs one column for each reward function. In a sum, None and NaN mean that a function did not
apply, and are left out.

Without `completion_ids` the completion's text is tokenised, and the batch is marked `retokenized`. How a response
ended is read from the file, else it follows from `stop_strings` and `max_new_tokens`; EOS is added only where one of
these says that it was sampled. Where neither does, the batch is marked `ended_without_eos`; `doubts` says of every
response what is not certain about it. Responses longer than `max_new_tokens` of whose ends the file says nothing show
that it was made with another cap: the batch is marked `unknown_cap`.

Groups are those of the explicit column, else runs of rows with the same prompt. A prompt that was drawn twice in a
row makes one run of two groups: where there are advantages, which add up to 0 in every group, runs are cut into
groups of one size, `batch_config.G` if that fits, else the smallest that does.

Tables of other trainers are brought into these columns by `probe.rollouts.foreign`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from probe.config.batches import BatchConfig
from probe.data.batch import RolloutBatch
from probe.data.prompts import check_messages, check_prompt_tokens
from probe.data.rendering import render_messages, rendering_of
from probe.errors.exceptions import DataError
from probe.rollouts.cells import padded, read_ids
from probe.rollouts.ends import EndRules, Response
from probe.rollouts.foreign import own_columns
from probe.rollouts.responses import read_logprobs, read_loss_tokens, read_responses
from probe.rollouts.reward_columns import LAYOUT, read_advantages, read_rewards
from probe.rollouts.row_groups import read_group, read_places
from probe.rollouts.tables import Part, RolloutTable, read_table
from probe.text import all_well_formed


def read_rollouts(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    config: BatchConfig,
    max_new_tokens: int,
    vocabulary: int | None = None,
    update: int | None = None,
    *,
    stop_strings: Sequence[str] = (),
    eos_ids: Sequence[int] | None = None,
    part: Part | None = None,
) -> RolloutBatch:
    """Read a rollout file (`.jsonl` or `.parquet`), or a log of a run, by the rules at the top of this module.

    Args:
        path: the file.
        tokenizer: of the policy.
        config: `reward_columns`, `max_prompt_tokens`, and how messages are rendered.
        max_new_tokens: the cap on tokens that the responses were sampled with.
        vocabulary: number of tokens that the model knows and samples, often more than the tokenizer's (the default).
        update: number of the update whose rows are wanted, see `read_table`.
        stop_strings: the stop strings that the responses were sampled with.
        eos_ids: the ids that end a response, as when sampling; by default the tokenizer's EOS alone.
        part: `E` or `U`, whose responses are wanted of a log, which has both.

    Returns:
        The batch, with advantages where the file has them; `source` is the path.

    Raises:
        DataError: the file or a column is missing or malformed; messages name the row, counted from 0.
        RolloutError: all responses are empty.
    """
    table = own_columns(read_table(path, update, part))
    vocabulary = len(tokenizer) if vocabulary is None else vocabulary
    prompts = _read_prompts(table, tokenizer, vocabulary, config)
    rules = _end_rules(tokenizer, eos_ids or (), stop_strings, max_new_tokens)
    responses, flags = read_responses(table, tokenizer, rules, vocabulary)
    ids = [response.ids for response in responses]
    completion_ids, mask = padded(ids, torch.int64)
    advantages = read_advantages(table)
    group = read_group(table, advantages, config.G)
    return RolloutBatch(
        prompts=tuple(prompts.texts),
        completions=tuple(response.text for response in responses),
        prompt_ids=tuple(map(tuple, prompts.ids)),
        completion_ids=completion_ids,
        mask=mask,
        truncated=torch.tensor([response.truncated for response in responses]),
        group=group,
        rewards=read_rewards(table, config.reward_columns, group, advantages, part),
        advantages=advantages,
        old_logprobs=read_logprobs(table, "old_logprobs", ids),
        sampling_logprobs=read_logprobs(table, "sampling_logprobs", ids, gaps=True),
        loss_tokens=read_loss_tokens(table),
        rows=_read_rows(table, prompts.messages),
        source=table.path,
        bias_flags=_bias_flags(table, flags, prompts.unsure),
        doubts=_doubts(table, responses, prompts.unsure),
        places=read_places(table, prompts.ids),
    )


@dataclass(frozen=True)
class _Prompts:
    """The prompts of a file: texts, token ids, (of conversations) messages, and which of them are not certain."""

    texts: list[str]
    ids: list[list[int]]
    messages: list[list[dict[str, Any]] | None]
    unsure: list[bool]


def _end_rules(
    tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], stop_strings: Sequence[str], cap: int
) -> EndRules:
    """How responses end: by the tokenizer's EOS first, then by the other ids."""
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return EndRules(tuple(dict.fromkeys([*own, *eos_ids])), tuple(stop_strings), cap)


def _read_prompts(
    table: RolloutTable, tokenizer: PreTrainedTokenizerBase, vocabulary: int, config: BatchConfig
) -> _Prompts:
    """The text, the token ids and (of conversations) the messages of each prompt.

    Raises:
        DataError: one is malformed, empty, or longer than `max_prompt_tokens`.
    """
    rendering = rendering_of(config)
    exact = read_ids(table, "prompt_ids", vocabulary) if "prompt_ids" in table.columns else None
    if exact is not None and "prompt" not in table.columns:
        values: list[Any] = [str(tokenizer.decode(ids)) for ids in exact]
    else:
        values = table.column("prompt")
    found = _Prompts([], [], [], [])
    for i, value in enumerate(values):
        where = table.where(i)
        if exact is not None and isinstance(value, int):  # the position of a prompt in the log of a run
            value = str(tokenizer.decode(exact[i]))
        messages = None if isinstance(value, str) else check_messages(value, f"{where}, prompt")
        unsure = False
        if exact is not None:
            ids = exact[i]
            text = value if messages is None else str(tokenizer.decode(ids))
        elif messages is None:
            text = value
            begun = table.rendered and bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
            ids = [int(t) for t in tokenizer(text, add_special_tokens=not begun)["input_ids"]]
            unsure = table.special_tokens_left_out and tokenizer.chat_template is not None
        else:
            own = rendering.of_row(table.rows[i], where)
            text = render_messages(tokenizer, messages, where, own)
            # A chat template writes the special tokens itself.
            ids = [int(t) for t in tokenizer(text, add_special_tokens=False)["input_ids"]]
            unsure = not own.is_certain(tokenizer, messages)
        if not ids:
            raise DataError(f"{where}: expected a prompt of at least one token, found none in {text!r}")
        found.texts.append(text)
        found.ids.append(ids)
        found.messages.append(messages)
        found.unsure.append(unsure)
    if config.max_prompt_tokens is not None:
        check_prompt_tokens([len(ids) for ids in found.ids], config.max_prompt_tokens)
    return found


def _bias_flags(table: RolloutTable, found: Sequence[str], unsure: Sequence[bool]) -> tuple[str, ...]:
    """The flags that the rows name, those of the responses, and that of prompts which are not certain."""
    named = [flag for own in _read_texts(table, "bias_flags") for flag in own]
    return tuple(dict.fromkeys([*named, *found, *(["prompt_uncertain"] if any(unsure) else [])]))


def _doubts(
    table: RolloutTable, responses: Sequence[Response], unsure: Sequence[bool]
) -> tuple[tuple[str, ...], ...]:
    """What is not certain about each response; empty where all are."""
    doubts = [
        tuple(dict.fromkeys([*before, *response.doubts, *(["prompt"] if open_ else [])]))
        for before, response, open_ in zip(_read_texts(table, "doubts"), responses, unsure, strict=True)
    ]
    return tuple(doubts) if any(doubts) else ()


def _read_rows(
    table: RolloutTable, messages: Sequence[list[dict[str, Any]] | None]
) -> tuple[Mapping[str, Any], ...]:
    """The data set's rows: the column `row`, else all columns without a meaning of their own."""
    rows: list[dict[str, Any]] = []
    for i, (row, own) in enumerate(zip(table.rows, messages, strict=True)):
        if "row" in table.columns:
            columns = _parse_row(row["row"], table.where(i))
        else:
            columns = {name: value for name, value in row.items() if name not in LAYOUT}
        rows.append(columns if own is None else {**columns, "prompt": own})
    return tuple(rows) if any(rows) or "row" in table.columns else ()


def _parse_row(value: Any, where: str) -> dict[str, Any]:
    """A data set's row, which Parquet holds as JSON."""
    if isinstance(value, str):
        try:
            value = all_well_formed(json.loads(value))
        except ValueError as error:
            raise DataError(f"{where}: expected row to be JSON, found {value[:60]!r} ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected row to be a mapping of columns, found {type(value).__name__}")
    return value


def _read_texts(table: RolloutTable, name: str) -> list[list[str]]:
    """A column of lists of texts: the bias flags or doubts that the rows name; nothing where there is none."""
    if name not in table.columns:
        return [[] for _ in table.rows]
    values = table.column(name)
    for i, texts in enumerate(values):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{table.where(i)}: expected {name} to be a list of texts, found {texts!r:.60}")
    return values
