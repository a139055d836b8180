"""What a model does to its logits after the output layer: a scale and a soft cap, or one of them, or nothing.

Their values stand in a model's configuration under many names, multiplied here and divided there. So every number that
may be meant is tried, and the one that gives the model's own logits is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTail:
    """`c tanh(s y / c)` of logits `y`, with a scale `s` and a soft cap `c`; `s y` without a soft cap."""

    scale: float
    softcap: float | None

    def __call__(self, logits: Tensor) -> Tensor:
        """The logits `(..., V)` that the model gives."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def scaled(self, logits: Tensor, temperature: float) -> Tensor:
        """The logits `(..., V)` that the model gives, over the temperature, in place of the output layer's.

        Without a soft cap that is one factor.
        """
        if self.softcap is not None:
            logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / temperature)
        elif self.scale != temperature:
            logits.mul_(self.scale / temperature)
        return logits

    def slope(self, scaled: Tensor, temperature: float) -> Tensor | float:
        """The derivative of `scaled` by the output layer's logits: a number without a soft cap.

        Args:
            scaled: what `scaled` gave, `(..., V)`.
            temperature: the sampling temperature `tau`.
        """
        factor = self.scale / temperature
        if self.softcap is None:
            return factor
        return (scaled * (temperature / self.softcap)).square_().neg_().add_(1.0).mul_(factor)


def possible_tails(config: Any) -> list[LogitTail]:
    """The tails that a configuration allows: first those with the soft cap that it declares, and the plain scale first.

    Args:
        config: of a model of text.
    """
    caps = dict.fromkeys((_softcap(config), None))
    return [LogitTail(scale, cap) for cap in caps for scale in _scale_candidates(config)]


def choose_tail(tails: Sequence[LogitTail], output: Tensor, own: Tensor, tolerance: float) -> LogitTail:
    """The tail that makes the output layer's logits the model's; the first where none does.

    A declared soft cap is only left out where nothing fits with it: small logits hardly show it. Where several
    scales fit, as all do for logits of 0, the nearest wins, and the plain one among equals.

    Args:
        tails: from `possible_tails`.
        output: logits of the output layer.
        own: logits of the model, of the same shape.
        tolerance: the largest `difference` that counts as none.
    """
    for cap in dict.fromkeys(tail.softcap for tail in tails):
        errors = [(difference(tail(output), own), tail) for tail in tails if tail.softcap == cap]
        error, best = min(errors, key=lambda found: found[0])
        if error <= tolerance:
            return best
    return tails[0]


def difference(mine: Tensor, own: Tensor) -> float:
    """Largest difference of logits relative to the largest one of `own`, or to 1 where that is smaller."""
    return float((own - mine.detach().to(own)).abs().max() / own.abs().max().clamp_min(1.0))


def _softcap(config: Any) -> float | None:
    """The soft cap of the logits that a configuration declares (attention has one of its own)."""
    return next(
        (float(c) for name, c in _numbers(config) if "cap" in name and "soft" in name and "attn" not in name),
        None,
    )


def _scale_candidates(config: Any) -> list[float]:
    """1, and every number of a configuration that may scale logits, as a factor and as a divisor."""
    named = [
        value for name, value in _numbers(config) if any(sign in name for sign in ("scal", "mult", "mup"))
    ]
    return list(dict.fromkeys([1.0, *(factor for value in named for factor in (value, 1.0 / value))]))


def _numbers(config: Any) -> list[tuple[str, float]]:
    """The names and values of a configuration's numbers that are neither 0 nor truth values."""
    return [
        (name, float(value))
        for name, value in vars(config).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0
    ]
