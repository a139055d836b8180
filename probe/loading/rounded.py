"""Parameters that a training keeps in 16 bits, which its steps are rounded to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from probe.loading.moments import Moments

_HALF = (torch.bfloat16, torch.float16)


def rounded_types(
    moments: Mapping[str, Moments], parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.dtype]:
    """The parameters that the training has in 16 bits: moments of such a type, and no weight with more digits."""
    return {
        name: moment.exp_avg.dtype
        for name, moment in moments.items()
        if moment.exp_avg.dtype in _HALF and _fits(parameters[name], moment.exp_avg.dtype)
    }


def _fits(parameter: nn.Parameter, dtype: torch.dtype) -> bool:
    """Whether every value is a number of `dtype`."""
    values = parameter.detach()
    return torch.equal(values.to(dtype).to(values.dtype), values)


def rounding_notes(
    rounded: Mapping[str, torch.dtype], family: str, parameters: Mapping[str, nn.Parameter]
) -> tuple[str, ...]:
    """What the report says of rounded steps, or of steps that may be.

    Args:
        rounded: from `rounded_types`.
        family: whose optimizer wrote the moments.
        parameters: the trainable ones by name.
    """
    if rounded:
        types = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in rounded.values()}))
        return (
            f"the training keeps weights and moments of {len(rounded)} parameters in {types}, which rounds most of a "
            "small step away: the change is measured after the rounded step, and predicted for the exact one",
        )
    if family == "bitsandbytes" and all(
        _fits(parameter, torch.bfloat16) for parameter in parameters.values()
    ):
        return (
            "the weights are saved in bfloat16; whether the training rounds its steps to it is not in the moments of "
            "bitsandbytes, and the step is taken without rounding",
        )
    return ()
