"""Group advantages: each reward relative to the other responses to the same prompt.

Several rewards become one by their weighted sum, before it is normalised or after each one is: see `Aggregation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from probe.errors.exceptions import DataError
from probe.estimators.groups import index_groups, sum_per_group

AdvantageKind = Literal["grpo", "dr_grpo", "batch"]

Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]

STD_EPSILON = 1e-4
"""Added to a group's standard deviation, as in TRL, so that a constant group is not divided by zero."""


def group_advantages(rewards: Tensor, group: Tensor, kind: AdvantageKind) -> Tensor:
    """Advantages of `B` responses within their groups, `(B,)` float64.

    With the mean `m` and the unbiased standard deviation `s` (divisor `G - 1`) of a group's `G` rewards:

    - `grpo`: `(r - m) / (s + 1e-4)`, without unit; Shao et al. 2024 (arXiv:2402.03300), with the constant
      that TRL uses;
    - `dr_grpo`: `r - m`, in units of the reward; Liu et al. 2025 (arXiv:2503.20783);
    - `batch`: `(r - m) / (s_U + 1e-4)` with the unbiased standard deviation `s_U` of all `B` rewards.

    A reward of NaN is none: its response has no part in mean and standard deviation, and advantage 0.

    A group whose rewards are all equal, a group of one response included, has advantage exactly 0. It is
    kept: its responses add nothing to the gradient but count in its normalisation. Groups need not be
    adjacent or of one size.

    Args:
        rewards: `(B,)`, finite or NaN.
        group: `(B,)` integers, equal within a group.
        kind: `grpo`, `dr_grpo` or `batch`.

    Raises:
        ValueError: the shapes differ or are not one-dimensional, `group` is not of an integer type, or `kind`
            is none of these.
        DataError: a reward is infinite.

    >>> rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0])
    >>> group = torch.tensor([0, 0, 0, 0, 1, 1])
    >>> group_advantages(rewards, group, "dr_grpo").tolist()
    [0.5, -0.5, -0.5, 0.5, 0.0, 0.0]
    >>> group_advantages(torch.tensor([0.0, 4.0, 8.0]), torch.tensor([0, 0, 0]), "grpo").tolist() == [
    ...     -4 / (4 + 1e-4), 0.0, 4 / (4 + 1e-4)]
    True
    """
    if kind not in get_args(AdvantageKind):
        raise ValueError(f"kind: expected one of {', '.join(get_args(AdvantageKind))}, found {kind!r}")
    _check_shapes(rewards, group, "rewards")
    values = rewards.detach().to(torch.float64)
    if bool(values.isinf().any()):
        index = int(values.isinf().nonzero()[0, 0])
        raise DataError(f"rewards: expected finite numbers, found {values[index].item()} at index {index}")
    there = ~values.isnan()
    advantages = torch.zeros_like(values)
    if bool(there.any()):
        advantages[there] = _advantages(values[there], group[there], kind)
    return advantages


def _advantages(values: Tensor, group: Tensor, kind: AdvantageKind) -> Tensor:
    """`group_advantages` of finite rewards."""
    member, size = index_groups(group)
    centred = values - (sum_per_group(values, member, size) / size)[member]
    # The mean of equal numbers can differ from them in the last bit; a constant group has to be exactly 0.
    centred = torch.where(_is_constant(values, member, size)[member], torch.zeros_like(centred), centred)
    if kind == "dr_grpo":
        return centred
    if kind == "batch":
        spread = values.std() if len(values) > 1 else torch.zeros((), dtype=torch.float64)
        return centred / (spread + STD_EPSILON)
    variance = sum_per_group(centred.square(), member, size) / (size - 1).clamp(min=1)
    return centred / (variance.sqrt()[member] + STD_EPSILON)


