"""What a host's optimizers say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from probe.errors.exceptions import ConfigError

TRANSPARENT = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")
"""Packages whose optimizer classes only wrap another optimizer."""
LISTED = 3


def unwrapped_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside of Accelerate's, Lightning's or Fabric's wrappers.

    Args:
        optimizer: one, or a sequence of those that make one update together (Muon and AdamW, say).

    Raises:
        ConfigError: there is none, or one is no torch optimizer.
    """
    given = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not given:
        raise ConfigError("optimizer: expected at least one, found an empty list")
    found = []
    for one in given:
        # only wrappers that do nothing of their own are looked through: Lookahead, say, moves parameters too
        while type(one).__module__.partition(".")[0] in TRANSPARENT:
            inner = vars(one).get("optimizer", vars(one).get("_optimizer"))
            if not isinstance(inner, torch.optim.Optimizer):
                break
            one = inner
        if not isinstance(one, torch.optim.Optimizer) or not hasattr(one, "_optimizer_step_pre_hooks"):
            raise ConfigError(
                f"optimizer: expected a torch.optim.Optimizer, whose steps can be hooked, found {type(one).__name__}"
            )
        found.append(one)
    return found


def moved_parameters(optimizers: Sequence[torch.optim.Optimizer]) -> set[int]:
    """The identities of the parameters in the optimizers' groups."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def learning_rate(rate: Any) -> float | None:
    """A group's learning rate as a number; None where the rule works it out itself (Adafactor's relative step).

    >>> learning_rate(torch.tensor(0.5)), learning_rate(None)
    (0.5, None)
    """
    try:
        return float(rate)
    except (TypeError, ValueError):
        return None


def largest_rate(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Mapping[str, torch.nn.Parameter]
) -> float | None:
    """The largest learning rate of the groups that hold any of these parameters; None where they have none."""
    mine = {id(p) for p in parameters.values()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [learning_rate(g.get("lr")) for g in groups if any(id(p) in mine for p in g["params"])]
    return max((rate for rate in rates if rate is not None), default=None)
