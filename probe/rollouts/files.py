"""Rollout batches from and to files: those that TRL logs, those of a loop of one's own, and exact ones.

The columns of a file:

- `prompt_ids`, `completion_ids`: token ids, taken as they are: what was sampled. They need no texts beside them.
- `prompt`, `completion`: texts, or lists of messages. Without ids they are tokenised again, which need not give the
  tokens that were sampled; `chat_template_kwargs` and `tools` are used where messages are rendered.
- rewards: see `read_rollouts`. Optional.
- `old_logprobs`: log-probs of the response's tokens under the policy that sampled.
- `sampling_logprobs`: those that the engine which sampled gave, null for a token that it gave none for.
- `loss_tokens`: the number of tokens that the update's loss was divided by, the same in all rows (of losses that are a
  mean over the tokens of the update).
- `finish_reason`, `stop_reason`, `truncated`, `is_truncated`: how the response ended, see `probe.rollouts.ends`.
- `group` or `prompt_id`: equal for the responses to the same draw of a prompt.
- `step`: the update that the rows were used for; it has to be the one after the checkpoint's, where that is known.
- `row`: the data set's row, `bias_flags` and `doubts`: those of the batch; written by `write_rollouts`.

Tables of other trainers are brought into these columns by `probe.rollouts.foreign`.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from probe.config import BatchConfig
from probe.data.batch import RolloutBatch
from probe.data.names import nearest
from probe.data.prompts import check_messages, check_prompt_tokens
from probe.data.rendering import Rendering, render_messages, rendering_of
from probe.errors import DataError, RolloutError
from probe.rollouts.ends import END_COLUMNS, EndRules, Response, end_exact, end_texts, stated_ends
from probe.rollouts.foreign import TOTALS, own_columns
from probe.rollouts.retokenized import Recovery
from probe.rollouts.tables import Part, RolloutTable, read_table, write_table
from probe.text import all_well_formed

logger = logging.getLogger(__name__)

# fmt: off
LAYOUT = frozenset({
    "step", "prompt", "completion", "prompt_ids", "completion_ids", "old_logprobs",
    "sampling_logprobs", "loss_tokens", "group", "prompt_id", "reward", "advantage", "row", "bias_flags", "doubts"
}) | END_COLUMNS
# fmt: on
"""The columns with a meaning of their own; all others belong to the data set's row."""

# fmt: off
NOT_REWARDS = LAYOUT | {
    "advantages", "answer", "completion_length", "completion_tokens", "entropy", "epoch",
    "global_step", "id", "idx", "index", "iteration", "kl", "label", "length", "level", "logprob",
    "num_tokens", "prompt_length", "prompt_tokens", "ref_logprob", "seed", "solution", "target",
    "temperature", "time", "timestamp", "tokens"
}
# fmt: on
"""Columns that are no reward although they may hold numbers."""

TOKEN_MASKS = ("completion_mask", "tool_mask", "response_mask", "loss_mask")
"""Columns that say of each token of the response whether the policy sampled it."""
_MEASURED = re.compile(
    r"(^|_)(len|lengths?|tokens?|turns?|seconds?|secs?|time|counts?|steps?|num|size|id)(_|$)", re.I
)
"""Words in the names of columns that measure a response and do not reward it."""
GROUPS = ("group", "prompt_id")
"""Columns that name groups."""
_ROUNDING = 1e-6
"""Differences of rewards, and log-probs above 0, that are only rounding."""
_UNBALANCED = 1e-3
"""Sum of a group's advantages, which is 0 but for rounding of rewards and means, relative to that of their sizes."""

