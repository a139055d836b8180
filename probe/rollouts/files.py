"""Rollout batches from and to files: those that TRL logs, those of a loop of one's own, and exact ones.

The columns of a file:

- `prompt`, `completion`: texts, or lists of messages. Needed.
- rewards: see `read_rollouts`. Optional.
- `prompt_ids`, `completion_ids`: token ids, taken as they are. Without the latter the text is tokenised
  again, which need not give the tokens that were sampled.
- `old_logprobs`: log-probs of the response's tokens under the policy that sampled.
- `sampling_logprobs`: those that the engine which sampled gave, null for a token that it gave none for.
- `truncated`: whether the cap on tokens ended the response.
- `group` or `prompt_id`: equal for the responses to the same draw of a prompt.
- `step`: the update that the rows were used for; it has to be the one after the checkpoint's, where that is known.
- `row`: the data set's row, `bias_flags`: those of the batch; both written by `write_rollouts`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
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
from probe.data.prompts import check_messages, check_prompt_tokens, render_messages
from probe.errors import DataError, RolloutError
from probe.rollouts.tables import RolloutTable, read_table, write_table

logger = logging.getLogger(__name__)

# fmt: off
LAYOUT = frozenset({
    "step", "prompt", "completion", "prompt_ids", "completion_ids", "old_logprobs",
    "sampling_logprobs", "truncated", "group", "prompt_id", "reward", "advantage", "row", "bias_flags"
})
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
    "row": pa.string(),
    "bias_flags": pa.list_(pa.string()),
}


def read_rollouts(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    config: BatchConfig,
    max_new_tokens: int,
    vocabulary: int | None = None,
    update: int | None = None,
) -> RolloutBatch:
    """Read a rollout file (`.jsonl` or `.parquet`; the columns stand at the top of this module).

    The column `advantage`, which TRL logs and `write_rollouts` writes, is what the update was made with, whatever
    weights and scales its rewards had. Rewards beside it are described and nothing more, and only where they
    explain it.

    The reward is the sum of `config.reward_columns`; without it the column `reward`; without that, or beside a column
    `advantage`, the sum of every column of numbers that is not in `NOT_REWARDS`, as TRL logs one column for each reward
    function. In a sum, None and NaN mean that a function did not apply, and are left out.

    Without `completion_ids` the completion's text is tokenised, and EOS is added unless the response was
    truncated: by the column `truncated`, else where it has `max_new_tokens` tokens or more. The batch is then
    marked `retokenized`. Responses longer than `max_new_tokens` without a column `truncated` show that the
    file was made
    with another cap: the batch is marked `unknown_cap`. The mask comes from the numbers of tokens alone.

    Groups are those of the explicit column, else runs of rows with the same prompt. A prompt that was drawn twice in
    a row makes one run of two groups: where there are advantages, which add up to 0 in every group, runs are cut into
    groups of one size, `config.G` if that fits, else the smallest that does.

    Args:
        path: the file.
        tokenizer: of the policy.
        config: `reward_columns` and `max_prompt_tokens`.
        max_new_tokens: the cap on tokens that the responses were sampled with.
        vocabulary: number of tokens the model knows, for the check of exact ids; models often have more than
            their tokenizer names, and sample them. By default the tokenizer's.
        update: number of the update whose rows are wanted, see `read_table`.

    Returns:
        The batch, with advantages where the file has them; `source` is the path.

    Raises:
        DataError: the file or a column is missing or malformed; messages name the row, counted from 0.
        RolloutError: all responses are empty.
    """
    table = read_table(path, update)
    vocabulary = len(tokenizer) if vocabulary is None else vocabulary
    prompts, prompt_ids, messages = _read_prompts(table, tokenizer, vocabulary)
    if config.max_prompt_tokens is not None:
        check_prompt_tokens([len(ids) for ids in prompt_ids], config.max_prompt_tokens)
    found = _read_responses(table, tokenizer, max_new_tokens, vocabulary)
    completion_ids, mask = _pad(found.ids, torch.int64)
    advantages = _read_advantages(table)
    group = _read_group(table, advantages, config.G)
    return RolloutBatch(
        prompts=tuple(prompts),
        completions=tuple(found.texts),
        prompt_ids=tuple(map(tuple, prompt_ids)),
        completion_ids=completion_ids,
        mask=mask,
        truncated=torch.tensor(found.truncated),
        group=group,
        rewards=_read_rewards(table, config.reward_columns, group, advantages),
        advantages=advantages,
        old_logprobs=_read_logprobs(table, "old_logprobs", found.ids),
        sampling_logprobs=_read_logprobs(table, "sampling_logprobs", found.ids, gaps=True),
        rows=_read_rows(table, messages),
        source=table.path,
        bias_flags=tuple(dict.fromkeys([*_read_flags(table), *found.bias_flags])),
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
    if batch.rows:
        columns["row"] = [json.dumps(dict(row), default=str) for row in batch.rows]
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(batch))]
    return write_table(path, rows, pa.schema([(name, _SCHEMA[name]) for name in columns]))


@dataclass(frozen=True)
class _Responses:
    """The responses of a file: token ids, texts, which were cut off, and what is uncertain about them."""

    ids: list[list[int]]
    texts: list[str]
    truncated: list[bool]
    bias_flags: list[str]


def _read_prompts(
    table: RolloutTable, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> tuple[list[str], list[list[int]], list[list[dict[str, Any]] | None]]:
    """The text, the token ids and (of conversations) the messages of each prompt."""
    values = table.column("prompt")
    exact = _read_ids(table, "prompt_ids", vocabulary) if "prompt_ids" in table.columns else None
    texts: list[str] = []
    all_ids: list[list[int]] = []
    all_messages: list[list[dict[str, Any]] | None] = []
    for i, value in enumerate(values):
        messages = None if isinstance(value, str) else check_messages(value, f"{table.where(i)}, prompt")
        if exact is not None:
            ids = exact[i]
            text = value if messages is None else str(tokenizer.decode(ids))
        else:
            text = value if messages is None else render_messages(tokenizer, messages, table.where(i))
            # A chat template writes the special tokens itself.
            ids = [int(t) for t in tokenizer(text, add_special_tokens=messages is None)["input_ids"]]
        if not ids:
            raise DataError(
                f"{table.where(i)}: expected a prompt of at least one token, found none in {text!r}"
            )
        texts.append(text)
        all_ids.append(ids)
        all_messages.append(messages)
    return texts, all_ids, all_messages


def _read_responses(
    table: RolloutTable, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, vocabulary: int
) -> _Responses:
    """The responses by their exact ids where there are some, else by their text."""
    values = table.column("completion")
    exact = "completion_ids" in table.columns
    if exact:
        ids = _read_ids(table, "completion_ids", vocabulary)
        texts = [_logged_text(value, own, tokenizer) for value, own in zip(values, ids, strict=True)]
    else:
        texts = [_completion_text(value, f"{table.where(i)}, completion") for i, value in enumerate(values)]
        ids = [[int(t) for t in own] for own in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    if not any(ids):
        raise RolloutError(
            f"{table.path}: expected a response with tokens, found all {len(ids)} of them empty"
        )
    flags = [] if exact else ["retokenized"]
    if "truncated" in table.columns:
        truncated = _read_truncated(table)
    else:
        truncated, longer = _infer_truncated(table.path, ids, tokenizer.eos_token_id, max_new_tokens)
        flags += ["unknown_cap"] if longer else []
    if exact:
        _check_ends(table, ids, tokenizer.eos_token_id)
        if "truncated" not in table.columns:  # nothing says that such a response is complete
            ends = [
                own[-1] == tokenizer.eos_token_id
                for own, cut in zip(ids, truncated, strict=True)
                if own and not cut
            ]
            flags += [] if all(ends) else ["ended_without_eos"]
    else:
        ids = _end_with_eos(table.path, ids, truncated, tokenizer.eos_token_id)
    return _Responses(ids, texts, truncated, flags)


def _check_ends(table: RolloutTable, ids: list[list[int]], eos: int | None) -> None:
    """Refuse ids that the policy cannot have sampled: what follows an EOS, and what a mask leaves out.

    Padding after EOS cannot be told from sampled tokens by its id, so it must not be there.
    """
    for i, own in enumerate(ids):
        if eos is not None and eos in own[:-1]:
            raise DataError(
                f"{table.where(i)}: expected completion_ids to end with their first EOS ({eos}), found "
                f"{len(own) - own.index(eos) - 1} tokens after it; cut padding off"
            )
    for name in ("completion_mask", "tool_mask"):
        if name not in table.columns:
            continue
        for i, mask in enumerate(table.column(name)):
            if mask is not None and (len(mask) != len(ids[i]) or not all(mask)):
                raise DataError(
                    f"{table.where(i)}: expected {name} to be 1 for each of the {len(ids[i])} completion_ids, found "
                    "others; tokens that the policy did not sample cannot be part of a response here"
                )


def _infer_truncated(
    path: str, ids: list[list[int]], eos: int | None, max_new_tokens: int
) -> tuple[list[bool], int]:
    """Which responses the cap ended, by their length, and how many are longer than it."""
    # A response that ends with EOS is complete, also where that is its last allowed token.
    truncated = [len(own) >= max_new_tokens and own[-1] != eos for own in ids]
    longer = sum(len(own) > max_new_tokens for own in ids)
    if longer:
        logger.warning(
            "%s: %d of %d responses have more than generation.max_new_tokens = %d tokens and count as "
            "cut off unless they end with EOS; set it to the cap they were sampled with, or add a column "
            "truncated",
            path,
            longer,
            len(ids),
            max_new_tokens,
        )
    return truncated, longer


def _end_with_eos(path: str, ids: list[list[int]], truncated: list[bool], eos: int | None) -> list[list[int]]:
    """The ids with EOS, which logged texts lack, after every response that was not truncated."""
    if all(truncated):
        return ids
    if eos is None:
        raise DataError(
            f"{path}: expected a tokenizer with an EOS token to end the responses with, found none; set the "
            "tokenizer's eos_token, or add a column completion_ids"
        )
    complete = [cut or own[-1:] == [eos] for own, cut in zip(ids, truncated, strict=True)]
    return [own if done else [*own, eos] for own, done in zip(ids, complete, strict=True)]


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


def _read_truncated(table: RolloutTable) -> list[bool]:
    """The column `truncated`."""
    values = table.column("truncated")
    for i, value in enumerate(values):
        if not isinstance(value, bool):
            raise DataError(f"{table.where(i)}: expected truncated to be true or false, found {value!r}")
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
            if not (gaps and math.isnan(value)) and not -math.inf < value <= _ROUNDING
        ]
        if wrong:
            raise DataError(
                f"{table.where(i)}: expected {name} to be finite and not above 0, found {wrong[0]}"
            )
    return _pad(values, torch.float64)[0]


def _read_advantages(table: RolloutTable) -> Tensor | None:
    """The column `advantage`, `(B,)` float64."""
    if "advantage" not in table.columns:
        return None
    values = table.column("advantage")
    for i, value in enumerate(values):
        if not _is_number(value) or not math.isfinite(value):
            raise DataError(f"{table.where(i)}: expected a finite number as advantage, found {value!r:.60}")
    return torch.tensor(values, dtype=torch.float64)


def _read_group(table: RolloutTable, advantages: Tensor | None, G: int) -> Tensor:
    """The group of each row, `(B,)` int64."""
    name = next((name for name in ("group", "prompt_id") if name in table.columns), None)
    if name is None:
        runs = _group_by_prompt(table.column("prompt"))
        return runs if advantages is None else _cut_runs(runs, advantages, G)
    values = table.column(name)
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise DataError(f"{table.where(i)}: expected {name} to be an integer or a text, found {value!r}")
    if all(isinstance(value, int) for value in values):
        return torch.tensor(values, dtype=torch.int64)
    codes: dict[Any, int] = {}
    return torch.tensor([codes.setdefault(value, len(codes)) for value in values], dtype=torch.int64)


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
    table: RolloutTable, names: list[str] | None, group: Tensor, advantages: Tensor | None
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
    total = ["reward"] if "reward" in table.columns else []
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
    return all(any(_is_number(row[n]) and math.isfinite(row[n]) for n in names) for row in table.rows)


def _may_be_reward(table: RolloutTable, name: str) -> bool:
    """Whether a column holds numbers and has no other meaning."""
    if name in NOT_REWARDS or name.startswith("__"):
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
        parts = [float(row[name]) for name in names if row[name] is not None and not math.isnan(row[name])]
        if not parts or not all(map(math.isfinite, parts)):
            found = ", ".join(f"{name} = {row[name]}" for name in names)
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
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{where}: expected row to be JSON, found {value[:60]!r} ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected row to be a mapping of columns, found {type(value).__name__}")
    return value


def _read_flags(table: RolloutTable) -> list[str]:
    """The bias flags that the rows name."""
    if "bias_flags" not in table.columns:
        return []
    values = table.column("bias_flags")
    for i, flags in enumerate(values):
        if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
            raise DataError(
                f"{table.where(i)}: expected bias_flags to be a list of texts, found {flags!r:.60}"
            )
    return [flag for flags in values for flag in flags]


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
