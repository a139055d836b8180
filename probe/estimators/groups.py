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
