"""Which responses and prompts of two logs are the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from probe.report.logged_run import LoggedRun

PAIRED = "rerun B with --batch_config.E_rollouts {a}, or with A's seed_everything and sizes of E"
"""What makes two runs one E."""


def same_responses(a: LoggedRun, b: LoggedRun) -> list[int] | None:
    """Which response of B is each one of A; None where they are not the same responses in the same groups.

    Groups are matched by what is in them, equal ones in the order of the logs. Any order of those is right: they have
    equal influences without control variates, and with them influences of different folds, one as good as the other.
    """
    if a.responses == b.responses and torch.equal(a.rank, b.rank):
        return list(range(len(a.records)))
    there: dict[tuple[Any, ...], list[list[int]]] = defaultdict(list)
    for content, rows in _groups(b):
        there[content].append(rows)
    order = [-1] * len(a.records)
    for content, rows in _groups(a):
        if not there[content]:
            return None
        for own, other in zip(rows, there[content].pop(0), strict=True):
            order[own] = other
    return None if any(there.values()) else order


def _groups(run: LoggedRun) -> Iterator[tuple[tuple[Any, ...], list[int]]]:
    """The content of every group, and its rows in the order of that."""
    rows: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(run.rank.tolist()):
        rows[group].append(i)
    for members in rows.values():
        members.sort(key=lambda i: run.responses[i])
        yield tuple(run.responses[i] for i in members), members


def same_prompts(a: LoggedRun, b: LoggedRun) -> Tensor | None:
    """For B's responses the groups of A that have the same prompts; None where the two E are of other prompts.

    Several draws of one prompt are exchangeable.
    """
    there: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for group, prompt in reversed(_prompts(a).items()):
        there[prompt].append(group)
    renamed: dict[int, int] = {}
    for group, prompt in _prompts(b).items():
        if not there[prompt]:
            return None
        renamed[group] = there[prompt].pop()
    if any(there.values()):
        return None
    return torch.tensor([renamed[group] for group in b.group.tolist()], dtype=torch.int64)


def _prompts(run: LoggedRun) -> dict[int, tuple[int, ...]]:
    """The prompt of every group, by token ids, in the order of the log."""
    return {group: prompt for group, (prompt, _) in zip(run.group.tolist(), run.responses, strict=True)}


def common_responses(a: LoggedRun, b: LoggedRun) -> int | None:
    """How many responses two runs have in common, to the same prompts; None where a log does not have them."""
    if a.texts is None or b.texts is None:
        return None
    return (Counter(a.texts) & Counter(b.texts)).total()


def different(a: LoggedRun, b: LoggedRun) -> str:
    """Why two runs are not on one E, and what to do."""
    common = common_responses(a, b)
    found = f"{len(a.responses)} and {len(b.responses)} responses, {common} of them in common"
    if common == len(a.responses) == len(b.responses):
        found = "the same responses in other groups"
    steps = [run.results.get("training_step") for run in (a, b)]
    if None not in steps and steps[0] != steps[1]:
        remedy = (
            f"checkpoints of different steps ({steps[0]} and {steps[1]}) draw responses of their own: give both runs "
            "the same prompts (seed_everything, B_E and data), or"
        )
    else:
        remedy = f"{PAIRED.format(a=a.path or 'A.json.gz')}, or"
    return (
        f"expected two runs on the same E, found {found}; {remedy} pass --unpaired (from Python unpaired=True) for "
        "independent errors"
    )