def combined_advantages(
    rewards: Tensor,
    weights: Sequence[float] | None,
    group: Tensor,
    kind: AdvantageKind,
    aggregation: Aggregation,
) -> tuple[Tensor, Tensor]:
    """One reward of several, and its advantages: `(B,)` float64 each.

    `sum_then_normalize` takes `group_advantages` of `sum_k weight_k r_k`. `normalize_then_sum` (GDPO) normalises each
    reward by the mean and standard deviation of its group, adds them up by weight, and normalises that sum by the mean
    and standard deviation of all of U, whatever `kind` says. A reward of NaN does not apply and is left out of its sum;
    a response to which none applies has the reward NaN and the advantage 0.

    Args:
        rewards: `(B, K)`.
        weights: one for each of the `K` rewards; None for all 1.
        group: `(B,)` integers, equal within a group.
        kind: see `group_advantages`.
        aggregation: as above.

    Raises:
        ValueError: as many weights as rewards were expected, or `aggregation` is neither of these.
        DataError: a reward is infinite.

    >>> rewards = torch.tensor([[1.0, 0.0], [0.0, float("nan")], [float("nan"), float("nan")]])
    >>> total, advantages = combined_advantages(
    ...     rewards, [1.0, 2.0], torch.tensor([0, 0, 0]), "dr_grpo", "sum_then_normalize")
    >>> total.tolist(), advantages.tolist()
    ([1.0, 0.0, nan], [0.5, -0.5, 0.0])
    """
    values = rewards.detach().to(torch.float64)
    weight = torch.ones(values.shape[1]) if weights is None else torch.tensor(list(weights))
    if len(weight) != values.shape[1]:
        raise ValueError(f"weights: expected {values.shape[1]}, one for each reward, found {len(weight)}")
    if aggregation not in get_args(Aggregation):
        raise ValueError(
            f"aggregation: expected one of {', '.join(get_args(Aggregation))}, found {aggregation!r}"
        )
    none = values.isnan().all(1)

    def summed(x: Tensor) -> Tensor:
        return torch.where(none, torch.nan, (x * weight.double()).nansum(1))

    total = summed(values)
    if aggregation == "sum_then_normalize":
        return total, group_advantages(total, group, kind)
    parts = [group_advantages(column, group, "grpo") for column in values.T]
    normalised = torch.where(values.isnan(), torch.nan, torch.stack(parts, 1))
    return total, group_advantages(summed(normalised), torch.zeros_like(group), "grpo")


def count_zero_advantage_groups(advantages: Tensor, group: Tensor) -> int:
    """Number of groups in which every advantage is exactly 0, so that they give no policy gradient.

    Args:
        advantages: `(B,)`.
        group: `(B,)` integers, equal within a group.

    Raises:
        ValueError: the shapes differ or are not one-dimensional, or `group` is not of an integer type.

    >>> count_zero_advantage_groups(torch.tensor([0.5, -0.5, 0.0, 0.0]), torch.tensor([3, 3, 7, 7]))
    1
    """
    _check_shapes(advantages, group, "advantages")
    member, size = index_groups(group)
    nonzero = sum_per_group((advantages != 0).to(torch.float64), member, size)
    return int((nonzero == 0).sum())


def _check_shapes(values: Tensor, group: Tensor, name: str) -> None:
    """Refuse anything but two vectors of one length, the second one of integers."""
    if values.dim() != 1 or values.shape != group.shape:
        raise ValueError(
            f"{name} and group: expected two vectors of the same length (B,), found {tuple(values.shape)} "
            f"and {tuple(group.shape)}"
        )
    if group.is_floating_point() or group.is_complex():
        raise ValueError(f"group: expected integers, found {group.dtype}")


def _is_constant(values: Tensor, member: Tensor, size: Tensor) -> Tensor:
    """Whether all values of a group are equal, one bool for each group."""
    empty = torch.zeros(len(size), dtype=values.dtype, device=values.device)
    lowest = empty.scatter_reduce(0, member, values, "amin", include_self=False)
    highest = empty.scatter_reduce(0, member, values, "amax", include_self=False)
    return lowest == highest