_SCHEMA = {
    "prompt": pa.string(),
    "completion": pa.string(),
    "prompt_ids": pa.list_(pa.int64()),
    "completion_ids": pa.list_(pa.int64()),
    "truncated": pa.bool_(),
    "group": pa.int64(),
    "reward": pa.float64(),
    "advantage": pa.float64(),
    "old_logprobs": pa.list_(pa.float64()),
    "sampling_logprobs": pa.list_(pa.float64()),
    "loss_tokens": pa.float64(),
    "row": pa.string(),
    "bias_flags": pa.list_(pa.string()),
    "doubts": pa.list_(pa.string()),
}


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
    """Read a rollout file (`.jsonl` or `.parquet`; the columns stand at the top of this module), or a log of a run.

    The column `advantage`, which TRL logs and `write_rollouts` writes, is what the update was made with, whatever
    weights and scales its rewards had. Rewards beside it are described and nothing more, and only where they
    explain it.

    The reward is the sum of `config.reward_columns`; without it the first column of `TOTALS`; without that the one
    column of numbers that may be a reward, and of several of these none is chosen. Beside a column `advantage` it is
    the sum of them all, as TRL logs one column for each reward function. In a sum, None and NaN mean that a function
    did not apply, and are left out.

    Without `completion_ids` the completion's text is tokenised, and the batch is marked `retokenized`. How a response
    ended is read from the file, else it follows from `stop_strings` and `max_new_tokens`; EOS is added only where one
    of these says that it was sampled. Where neither does, the batch is marked `ended_without_eos`; `doubts` says of
    every response what is not certain about it. Responses longer than `max_new_tokens` of whose ends the file says
    nothing show that it was made with another cap: the batch is marked `unknown_cap`.

    Groups are those of the explicit column, else runs of rows with the same prompt. A prompt that was drawn twice in
    a row makes one run of two groups: where there are advantages, which add up to 0 in every group, runs are cut into
    groups of one size, `config.G` if that fits, else the smallest that does.

    Args:
        path: the file.
        tokenizer: of the policy.
        config: `reward_columns`, `max_prompt_tokens`, and how messages are rendered.
        max_new_tokens: the cap on tokens that the responses were sampled with.
        vocabulary: number of tokens the model knows, for the check of exact ids; models often have more than
            their tokenizer names, and sample them. By default the tokenizer's.
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
    own = tokenizer.eos_token_id
    known = [*(() if own is None else (own,)), *(() if eos_ids is None else eos_ids)]
    rules = EndRules(tuple(dict.fromkeys(known)), tuple(stop_strings), max_new_tokens)
    prompts = _read_prompts(table, tokenizer, vocabulary, rendering_of(config))
    if config.max_prompt_tokens is not None:
        check_prompt_tokens([len(ids) for ids in prompts.ids], config.max_prompt_tokens)
    responses, flags = _read_responses(table, tokenizer, rules, vocabulary)
    ids = [response.ids for response in responses]
    completion_ids, mask = _pad(ids, torch.int64)
    advantages = _read_advantages(table)
    group = _read_group(table, advantages, config.G)
    doubts = [
        tuple(dict.fromkeys([*before, *response.doubts, *(["prompt"] if open_ else [])]))
        for before, response, open_ in zip(
            _read_texts(table, "doubts"), responses, prompts.unsure, strict=True
        )
    ]
    unsure = ["prompt_uncertain"] if any(prompts.unsure) else []
    return RolloutBatch(
        prompts=tuple(prompts.texts),
        completions=tuple(response.text for response in responses),
        prompt_ids=tuple(map(tuple, prompts.ids)),
        completion_ids=completion_ids,
        mask=mask,
        truncated=torch.tensor([response.truncated for response in responses]),
        group=group,
        rewards=_read_rewards(table, config.reward_columns, group, advantages, part),
        advantages=advantages,
        old_logprobs=_read_logprobs(table, "old_logprobs", ids),
        sampling_logprobs=_read_logprobs(table, "sampling_logprobs", ids, gaps=True),
        loss_tokens=_read_loss_tokens(table),
        rows=_read_rows(table, prompts.messages),
        source=table.path,
        bias_flags=tuple(
            dict.fromkeys([*(f for own in _read_texts(table, "bias_flags") for f in own), *flags, *unsure])
        ),
        doubts=tuple(doubts) if any(doubts) else (),
        places=_read_places(table, prompts.ids),
    )


def write_rollouts(path: str | Path, batch: RolloutBatch) -> Path:
    """Write a batch as `.jsonl` or `.parquet` with its exact token ids.

    `read_rollouts` gives an equal batch back, but for `source` and padding. Rows of the data set are kept as JSON;
    what JSON cannot hold is written as text.

    Args:
        path: the file; its ending says which format.
        batch: what is written.

    Returns:
        The path.

    Raises:
        DataError: the ending is another, or a number of the batch is not finite.
        LogError: the file cannot be written.
    """
    columns: dict[str, list[Any]] = {
        "prompt": list(batch.prompts),
        "completion": list(batch.completions),
        "prompt_ids": [list(ids) for ids in batch.prompt_ids],
        "completion_ids": _ragged(batch.completion_ids, batch.mask),
        "truncated": batch.truncated.tolist(),
        "group": batch.group.tolist(),
        "bias_flags": [list(batch.bias_flags)] * len(batch),
    }
    for name, values in (("reward", batch.rewards), ("advantage", batch.advantages)):
        if values is not None:
            columns[name] = _require_finite(values.to(torch.float64), name).tolist()
    if batch.old_logprobs is not None:
        _require_finite(batch.old_logprobs[batch.mask], "old_logprobs")
        columns["old_logprobs"] = _ragged(batch.old_logprobs.to(torch.float64), batch.mask)
    if batch.sampling_logprobs is not None:
        given = _ragged(batch.sampling_logprobs.to(torch.float64), batch.mask)
        columns["sampling_logprobs"] = [[None if math.isnan(x) else x for x in row] for row in given]
    if batch.loss_tokens is not None:
        columns["loss_tokens"] = [batch.loss_tokens] * len(batch)
    if batch.doubts:
        columns["doubts"] = [list(own) for own in batch.doubts]
    if batch.rows:
        columns["row"] = [json.dumps(dict(row), default=str) for row in batch.rows]
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(batch))]
    return write_table(path, rows, pa.schema([(name, _SCHEMA[name]) for name in columns]))


@dataclass(frozen=True)
class _Prompts:
    """The prompts of a file: texts, token ids, (of conversations) messages, and which of them are not certain."""

    texts: list[str]
    ids: list[list[int]]
    messages: list[list[dict[str, Any]] | None]
    unsure: list[bool]


def _read_prompts(
    table: RolloutTable, tokenizer: PreTrainedTokenizerBase, vocabulary: int, rendering: Rendering
) -> _Prompts:
    """The text, the token ids and (of conversations) the messages of each prompt."""
    exact = _read_ids(table, "prompt_ids", vocabulary) if "prompt_ids" in table.columns else None
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
    return found


def _read_responses(
    table: RolloutTable, tokenizer: PreTrainedTokenizerBase, rules: EndRules, vocabulary: int
) -> tuple[list[Response], list[str]]:
    """The responses by their exact ids where there are some, else by their text; and the batch's flags."""
    exact = "completion_ids" in table.columns
    stated = stated_ends(table)
    if exact:
        ids = _read_ids(table, "completion_ids", vocabulary)
        logged = table.column("completion") if "completion" in table.columns else [None] * len(ids)
        texts = [_logged_text(value, own, tokenizer) for value, own in zip(logged, ids, strict=True)]
    else:
        values = table.column("completion")
        texts = [_completion_text(value, f"{table.where(i)}, completion") for i, value in enumerate(values)]
        ids = [[int(t) for t in own] for own in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    if not any(ids):
        raise RolloutError(
            f"{table.path}: expected a response with tokens, found all {len(ids)} of them empty"
        )
    _check_ends(table, ids, rules.eos_ids, "completion_ids" if exact else "completion")
    responses = [Response(list(own), text) for own, text in zip(ids, texts, strict=True)]
    if exact:
        end_exact(responses, stated, rules, tokenizer)
    else:
        recovery = Recovery(tokenizer)
        for response in responses:
            response.doubts += recovery.doubts(response.text, response.ids)
        end_texts(table.path, responses, stated, rules, tokenizer)
    flags = [] if exact else ["retokenized"]
    longer = sum(response.longer for response in responses)
    if longer:
        flags.append("unknown_cap")
        logger.warning(
            "%s: %d of %d responses have more than generation.max_new_tokens = %d tokens and count as "
            "cut off unless they end with EOS; set it to the cap they were sampled with, or add a column "
            "truncated",
            table.path,
            longer,
            len(ids),
            rules.max_new_tokens,
        )
    if any("no_end" in response.doubts for response in responses):
        flags.append("ended_without_eos")
    return responses, flags


def _check_ends(table: RolloutTable, ids: list[list[int]], eos_ids: Sequence[int], name: str) -> None:
    """Refuse what the policy cannot have sampled: what follows an EOS, and what a mask leaves out.

    Padding after EOS cannot be told from sampled tokens by its id, so it must not be there.
    """
    for i, own in enumerate(ids):
        first = next((t for t, token in enumerate(own[:-1]) if token in eos_ids), None)
        if first is not None:
            raise DataError(
                f"{table.where(i)}: expected {name} to end with their first EOS ({own[first]}), found "
                f"{len(own) - first - 1} tokens after it; cut padding off"
            )
    for mask_name in TOKEN_MASKS:
        if mask_name not in table.columns:
            continue
        for i, mask in enumerate(table.column(mask_name)):
            if mask is not None and (len(mask) != len(ids[i]) or not all(mask)):
                raise DataError(
                    f"{table.where(i)}: expected {mask_name} to be 1 for each of the {len(ids[i])} completion_ids, "
                    "found others; tokens that the policy did not sample cannot be part of a response here"
                )


def _completion_text(value: Any, where: str) -> str:
    """The text of a logged completion: a text, or one message of the assistant with nothing but text."""
    if isinstance(value, str):
        return value
    messages = check_messages(value, where)
    if len(messages) > 1 or set(messages[0]) != {"role", "content"} or messages[0]["role"] != "assistant":
        found = ", ".join(f"{message['role']} ({', '.join(message)})" for message in messages)
        raise DataError(
            f"{where}: expected one assistant message with role and content, found {found}; its text is not "
            "all that the policy sampled, add a column completion_ids with the sampled tokens"
        )
    return messages[0]["content"]


def _logged_text(value: Any, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a completion whose ids are known."""
    return value if isinstance(value, str) else str(tokenizer.decode(ids, skip_special_tokens=True))


def _read_ids(table: RolloutTable, name: str, vocabulary: int) -> list[list[int]]:
    """A column of token ids."""
    values = table.column(name)
    for i, ids in enumerate(values):
        if not isinstance(ids, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in ids):
            raise DataError(
                f"{table.where(i)}: expected {name} to be a list of token ids, found {str(ids)[:60]}"
            )
        outside = [t for t in ids if not 0 <= t < vocabulary]
        if outside:
            raise DataError(
                f"{table.where(i)}: expected {name} below the {vocabulary} tokens of the policy's vocabulary, found "
                f"{outside[0]}; the file was made with another tokenizer"
            )
    return values


def _read_logprobs(table: RolloutTable, name: str, ids: list[list[int]], gaps: bool = False) -> Tensor | None:
    """A column of log-probs, `(B, T)` float64 with 0 where there is no token, NaN for null where `gaps` are allowed."""
    if name not in table.columns:
        return None
    values = table.column(name)
    for i, (logprobs, own) in enumerate(zip(values, ids, strict=True)):
        if gaps and isinstance(logprobs, list):
            values[i] = logprobs = [math.nan if x is None else x for x in logprobs]
        if not isinstance(logprobs, list) or not all(_is_number(value) for value in logprobs):
            raise DataError(
                f"{table.where(i)}: expected {name} to be a list of numbers, found {logprobs!r:.60}"
            )
        if len(logprobs) != len(own):
            raise DataError(
                f"{table.where(i)}: expected {name} for {len(own)} tokens, found {len(logprobs)}; add "
                "a column completion_ids with the tokens they belong to, EOS included"
            )
        wrong = [
            value
            for value in logprobs
            if not (gaps and math.isnan(_as_float(value))) and not -math.inf < _as_float(value) <= _ROUNDING
        ]
        if wrong:
            raise DataError(
                f"{table.where(i)}: expected {name} to be finite and not above 0, found {wrong[0]!s:.60}"
            )
    return _pad(values, torch.float64)[0]


def _read_loss_tokens(table: RolloutTable) -> float | None:
    """The column `loss_tokens`."""
    if "loss_tokens" not in table.columns:
        return None
    found = set(table.column("loss_tokens"))
    number = next(iter(found))
    if len(found) != 1 or not _is_number(number) or not 0 < _as_float(number) < math.inf:
        raise DataError(
            f"{table.path}: expected one positive number in all rows of the column loss_tokens, found "
            f"{', '.join(f'{x!s:.60}' for x in list(found)[:3])}"
        )
    return float(number)


def _read_advantages(table: RolloutTable) -> Tensor | None:
    """The column `advantage`, `(B,)` float64."""
    if "advantage" not in table.columns:
        return None
    values = table.column("advantage")
    for i, value in enumerate(values):
        if not _is_number(value) or not math.isfinite(_as_float(value)):
            raise DataError(f"{table.where(i)}: expected a finite number as advantage, found {value!r:.60}")
    return torch.tensor(values, dtype=torch.float64)


def _read_group(table: RolloutTable, advantages: Tensor | None, G: int) -> Tensor:
    """The group of each row, `(B,)` int64."""
    name = next((name for name in GROUPS if name in table.columns), None)
    if name is None:
        prompts = table.column("prompt" if "prompt" in table.columns else "prompt_ids")
        runs = _group_by_prompt(prompts)
        if advantages is not None:
            return _cut_runs(runs, advantages, G)
        sizes = runs.unique_consecutive(return_counts=True)[1]
        names = [json.dumps(prompts[i], default=str) for i in (sizes.cumsum(0) - 1).tolist()]
        often = Counter(names)
        alone = sum(size == 1 and often[name] > 1 for size, name in zip(sizes.tolist(), names, strict=True))
        if 2 * alone > len(sizes):
            raise DataError(
                f"{table.path}: expected the responses to one draw of a prompt one after the other, or a column group "
                f"that names them, found {len(often)} prompts in {len(sizes)} runs of {int(sizes.min())} to "
                f"{int(sizes.max())} rows; add the column, or sort the rows"
            )
        return runs
    values = table.column(name)
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise DataError(f"{table.where(i)}: expected {name} to be an integer or a text, found {value!r}")
    if all(isinstance(value, int) and abs(value) < 2**63 for value in values):
        return torch.tensor(values, dtype=torch.int64)
    codes: dict[Any, int] = {}
    return torch.tensor([codes.setdefault(value, len(codes)) for value in values], dtype=torch.int64)


def _read_places(
    table: RolloutTable, prompt_ids: Sequence[Sequence[int]]
) -> tuple[tuple[Hashable, int], ...]:
    """The name of each row's group, as the file gives it, and the row's place among those of its prompt and group.

    In a file without names all rows of a prompt are one group.
    """
    name = next((name for name in GROUPS if name in table.columns), None)
    labels = [None] * len(prompt_ids) if name is None else table.column(name)
    counts: Counter[Hashable] = Counter()
    places = []
    for ids, label in zip(prompt_ids, labels, strict=True):
        key = (tuple(ids), label)
        places.append((label, counts[key]))
        counts[key] += 1
    return tuple(places)


def _group_by_prompt(prompts: Sequence[Any]) -> Tensor:
    """Runs of equal prompts: the members of a group are logged one after the other."""
    starts = [i == 0 or prompts[i] != prompts[i - 1] for i in range(len(prompts))]
    return torch.tensor(starts).to(torch.int64).cumsum(0) - 1


def _cut_runs(runs: Tensor, advantages: Tensor, G: int) -> Tensor:
    """Runs of one prompt cut into groups of one size in which advantages add up to 0; the runs where none fits."""
    lengths = runs.unique_consecutive(return_counts=True)[1]
    common = math.gcd(*lengths.tolist())
    sizes = [G] if G >= 2 and common % G == 0 else []
    sizes += [size for size in range(2, common + 1) if common % size == 0]
    for size in sizes:
        blocks = advantages.view(-1, size)
        if bool((blocks.sum(1).abs() <= _UNBALANCED * blocks.abs().sum(1) + _ROUNDING * size).all()):
            return torch.arange(len(blocks)).repeat_interleave(size)
    return runs


def _read_rewards(
    table: RolloutTable, names: list[str] | None, group: Tensor, advantages: Tensor | None, part: Part | None
) -> Tensor | None:
    """The reward of each row, `(B,)` float64, or None where the file has none, or none that explains `advantages`."""
    if names is not None:
        for name in names:
            if name not in table.columns:
                raise DataError(
                    f"batch_config.reward_columns: expected a column {name!r} in {table.path}, found "
                    f"{', '.join(table.columns)}{nearest(name, table.columns)}"
                )
        return _sum_columns(table, names)
    logged = [name for name in table.columns if _may_be_reward(table, name)]
    total = [name for name in TOTALS if name in table.columns][:1]
    if advantages is None and not total and len(logged) > 1:
        if part == "E":
            return None  # nothing is made from E's rewards
        raise DataError(
            f"{table.path}: expected one column with the reward (or a column advantage beside several), "
            f"found {', '.join(logged)}; name those that add up to it with batch_config.reward_columns"
        )
    if advantages is None:
        candidates = [total or logged]
    else:
        candidates = [[*total, *logged], total]
    for chosen in filter(None, candidates):
        if advantages is not None and not _is_complete(table, chosen):
            continue
        rewards = _sum_columns(table, chosen)
        if advantages is None or _explain(rewards, advantages, group):
            logger.info("%s: the reward is the sum of %s", table.path, ", ".join(chosen))
            return rewards
    if advantages is not None and (total or logged):
        logger.info(
            "%s: advantages are those of the column; no sum of %s explains them, so that no rewards are described "
            "(name them with batch_config.reward_columns)",
            table.path,
            ", ".join([*total, *logged]),
        )
    return None


def _is_complete(table: RolloutTable, names: Sequence[str]) -> bool:
    """Whether every row has a finite number in at least one of the columns."""
    return all(
        any(_is_number(row[n]) and math.isfinite(_as_float(row[n])) for n in names) for row in table.rows
    )


def _may_be_reward(table: RolloutTable, name: str) -> bool:
    """Whether a column holds numbers and has no other meaning."""
    if name in NOT_REWARDS or name.startswith("__") or _MEASURED.search(name):
        return False
    values = [value for value in table.column(name) if value is not None]
    return bool(values) and all(_is_number(value) for value in values)


def _sum_columns(table: RolloutTable, names: Sequence[str]) -> Tensor:
    """The sum of reward columns, without the parts that do not apply."""
    sums = []
    for i, row in enumerate(table.rows):
        for name in names:
            if row[name] is not None and not _is_number(row[name]):
                raise DataError(f"{table.where(i)}: expected a number as {name}, found {row[name]!r:.60}")
        given = [_as_float(row[name]) for name in names if row[name] is not None]
        parts = [value for value in given if not math.isnan(value)]
        if not parts or not all(map(math.isfinite, parts)):
            found = ", ".join(f"{name} = {row[name]!s:.60}" for name in names)
            raise DataError(
                f"{table.where(i)}: expected a finite reward, found {found}; leave its whole group out"
            )
        sums.append(math.fsum(parts))
    return torch.tensor(sums, dtype=torch.float64)


def _explain(rewards: Tensor, advantages: Tensor, group: Tensor) -> bool:
    """Whether a sum of columns is the reward: TRL weights its functions, and logs columns of the user's own too."""
    members = [group == one for one in group.unique()]
    return all(
        _are_proportional(rewards[m] - rewards[m].mean(), advantages[m] - advantages[m].mean())
        for m in members
    )


def _are_proportional(rewards: Tensor, advantages: Tensor) -> bool:
    """Whether centred rewards are the centred advantages times a positive number, within rounding."""
    if float(rewards.abs().max()) < _ROUNDING:
        # In float32 a constant group's advantage is rounding over 1e-4, the constant in its denominator.
        return float(advantages.abs().max()) < 0.01
    cosine = (rewards @ advantages) / (rewards.norm() * advantages.norm())
    return float(cosine) > 0.999


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


def _pad(values: Sequence[list[Any]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(B, T)` values, 0 beyond each row's end, and the mask of the entries that are there."""
    lengths = torch.tensor([len(own) for own in values])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = torch.zeros(mask.shape, dtype=dtype)
    padded[mask] = torch.tensor([value for own in values for value in own], dtype=dtype)
    return padded, mask


def _ragged(values: Tensor, mask: Tensor) -> list[list[Any]]:
    """The rows of a padded tensor, without padding."""
    return [row[own].tolist() for row, own in zip(values, mask, strict=True)]


def _require_finite(values: Tensor, name: str) -> Tensor:
    """The values, if all are finite."""
    if not bool(values.isfinite().all()):
        raise DataError(
            f"{name}: expected finite numbers to write, found {values[~values.isfinite()][0].item()}"
        )
    return values


def _is_number(value: Any) -> bool:
    """Whether a value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_float(value: float) -> float:
    """A number as a float; infinite where it is an integer that no float can hold."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
