"""Data parallelism: the first rank probes, and what its alarm decides holds for all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from probe.distributed.ranks import rank_and_size
from probe.live.alarm import GROUP_RATES, SCHEDULER_RATES, single_schedulers


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
