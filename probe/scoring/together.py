"""A pass over a batch that all ranks have a part in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

from probe.distributed.lockstep import Collect, Lockstep, lockstep
from probe.scoring.policy import Policy
from probe.scoring.traffic import Kind

KINDS: tuple[Kind, ...] = get_args(Kind)


@contextmanager
def together(policy: Policy, what: str, collect: Collect | None = None) -> Iterator[Lockstep | None]:
    """Run this rank's part of a pass, and meet the others at its end; a sharded policy's at every forward of it.

    What one rank has no memory for, none tries again, since all must cut the next batch the same way; and where the
    pass fails on one rank it fails on all.

    Args:
        policy: that the pass is over.
        what: it is.
        collect: takes the gradients of an objective from the parameters of a sharded policy; see `lockstep`.

    Yields:
        The turns of a sharded policy; None for one that every rank holds the whole of.

    Raises:
        Exception: what was raised on this rank, or on another one.
        RanksApartError: another rank has gone.
    """
    words = [0] * len(KINDS)
    found: list[list[int]] = []
    try:
        with policy.ranks.together(what, words) as found:
            try:
                with lockstep(policy.model, policy.ranks, policy.values, policy.autocast, collect) as step:
                    yield step
            finally:
                words[:] = [policy.traffic.room.get(kind, 0) for kind in KINDS]
    finally:
        for k, kind in enumerate(KINDS):
            if room := [of_rank[k] for of_rank in found if of_rank[k]]:
                policy.traffic.room[kind] = min(room)
