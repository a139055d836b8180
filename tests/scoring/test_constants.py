"""Dual numbers beside constants: the numbers of torch's own rules, and nothing shared that is written to."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.autograd import forward_ad

from probe.scoring.constants import ConstantOperands

X, DX = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[0.5, 0.25, -1.0]])
CONSTANTS = {
    "number": 2.5,
    "scalar tensor": torch.tensor(3.0),
    "same shape": torch.tensor([[2.0, -0.5, 4.0]]),
    "larger shape": torch.tensor([[2.0], [-0.5]]),
    "float64": torch.tensor([[2.0, 0.3, 4.0]], dtype=torch.float64),
    "bool": torch.tensor([[True, False, True]]),
}
OPERATIONS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "torch.add": torch.add,
    "torch.sub": torch.sub,
    "torch.mul": torch.mul,
    "torch.div": torch.div,
    "method": torch.Tensor.mul,
}


def dual_of(function):
    """Value and tangent of a function of a dual number."""
    with torch.no_grad(), forward_ad.dual_level():
        return tuple(x.clone() for x in forward_ad.unpack_dual(function(forward_ad.make_dual(X, DX))))


@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("turned", [False, True])
def test_it_gives_torchs_own_numbers(operation, constant, turned):
    f, c = OPERATIONS[operation], CONSTANTS[constant]
    if (
        turned
        and (operation.startswith("torch.") or operation == "method")
        and not isinstance(c, torch.Tensor)
    ):
        return  # a function of torch has a tensor first
    if "sub" in operation and constant == "bool":
        return  # torch has no such difference

    def both(x):
        return f(c, x) if turned else f(x, c)

    expected = dual_of(both)
    with ConstantOperands():
        found = dual_of(both)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("f", [lambda x: x * x, lambda x: x + x, lambda x: x - 2 * x, lambda x: x / x])
def test_two_dual_numbers_are_torchs_affair(f):
    expected = dual_of(f)
    with ConstantOperands():
        assert all(map(torch.equal, dual_of(f), expected))


def test_what_is_written_into_a_sum_does_not_show_in_its_operand():
    def f(x):
        (x + 1.0).mul_(3.0)
        return x

    with ConstantOperands():
        value, tangent = dual_of(f)
    assert torch.equal(value, X)
    assert torch.equal(tangent, DX)


def test_constants_among_themselves_are_as_ever():
    with ConstantOperands():
        assert torch.equal(X * 2 + X, 3 * X)
        sparse = torch.eye(3).to_sparse() * 2.0
    assert torch.equal(sparse.to_dense(), 2.0 * torch.eye(3))
