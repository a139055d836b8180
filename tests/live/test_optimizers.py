"""What a host's optimizers say, and whether parameters move outside of their steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from probe.live.optimizers import highest_learning_rate, momentum
from probe.live.writes import OutsideWrites


def optimizer(kind: Any, **options: Any) -> torch.optim.Optimizer:
    return kind([nn.Parameter(torch.ones(1))], **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("optimizers", "expected"),
    [
        ([optimizer(torch.optim.AdamW, betas=(0.8, 0.99))], 0.8),
        ([optimizer(torch.optim.SGD, lr=0.1, momentum=0.5)], 0.5),
        ([optimizer(torch.optim.SGD, lr=0.1)], 0.0),
        ([optimizer(torch.optim.Adagrad)], 0.0),
        ([optimizer(torch.optim.SGD, lr=0.1, momentum=1.0)], 0.0),  # a sum is no average
        ([optimizer(torch.optim.SGD, lr=0.1, momentum=0.5), optimizer(torch.optim.AdamW)], 0.9),
    ],
)
def test_the_largest_decay_counts(optimizers, expected):
    assert momentum(optimizers) == expected


def test_the_highest_learning_rate_of_all_groups():
    rates: list[Any] = [None, torch.tensor(0.5), 0.25]
    several = [optimizer(torch.optim.SGD, lr=0.1) for _ in rates]
    for one, rate in zip(several, rates, strict=True):
        one.param_groups[0]["lr"] = rate
    assert highest_learning_rate(several) == 0.5
    assert highest_learning_rate(several[:1]) == 0.0


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_parameter_that_moves_before_the_step_and_not_in_it(before, inside):
    p = nn.Parameter(torch.ones(1))
    writes = OutsideWrites({"p": p})
    with torch.no_grad():
        if before:
            p.add_(1.0)
        writes.step_begins({"p": p})
        writes.note({"p": p})
        if inside:
            p.add_(1.0)
    assert writes.step_left_alone({"p": p}) == (before and not inside)
