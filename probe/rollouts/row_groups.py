"""Which rows of a rollout file belong to one prompt."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from probe.errors.exceptions import DataError
from probe.rollouts.cells import ROUNDING
from probe.rollouts.tables import RolloutTable

GROUPS = ("group", "prompt_id")
"""Columns that name groups."""
_UNBALANCED = 1e-3
"""Sum of a group's advantages, which is 0 but for rounding of rewards and means, relative to that of their sizes."""


def read_group(table: RolloutTable, advantages: Tensor | None, G: int) -> Tensor:
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


def read_places(table: RolloutTable, prompt_ids: Sequence[Sequence[int]]) -> tuple[tuple[Hashable, int], ...]:
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
        if bool((blocks.sum(1).abs() <= _UNBALANCED * blocks.abs().sum(1) + ROUNDING * size).all()):
            return torch.arange(len(blocks)).repeat_interleave(size)
    return runs
