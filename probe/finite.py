"""Weights and moments are looked at themselves, before what comes out of them.

A NaN need not show in what a model returns: fused attention kernels of some processors turn NaN queries into finite
outputs, an infinite second moment makes a step of 0, and a comparison with NaN is false.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from probe.errors.exceptions import NumericalError
from probe.shards import part


def require_finite(tensors: Iterable[tuple[str, Tensor]], what: str, remedy: str) -> None:
    """Refuse NaN and infinity.

    Args:
        tensors: with their names; those that are not in floating point (quantised weights, counters) are left out.
        what: what they are, for the message.
        remedy: what to do, for the message.

    Raises:
        NumericalError: an entry is not finite; names the first tensor and counts the others.
    """
    bad = [(name, count) for name, x in tensors if (count := _not_finite(x))]
    if bad:
        name, count = bad[0]
        others = f" and in {len(bad) - 1} more" if len(bad) > 1 else ""
        raise NumericalError(
            f"expected finite {what}, found NaN or infinity in {name} ({count} entries{others}); {remedy}"
        )


def require_finite_weights(model: nn.Module) -> None:
    """Refuse a policy whose parameters hold NaN or infinity.

    Raises:
        NumericalError: see `require_finite`.
    """
    remedy = "take an earlier checkpoint, or load it in a wider type than float16, which overflows"
    require_finite(model.named_parameters(), "weights", remedy)


def require_finite_moments(
    optimizers: Iterable[torch.optim.Optimizer], parameters: Iterable[tuple[str, nn.Parameter]]
) -> None:
    """Refuse optimizers whose state of the given parameters holds NaN or infinity.

    Raises:
        NumericalError: see `require_finite`.
    """
    states = [(name, o.state[p]) for name, p in parameters for o in optimizers if p in o.state]
    found = ((f"{key} of {name}", x) for name, state in states for key, x in _tensors(state))
    require_finite(found, "moments of the optimizer", "take an earlier checkpoint")


def _tensors(state: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one parameter's state."""
    return ((str(key), x) for key, x in state.items() if isinstance(x, Tensor))


def _not_finite(x: Tensor) -> int:
    """How many entries are NaN or infinite; 0 where the type has neither."""
    x = part(x.detach())
    if not x.is_floating_point() or x.device.type == "meta":
        return 0
    if x.element_size() < 2:  # 8-bit floating point has no `isfinite`
        x = x.float()
    return int((~torch.isfinite(x)).sum())
