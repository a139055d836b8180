"""The errors of a probed step, with the size that this probe and those before it say together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from probe.estimand import SEQUENCE, TOKEN, Number, Numbers, PerEstimand, from_mapping
from probe.estimators.pooled_error import POOLED_SAMPLES, ErrorSize, pooled_error
from probe.estimators.student import student_interval
from probe.live.outcome import Outcome

POOLED = {"H_orig": 0, "deltaH1": 1, "deltaH_true": 1}
"""What is pooled, and the power of the step's length that it goes with. Others have errors of their own alone: the
same-E difference is of second order or rounding, and parts go with the lengths of their own parts of the step."""


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
        found = outcome.changes
        return replace(
            outcome,
            changes=replace(found, prediction=pool(found.prediction), measurement=pool(found.measurement)),
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
        return {
            name: self._pooled(name, numbers, B_E, length) if name in POOLED else numbers
            for name, numbers in quantities.items()
        }

    def replay(self, entry: Mapping[str, Any]) -> None:
        """Take in the errors of a logged entry; they are pooled ones already, and smoother than those of one probe.

        Their degrees of freedom are shared out among the probes that were pooled. They are not logged everywhere:
        where they are absent they are those of light tails.
        """
        B_E, length = entry.get("B_E"), entry.get("step_norm")
        if not B_E or length is None:
            return
        for name in POOLED:
            count = min(len(self.sizes.get(TOKEN.key(name), ())) + 1, POOLED_SAMPLES)

            def known(number: Number | None, count: int = count) -> Number | None:
                if number is None:
                    return None
                df = B_E - 1.0 if number.df is None else number.df / count
                return replace(number, df=max(df, 1.0))

            self._pooled(name, from_mapping(entry, name).map(known), B_E, length)

    def _pooled(self, name: str, numbers: Numbers, B_E: int, length: float) -> Numbers:
        """Both estimands of a quantity with pooled errors; variances are kept in the unit of step and sample."""
        unit = length ** (2 * POOLED[name]) / B_E
        return PerEstimand.of(
            [self._pooled_number(one.key(name), numbers[one], unit) for one in (SEQUENCE, TOKEN)]
        )

    def _pooled_number(self, key: str, number: Number | None, unit: float) -> Number | None:
        """A number with its pooled error, given the variance that counts as 1; one without an error as it is."""
        if number is None or number.se is None or number.df is None or unit == 0.0:
            return number
        own = ErrorSize(number.se**2 / unit, number.df)
        earlier = self.sizes.get(key, [])
        size = pooled_error(own, earlier)
        if size.variance < math.inf:
            self.sizes[key] = [*earlier, own][-(POOLED_SAMPLES - 1) :]
        se = (size.variance * unit) ** 0.5
        ends = None if number.value is None else student_interval(number.value, se, size.df)
        return replace(number, se=se, df=size.df, ci95=ends)
