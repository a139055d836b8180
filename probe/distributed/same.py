"""Whether all ranks have the same weights: each of them scores a part of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from probe.distributed.ranks import Ranks
from probe.errors.exceptions import RanksApartError
from probe.shards import is_shard, part

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes."""


def check_same(ranks: Ranks, parameters: Mapping[str, Tensor]) -> None:
    """All ranks must have the same parameters, each of them scores a part of E; but for those they hold a part each of.

    Raises:
        RanksApartError: they have not.
    """
    if ranks.size == 1:
        return
    own = [fingerprint(p for p in parameters.values() if not is_shard(p))]
    with ranks.together("the same parameters", own) as found:
        pass
    if len({words[0] for words in found}) > 1:
        raise RanksApartError(
            f"expected the same trained parameters on all {ranks.size} ranks, found different ones: a file or a "
            "step of one is not that of the others"
        )


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A number that differs where the bits of some tensors do, but for rare cases.

    >>> fingerprint([torch.tensor([1.0, 2.0])]) == fingerprint([torch.tensor([1.0, 2.5])])
    False
    """
    found = 0
    for x in tensors:
        bits = part(x.detach()).contiguous().view(_INTEGERS[x.element_size()])
        found = (31 * found + int(bits.sum(dtype=torch.int64))) % 2**62
    return found
