"""What a host's optimizers say: which parameters they move, how fast, and with how much momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from probe.errors.exceptions import ConfigError
from probe.live.zero import ZeroOptimizer, is_engine, is_zero, zero_optimizer

TRANSPARENT = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")
"""Packages whose optimizer classes only wrap another optimizer."""
LISTED = 3
"""Names that a message lists."""


def unwrapped_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside of Accelerate's, Lightning's or Fabric's wrappers; DeepSpeed's as one of torch's.

    Args:
        optimizer: one, or a sequence of those that make one update together (Muon and AdamW, say).

    Raises:
        ConfigError: there is none, or one is no torch optimizer.
    """
    given = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not given:
        raise ConfigError("optimizer: expected at least one, found an empty list")
    unwrapped: list[torch.optim.Optimizer] = []
    for one in given:
        # only wrappers that do nothing of their own are looked through: Lookahead, say, moves parameters too
        while type(one).__module__.partition(".")[0] in TRANSPARENT or is_engine(one):
            inner = vars(one).get("optimizer", vars(one).get("_optimizer"))
            if not isinstance(inner, torch.optim.Optimizer) and not is_zero(inner):
                break
            one = inner
        one = zero_optimizer(one) if is_zero(one) else one
        if not isinstance(one, torch.optim.Optimizer) or not hasattr(one, "_optimizer_step_pre_hooks"):
            raise ConfigError(
                f"optimizer: expected a torch.optim.Optimizer, whose steps can be hooked, found {type(one).__name__}"
            )
        unwrapped.append(one)
    return unwrapped


def moved_parameters(optimizers: Sequence[torch.optim.Optimizer]) -> set[int]:
    """The identities of the parameters in the optimizers' groups."""
    return {id(p) for group in _groups(optimizers) for p in group["params"]}


def highest_learning_rate(optimizers: Sequence[torch.optim.Optimizer]) -> float:
    """The largest learning rate of all groups; 0 where none names one."""
    return largest_rate(optimizers) or 0.0


def largest_rate(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, torch.nn.Parameter] | None = None
) -> float | None:
    """The largest learning rate of all groups, or of those that hold any of `parameters`; None where none has one."""
    groups = _groups(optimizers)
    if parameters is not None:
        mine = {id(p) for p in parameters.values()}
        groups = [group for group in groups if any(id(p) in mine for p in group["params"])]
    rates = [learning_rate(group.get("lr")) for group in groups]
    return max((rate for rate in rates if rate is not None), default=None)


def momentum(optimizers: Sequence[torch.optim.Optimizer]) -> float:
    """The largest decay of a gradient average, in [0, 1): what correlates the updates of neighbouring steps."""
    given = [g["betas"][0] if g.get("betas") else g.get("momentum") for g in _groups(optimizers)]
    decays = [learning_rate(decay) or 0.0 for decay in given]
    return max(decay for decay in [*decays, 0.0] if decay < 1.0)


def _groups(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def learning_rate(rate: Any) -> float | None:
    """A group's learning rate as a number; None where the rule works it out itself (Adafactor's relative step).

    >>> learning_rate(torch.tensor(0.5)), learning_rate(None)
    (0.5, None)
    """
    try:
        return float(rate)
    except (TypeError, ValueError):
        return None


def may_have_moved(
    parameters: Mapping[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
) -> bool:
    """Whether a step of exactly 0 may be one whose update was made before it, and whose gradients are used up.

    Args:
        parameters: that the optimizers move.
        optimizers: those that took the step.
    """
    if any(isinstance(one, ZeroOptimizer) for one in optimizers):  # gradients that overflow are left out
        return False
    used_up = all(p.grad is None for p in parameters.values())
    return used_up and highest_learning_rate(optimizers) > 0
