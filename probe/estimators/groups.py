"""Sums over groups of responses (those to one draw of a prompt)."""

from __future__ import annotations

import torch
from torch import Tensor


def index_groups(group: Tensor) -> tuple[Tensor, Tensor]:
    """The position `(B,)` of each response's group among the distinct groups, and the groups' sizes, `(P,)`."""
    _, member, size = torch.unique(group, return_inverse=True, return_counts=True)
    return member, size


def sum_per_group(values: Tensor, member: Tensor, size: Tensor) -> Tensor:
    """The sum of `values`, `(B, ...)`, over each group, `(P, ...)`; see `index_groups`.

    >>> sum_per_group(torch.tensor([1.0, 2.0, 4.0]), *index_groups(torch.tensor([7, 3, 7]))).tolist()
    [2.0, 5.0]
    """
    empty = torch.zeros(len(size), *values.shape[1:], dtype=values.dtype, device=values.device)
    return empty.index_add_(0, member, values)


def random_groups(
    group: Tensor, wanted: int | None = None, seed: int = 0, counted: Tensor | None = None
) -> Tensor:
    """The members of groups in a random order of these, always the same; groups whole until there are enough members.

    Those for a smaller number are the first of those for a larger one.

    Args:
        group: `(B,)`.
        wanted: members at least, as far as there are; None for all.
        seed: of the order.
        counted: which members count, `(B,)` bool; all by default.

    >>> group = torch.tensor([7, 3, 7, 5, 5])
    >>> group[random_groups(group)].tolist(), group[random_groups(group, 3)].tolist()
    ([5, 5, 7, 7, 3], [5, 5, 7, 7])
    >>> group[random_groups(group, 1, counted=torch.tensor([True, True, False, False, False]))].tolist()
    [5, 5, 7, 7]
    """
    member, size = index_groups(group)
    counts = size if counted is None else sum_per_group(counted.long(), member, size)
    place = torch.randperm(len(size), generator=torch.Generator().manual_seed(seed))
    members = place[member].argsort(stable=True)
    order = place.argsort()
    enough = counts[order].cumsum(0) >= (len(group) + 1 if wanted is None else wanted)
    if not bool(enough.any()):
        return members
    return members[: int(size[order].cumsum(0)[enough][0])]
