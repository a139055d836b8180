"""Data parallelism: all ranks probe together, and what the first one's alarm decides holds for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from probe.distributed.ranks import ALONE, Ranks, rank_and_size
from probe.distributed.same import fingerprint
from probe.errors.exceptions import RanksApartError
from probe.estimators.step_parts import StepParts
from probe.live.alarm import GROUP_RATES, SCHEDULER_RATES, single_schedulers
from probe.live.say import say
from probe.shards import is_shard


def of_one_policy(ranks: Ranks, parameters: Mapping[str, Tensor]) -> Ranks | None:
    """The processes that probe one policy together; None where this one has no part in it. Call it on all ranks.

    Args:
        ranks: of the job.
        parameters: all of the policy's. Where they are not the same on all ranks these do not train one policy, and
            the first one probes its own. Ranks that hold parts of them train one policy.

    Raises:
        RanksApartError: it is not called on all ranks.
    """
    if any(is_shard(p) for p in parameters.values()):
        return ranks
    if ranks.size == 1 or len(set(ranks.gathered("parameters", fingerprint(parameters.values())))) == 1:
        return ranks
    if not ranks.first:
        return None
    say("the processes of this job have different weights: the first one probes its own", warn=True)
    return ALONE


class Probing(Protocol):
    """A probe of updates, as `Company` sees it.

    Attributes:
        ranks: the processes that probe together.
    """

    ranks: Ranks


class Company:
    """What the ranks of a training tell each other at each of its updates.

    Attributes:
        suspicion: why parameters may move outside of the optimizer's step, as far as this rank can see.
        early: whether a rank has found that they do.
        over: whether all ranks know that the probe has ended.
    """

    def __init__(self, probe: Probing) -> None:
        """Args: `probe`, whose ranks they are."""
        self._probe = probe
        self.suspicion: str | None = None
        self.early = self.over = False

    @property
    def alone(self) -> bool:
        """Whether nobody waits for this rank."""
        return self._probe.ranks.size == 1 or self.over

    def suspects(self, why: str) -> bool:
        """Note a suspicion that the others have to hear of first; whether there are any."""
        self.suspicion = self.suspicion or why
        return not self.alone

    def agree(self, due: bool, number: int) -> bool:
        """Whether an update is probed: clocks differ, and the first rank's decides.

        Args:
            due: whether it is by this rank's.
            number: of the update.

        Raises:
            RanksApartError: a rank has left the probe, or counts other updates.
        """
        if self.alone:
            return due
        self.over = True  # unless all say that they go on, at one update
        found = self._tell([int(due), number, int(self.suspicion is not None), 1])
        numbers = {words[1] for words in found}
        if not all(words[3] for words in found):
            raise RanksApartError("the probe was detached on another rank, and ends on all")
        if len(numbers) > 1:
            raise RanksApartError(
                f"expected all ranks at one update, found them at {sorted(numbers)}; go on (first_step, "
                "load_state_dict, replay) from the same state on every rank"
            )
        self.over = False
        self.early = any(words[2] for words in found)
        return bool(found[0][0])

    def leave(self, *_: Any) -> None:
        """Tell the others, where they wait for this rank, that it has left."""
        if not self.alone:
            self.over = True
            self._tell([0, 0, 0, 0])

    def _tell(self, words: list[int]) -> list[list[int]]:
        """What each rank says at the next update."""
        with self._probe.ranks.together("due", words) as found:
            pass
        return found


def same_parts(ranks: Ranks, parts: StepParts | str) -> StepParts | str:
    """The parts of a step where they are the same on all ranks, or the reason why there are none.

    Args:
        ranks: of the training.
        parts: as this rank's gradients and moments have them, which nothing else compares.
    """
    if ranks.size == 1:
        return parts
    reasons = ranks.gathered("reasons", parts if isinstance(parts, str) else None)
    if any(reasons):
        return next(reason for reason in reasons if reason)
    tensors = [] if isinstance(parts, str) else [*parts.momentum.values(), *parts.decay.values()]
    if len(set(ranks.gathered("parts", fingerprint(x for x in tensors if not is_shard(x))))) == 1:
        return parts
    return "gradients or moments of the optimizer differ between ranks"


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
