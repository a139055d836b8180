"""The errors of a probed step, with the size that this probe and those before it say together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from probe.estimand import ESTIMANDS, Number, Numbers, from_mapping
from probe.estimators.pooled_error import POOLED_SAMPLES, ErrorSize, pooled_error
from probe.estimators.student import student_quantile
from probe.live.outcome import Outcome

LEVELS, SECOND_ORDER = ("H_orig",), ("residual",)
"""What does not depend on the length of the step, and what goes with its square; all else goes with it."""
POOLED = (
    "H_orig",
    "deltaH1",
    "deltaH_true",
    "residual",
    "deltaH1_momentum",
    "deltaH1_decay",
    "deltaH1_gradient",
)
"""What a log holds with errors that are pooled."""


@dataclass
class ErrorMemory:
    """The sizes of the errors of the last probes; see `pooled_error`.

    A variance is kept per squared length of the step and times the number of responses, so that those of steps and
    samples of different sizes are of one kind: a first-order change is linear in the step.

    Attributes:
        sizes: by the name of the number.
    """

    sizes: dict[str, list[ErrorSize]] = field(default_factory=dict)

    def pooled(self, outcome: Outcome) -> Outcome:
        """Take in a probe.

        Returns:
            The outcome whose standard errors, degrees of freedom and intervals are the pooled ones.
        """
        B_E, length = outcome.sizes.B_E, outcome.step_norm
        if B_E is None:
            return outcome
        pool = partial(self.numbers, B_E=B_E, length=length)
        found, parts = outcome.changes, outcome.parts
        return replace(
            outcome,
            changes=replace(
                found,
                prediction=pool(found.prediction),
                measurement=pool(found.measurement),
                difference=pool(found.difference),
            ),
            parts=None if parts is None else replace(parts, numbers=pool(parts.numbers)),
        )

    def numbers(self, quantities: Mapping[str, Numbers], B_E: int, length: float) -> dict[str, Numbers]:
        """Take in quantities of one probe.

        Args:
            quantities: by name.
            B_E: responses.
            length: of the step.

        Returns:
            The same with pooled errors; what has none stays as it is.
        """
        return {name: self._pooled(name, numbers, B_E, length) for name, numbers in quantities.items()}

    def replay(self, entry: Mapping[str, Any]) -> None:
        """Take in the errors of a logged entry; they are pooled ones already, and smoother than those of one probe.

        Degrees of freedom are not logged everywhere: where they are absent they are those of light tails.
        """
        B_E, length = entry.get("B_E"), entry.get("step_norm")
        if not B_E or length is None:
            return

        def known(number: Number | None) -> Number | None:
            return None if number is None else replace(number, df=number.df or max(B_E - 1.0, 1.0))

        self.numbers({name: from_mapping(entry, name).map(known) for name in POOLED}, B_E, length)

    def _pooled(self, name: str, numbers: Numbers, B_E: int, length: float) -> Numbers:
        """Both estimands of a quantity with pooled errors."""
        pairs = {
            one: self._pooled_number(one.key(name), numbers[one], _unit(name, B_E, length))
            for one in ESTIMANDS
        }
        return Numbers(**{estimand.name: number for estimand, number in pairs.items()})

    def _pooled_number(self, key: str, number: Number | None, unit: float) -> Number | None:
        """A number with its pooled error, given the variance that counts as 1; one without an error as it is."""
        if number is None or number.se is None or number.df is None or unit == 0.0:
            return number
        own = ErrorSize(number.se**2 / unit, number.df)
        earlier = self.sizes.setdefault(key, [])
        size = pooled_error(own, earlier)
        if size.variance < math.inf:
            self.sizes[key] = [*earlier, own][-(POOLED_SAMPLES - 1) :]
        se = (size.variance * unit) ** 0.5
        half = 0.0 if se == 0.0 else student_quantile(size.df) * se
        ends = None if number.value is None else (number.value - half, number.value + half)
        return replace(number, se=se, df=size.df, ci95=ends)


def _unit(name: str, B_E: int, length: float) -> float:
    """The variance that counts as 1."""
    order = 0 if name in LEVELS else 2 if name in SECOND_ORDER else 1
    return length ** (2 * order) / B_E
