"""Rewards and advantages of a rollout file."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from probe.errors.exceptions import DataError, nearest
from probe.rollouts.cells import ROUNDING, as_float, is_number
from probe.rollouts.foreign import TOTALS
from probe.rollouts.stated_ends import END_COLUMNS
from probe.rollouts.tables import Part, RolloutTable

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
_MEASURED = re.compile(
    r"(^|_)(len|lengths?|tokens?|turns?|contribution|seconds?|secs?|time|counts?|steps?|num|size|id)(_|$)",
    re.I,
)
"""Words in the names of columns that measure a response and do not reward it."""


def read_advantages(table: RolloutTable) -> Tensor | None:
    """The column `advantage`, `(B,)` float64."""
    if "advantage" not in table.columns:
        return None
    values = table.column("advantage")
    for i, value in enumerate(values):
        if not is_number(value) or not math.isfinite(as_float(value)):
            raise DataError(f"{table.where(i)}: expected a finite number as advantage, found {value!r:.60}")
    return torch.tensor(values, dtype=torch.float64)


def read_rewards(
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
        any(is_number(row[n]) and math.isfinite(as_float(row[n])) for n in names) for row in table.rows
    )


def _may_be_reward(table: RolloutTable, name: str) -> bool:
    """Whether a column holds numbers and has no other meaning."""
    if name in NOT_REWARDS or name.startswith("__") or _MEASURED.search(name):
        return False
    values = [value for value in table.column(name) if value is not None]
    return bool(values) and all(is_number(value) for value in values)


def _sum_columns(table: RolloutTable, names: Sequence[str]) -> Tensor:
    """The sum of reward columns, without the parts that do not apply."""
    sums = []
    for i, row in enumerate(table.rows):
        for name in names:
            if row[name] is not None and not is_number(row[name]):
                raise DataError(f"{table.where(i)}: expected a number as {name}, found {row[name]!r:.60}")
        given = [as_float(row[name]) for name in names if row[name] is not None]
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
    if float(rewards.abs().max()) < ROUNDING:
        # In float32 a constant group's advantage is rounding over 1e-4, the constant in its denominator.
        return float(advantages.abs().max()) < 0.01
    cosine = (rewards @ advantages) / (rewards.norm() * advantages.norm())
    return float(cosine) > 0.999
