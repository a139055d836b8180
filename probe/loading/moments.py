"""Adam's moments as files hold them: torch's tensors, or bitsandbytes' blockwise 8-bit codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probe.errors.exceptions import OptimizerStateError
from probe.text import shown

SavedKey = int | str
"""How a file refers to a parameter: its position, or its name."""

_LISTED = 10
_BITSANDBYTES_WRAPPER = "__bnb_optimizer_quant_state__"
_BITSANDBYTES_BLOCKS = (256, 2048)
_CODE_VALUES = 256
_MOST_STEPS = 2**53  # beyond, floating point does not count
_REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CODES = (*_REAL, torch.uint8)


@dataclass(frozen=True)
class Moments:
    """The state of one parameter.

    Attributes:
        exp_avg: running mean of the gradient.
        exp_avg_sq: running mean of its square.
        max_exp_avg_sq: the maximum so far of `exp_avg_sq` (AMSGrad), or None.
        step: number of steps taken.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    step: int


def moment_shape(key: SavedKey, state: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of the parameter that a saved state belongs to.

    Args:
        key: the state's key, for the message.
        state: one parameter's entry of a `state_dict`.

    Returns:
        The shape of its first moment.

    Raises:
        OptimizerStateError: it has no first moment.
    """
    state = _unwrapped(state)
    moment = state.get("exp_avg", state.get("state1"))
    if not isinstance(moment, Tensor):
        raise OptimizerStateError(
            f"optimizer state of parameter {key}: expected a tensor exp_avg (or state1), found the entries "
            f"{', '.join(sorted(map(str, state)))[:200]}"
        )
    return tuple(moment.shape)


def read_moments(states: Mapping[str, Mapping[str, Any]], amsgrad: Mapping[str, bool]) -> dict[str, Moments]:
    """The moments of every parameter, dequantised and checked.

    Args:
        states: parameter name to its entry of a `state_dict`.
        amsgrad: parameter name to whether its group uses AMSGrad.

    Returns:
        Parameter name to moments, in the type they were saved in (8-bit ones in float32).

    Raises:
        OptimizerStateError: a state is incomplete, malformed, or has impossible values; lists which.
    """
    moments: dict[str, Moments] = {}
    problems: list[str] = []
    for name, saved in states.items():
        state = _unwrapped(saved)
        try:
            moments[name] = (
                _from_bitsandbytes(state) if "state1" in state else _from_torch(state, amsgrad[name])
            )
        except (KeyError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            problems.append(f"{name}: {reason}")
            continue
        problems += [f"{name}: {reason}" for reason in _impossible(moments[name])]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise OptimizerStateError(
            "optimizer state: expected finite moments, exp_avg_sq of at least 0 and a step count, found "
            f"{len(problems)} faults: {'; '.join(problems[:_LISTED])}{more}"
        )
    return moments


def dequantize_blocks(codes: Tensor, table: Tensor, absmax: Tensor) -> Tensor:
    """Values of a blockwise 8-bit tensor: `table[code]` times its block's largest magnitude.

    Args:
        codes: uint8, any shape; blocks run through it in memory order.
        table: the 256 values of the code, float32.
        absmax: one float32 per block of 256 (2048 in older bitsandbytes) codes.

    Returns:
        float32, the shape of `codes`.

    Raises:
        ValueError: the number of blocks belongs to no known block size.

    >>> table = torch.linspace(-1, 1, 256)
    >>> dequantize_blocks(torch.tensor([0, 255], dtype=torch.uint8), table, torch.tensor([3.0])).tolist()
    [-3.0, 3.0]
    """
    count = codes.numel()
    for block in _BITSANDBYTES_BLOCKS:
        if absmax.numel() == math.ceil(count / block):
            scale = absmax.float().repeat_interleave(block)[:count]
            return (table.float()[codes.flatten().long()] * scale).view(codes.shape)
    raise ValueError(f"{absmax.numel()} blocks for {count} codes, expected blocks of 256 or 2048")


def _unwrapped(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Entries in one mapping; newer bitsandbytes nests its tensors, to hide them from FSDP."""
    nested = state.get(_BITSANDBYTES_WRAPPER)
    return {**state, **nested} if isinstance(nested, Mapping) else state


def _from_torch(state: Mapping[str, Any], amsgrad: bool) -> Moments:
    largest = _values(state, "max_exp_avg_sq") if amsgrad else None
    return Moments(_values(state, "exp_avg"), _values(state, "exp_avg_sq"), largest, _count(state["step"]))


def _values(state: Mapping[str, Any], key: str, codes: bool = False) -> Tensor:
    """A tensor of real numbers: a conversion of another one would drop what makes it different without a word.

    Raises:
        KeyError: there is none.
        ValueError: it is something else.
    """
    tensor = state[key]
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{key} is no tensor but {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{key} is sparse or quantised")
    if tensor.device.type == "meta":
        raise ValueError(f"{key} has a shape but no values")
    if tensor.dtype not in (_CODES if codes else _REAL):
        raise ValueError(f"{key} of type {str(tensor.dtype).removeprefix('torch.')}")
    return tensor.detach()


def _from_bitsandbytes(state: Mapping[str, Any]) -> Moments:
    pair = []
    for index in ("1", "2"):
        tensor = _values(state, f"state{index}", codes=True)
        if tensor.dtype == torch.uint8:
            table = _values(state, f"qmap{index}")
            if table.numel() != _CODE_VALUES:
                raise ValueError(f"qmap{index} of {table.numel()} values instead of {_CODE_VALUES}")
            tensor = dequantize_blocks(tensor, table.flatten(), _values(state, f"absmax{index}").flatten())
        pair.append(tensor)
    return Moments(pair[0], pair[1], None, _count(state["step"]))


def _count(step: Any) -> int:
    single = isinstance(step, Tensor) and step.numel() == 1 and step.device.type != "meta"
    if not single and (isinstance(step, bool) or not isinstance(step, (int, float))):
        raise ValueError(
            f"step {shown(step, 40)}" if not isinstance(step, Tensor) else "step of several values"
        )
    try:
        value = float(step)
    except (OverflowError, TypeError, ValueError, RuntimeError):
        value = math.nan
    if not math.isfinite(value) or not 0 <= value <= _MOST_STEPS or value != int(value):
        raise ValueError(f"step {value}")
    return int(value)


def _impossible(moments: Moments) -> list[str]:
    reasons = []
    if moments.step == 0 and moments.exp_avg.any():
        reasons.append("moments of a gradient, and a count of 0 steps")
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        tensor = getattr(moments, key)
        if tensor is None:
            continue
        if tensor.shape != moments.exp_avg.shape:
            reasons.append(
                f"{key} of shape {tuple(tensor.shape)} beside exp_avg of {tuple(moments.exp_avg.shape)}"
            )
        elif not torch.isfinite(tensor).all():
            reasons.append(f"{int((~torch.isfinite(tensor)).sum())} non-finite values in {key}")
        elif key != "exp_avg" and (tensor < 0).any():
            reasons.append(f"{int((tensor < 0).sum())} negative values in {key}")
    return reasons
