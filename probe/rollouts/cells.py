"""Cells of a rollout table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probe.errors.exceptions import DataError
from probe.rollouts.tables import RolloutTable

ROUNDING = 1e-6
"""Differences of rewards, and log-probs above 0, that are only rounding."""


def read_ids(table: RolloutTable, name: str, vocabulary: int) -> list[list[int]]:
    """A column of token ids."""
    values = table.column(name)
    for i, ids in enumerate(values):
        if not isinstance(ids, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in ids):
            raise DataError(
                f"{table.where(i)}: expected {name} to be a list of token ids, found {str(ids)[:60]}"
            )
        outside = [t for t in ids if not 0 <= t < vocabulary]
        if outside:
            raise DataError(
                f"{table.where(i)}: expected {name} below the {vocabulary} tokens of the policy's vocabulary, found "
                f"{outside[0]}; the file was made with another tokenizer"
            )
    return values


def padded(values: Sequence[list[Any]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`(B, T)` values, 0 beyond each row's end, and the mask of the entries that are there."""
    lengths = torch.tensor([len(own) for own in values])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    out = torch.zeros(mask.shape, dtype=dtype)
    out[mask] = torch.tensor([value for own in values for value in own], dtype=dtype)
    return out, mask


def is_number(value: Any) -> bool:
    """Whether a value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_float(value: float) -> float:
    """A number as a float; infinite where it is an integer that no float can hold."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
