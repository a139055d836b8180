"""Data parallelism: all ranks probe together, and what the first one's alarm decides holds for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from probe.distributed.ranks import ALONE, Ranks, rank_and_size
from probe.distributed.same import fingerprint
from probe.live.alarm import GROUP_RATES, SCHEDULER_RATES, single_schedulers
from probe.live.say import say


def ranks_of_training(parameters: Mapping[str, Tensor]) -> Ranks | None:
    """The processes that probe one policy together; None where this one has no part in it. Call it on all ranks.

    Args:
        parameters: all of the policy's. Where they are not the same on all ranks these do not train one policy, and
            the first one probes its own.

    Raises:
        RanksApartError: it is not called on all ranks.
    """
    if rank_and_size()[1] == 1:
        return ALONE
    ranks = Ranks.of_job()
    if len(set(ranks.gathered("parameters", fingerprint(parameters.values())))) == 1:
        return ranks
    if not ranks.first:
        return None
    say("the processes of this job have different weights: the first one probes its own", warn=True)
    return ALONE


def told_by_first(ranks: Ranks, due: bool) -> bool:
    """Whether the first rank finds that an update is due to be probed: clocks differ."""
    if ranks.size == 1:
        return due
    with ranks.together("due", [int(due)]) as found:
        pass
    return bool(found[0][0])


class Steered(Protocol):
    """What of a training an alarm can change, as a `Watch` has it.

    Attributes:
        should_stop: whether an alarm asked for the end of training.
    """

    should_stop: bool

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """Those that are watched."""

    @property
    def schedulers(self) -> Sequence[Any]:
        """Their learning-rate schedulers."""


def follow_first_rank(watch: Steered) -> None:
    """Give every rank what an alarm may have changed on the first one: the request to stop, and learning rates.

    Otherwise the others would wait for it for ever, or take other steps than it does. Call it on all ranks after the
    same step; where training is not distributed nothing happens.

    Args:
        watch: this rank's.
    """
    if rank_and_size()[1] == 1:
        return
    told: list[Any] = [(watch.should_stop, _learning_rates(watch))]
    torch.distributed.broadcast_object_list(told, src=0)
    watch.should_stop, rates = told[0]
    for holder, given in zip(_holders(watch), rates, strict=True):
        for key, rate in given.items():
            if rate is None:
                continue
            if isinstance(holder[key], torch.Tensor):
                holder[key].fill_(rate)
            else:
                holder[key] = rate


def _holders(watch: Steered) -> list[dict[str, Any]]:
    """What learning rates are kept in: the optimizers' groups and the schedulers' attributes."""
    groups = [group for optimizer in watch.optimizers for group in optimizer.param_groups]
    return [*groups, *(vars(scheduler) for scheduler in single_schedulers(watch.schedulers))]


def _learning_rates(watch: Steered) -> list[dict[str, Any]]:
    """The rates in each holder, as numbers that can be sent."""
    keys = GROUP_RATES | SCHEDULER_RATES
    return [{key: _number(holder[key]) for key in keys & set(holder)} for holder in _holders(watch)]


def _number(rate: Any) -> Any:
    if isinstance(rate, list):
        return [_number(one) for one in rate]
    return None if rate is None else float(rate)
