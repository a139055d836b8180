"""Products and sums of dual numbers with constants, without the zero tangent of the constant.

Torch's own rule for `x * c` adds `x * 0` to the tangent `dx * c`. The zero is never filled in, but its shape is found
by Python code that takes longer than many of a model's products with a scale, a norm's weight or a table of rotations:
a sixth of a pass in forward mode on a small model. The numbers are the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode


class ConstantOperands(TorchFunctionMode):
    """Inside, `+`, `-`, `*` and `/` of a dual number and a constant are computed by rules of their own.

    For passes with grad mode off: no gradient goes through them.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch."""
        rule = _RULES.get(func)
        if rule is not None and len(args) == 2 and not kwargs:
            found = rule(*args)
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


def _unpacked(x: Any) -> tuple[Any, Tensor | None]:
    """Value and tangent; a plain number has none."""
    return forward_ad.unpack_dual(x) if isinstance(x, Tensor) else (x, None)


def _plain(x: Any) -> bool:
    """Whether an operand is a number or an ordinary tensor: sparse ones and subclasses are torch's affair."""
    return not isinstance(x, Tensor) or (type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided)


def _by_operand(
    value: Callable[[Any, Any], Tensor],
    first: Callable[[Tensor, Any, Tensor], Tensor],
    second: Callable[[Tensor, Any, Tensor], Tensor] | None,
) -> Callable[[Any, Any], Tensor | None]:
    """A rule: the value of two operands, and the tangent where the first or the second alone has one.

    None where both have one, or neither, or there is no rule for the second.
    """

    def rule(x: Any, y: Any) -> Tensor | None:
        if not (_plain(x) and _plain(y)):
            return None
        (a, da), (b, db) = _unpacked(x), _unpacked(y)
        if da is not None and db is None:
            found = value(a, b)
            return forward_ad.make_dual(found, first(da, b, found))
        if db is not None and da is None and second is not None:
            found = value(a, b)
            return forward_ad.make_dual(found, second(db, a, found))
        return None

    return rule


def _like(tangent: Tensor, found: Tensor) -> Tensor:
    """The tangent of a sum: a copy, since what is written into one of two tensors must not show in the other."""
    return torch.empty_like(found).copy_(tangent)


_product = _by_operand(operator.mul, lambda da, b, _: da * b, lambda db, a, _: a * db)
_sum = _by_operand(operator.add, lambda da, _, found: _like(da, found), lambda db, _, found: _like(db, found))
_difference = _by_operand(
    operator.sub, lambda da, _, found: _like(da, found), lambda db, _, found: _like(-db, found)
)
_quotient = _by_operand(operator.truediv, lambda da, b, _: da / b, None)
_RULES: Mapping[Any, Callable[[Any, Any], Tensor | None]] = {
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _product),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _sum),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _difference),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _quotient),
}
