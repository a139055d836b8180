"""Distributions of what was found per response and per token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from probe.phases.state import ProbeState

TABLE_DIGITS = 6
RECORD_DIGITS = 9


# Nine significant digits give every float32 back exactly.
FLOAT32_DIGITS = 9
QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}


def rounded(values: Tensor, digits: int) -> Any:
    """`values` as (nested) lists with `digits` significant digits; one number where there is no dimension.

    >>> rounded(torch.tensor([[1 / 3, 2.0]], dtype=torch.float64), 3)
    [[0.333, 2.0]]
    """
    if values.dim() > 1:
        return [rounded(row, digits) for row in values]
    plain = values.tolist()
    if not values.is_floating_point():
        return plain
    return [float(f"{x:.{digits}g}") for x in plain] if values.dim() else float(f"{plain:.{digits}g}")


def moments_and_quantiles(values: Tensor) -> dict[str, Any] | None:
    """Count, mean, standard deviation (n - 1; NaN for one value), extremes, quantiles; None for no values.

    Non-finite values are counted under `non_finite`, and the other numbers are of the finite ones.

    >>> moments_and_quantiles(torch.tensor([1.0, 2.0, 3.0]))["std"]
    1.0
    """
    values = values.flatten().double()
    finite = values[values.isfinite()]
    count = {"count": values.numel()}
    if finite.numel() < values.numel():
        count["non_finite"] = values.numel() - finite.numel()
    if finite.numel() == 0:
        return count if values.numel() else None
    # numpy's, since torch.quantile refuses more than 2**24 values.
    quantiles = torch.from_numpy(np.quantile(finite.numpy(), list(QUANTILES.values())))
    std = finite.std() if finite.numel() > 1 else finite.new_tensor(torch.nan)
    numbers = torch.stack([finite.mean(), std, finite.min(), *quantiles, finite.max()])
    names = ("mean", "std", "min", *QUANTILES, "max")
    return {**count, **dict(zip(names, rounded(numbers, TABLE_DIGITS), strict=True))}


def histogram(values: Tensor, bins: int = 16) -> dict[str, list[Any]] | None:
    """Counts in `bins` bins of equal width between the extremes; of the values themselves where they are few.

    Returns:
        `{"edges", "counts"}` with one edge more than counts; `{"values", "counts"}` where at most `bins`
        different values occur; None for no values or non-finite ones.

    >>> histogram(torch.tensor([0.0, 1.0, 1.0]))
    {'values': [0.0, 1.0], 'counts': [1, 2]}
    """
    values = values.flatten().double()
    if values.numel() == 0 or not bool(values.isfinite().all()):
        return None
    distinct, counts = torch.unique(values, return_counts=True)
    if len(distinct) <= bins:
        return {"values": rounded(distinct, TABLE_DIGITS), "counts": counts.tolist()}
    counts, edges = np.histogram(values.numpy(), bins=bins)
    return {"edges": rounded(torch.from_numpy(edges), TABLE_DIGITS), "counts": counts.tolist()}


def samples(state: ProbeState) -> dict[str, Tensor]:
    """The samples whose distributions are of interest, `(B,)` or one number per token, as far as they ran.

    The names are those of the log's `distributions`: `E/...` and `U/...`.
    """
    found: dict[str, Tensor] = {}
    if state.E is not None:
        found["E/length"] = state.E.lengths.double()
    if state.E_scores is not None:
        found["E/sequence_entropy_before"] = state.E_scores.sequence_entropy
        found["E/token_entropy_before"] = state.E_scores.entropy[state.E_scores.mask]
    if state.ground_truth is not None:
        new = state.ground_truth.scores_new
        found["E/sequence_entropy_after"] = new.sequence_entropy
        found["E/token_entropy_after"] = new.entropy[new.mask]
        found["E/importance_weight"] = state.ground_truth.weights.weights
        found["E/log_weight"] = state.ground_truth.weights.log_weights
    if state.U is not None:
        found["U/length"] = state.U.lengths.double()
        if state.U.rewards is not None:
            found["U/reward"] = state.U.rewards
        if state.U.advantages is not None:
            found["U/advantage"] = state.U.advantages
    if state.update is not None:
        found["U/sequence_entropy"] = state.update.scores.sequence_entropy
        found["U/token_entropy"] = state.update.scores.entropy[state.update.scores.mask]
    return found


def distributions(state: ProbeState) -> dict[str, Any]:
    """`moments_and_quantiles` of every one of `samples`, with a histogram for lengths, rewards and weights."""
    with_histogram = ("E/length", "U/length", "U/reward", "E/importance_weight", "E/log_weight")
    tables: dict[str, Any] = {}
    for name, values in samples(state).items():
        tables[name] = moments_and_quantiles(values)
        if name in with_histogram and tables[name] is not None:
            tables[name]["histogram"] = histogram(values)
    return tables


def mean_or_none(values: Tensor) -> float:
    """The mean, rounded for a table."""
    return float(rounded(values.mean(), TABLE_DIGITS))
