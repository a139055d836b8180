"""How often intervals of repeated draws cover, and verdicts of `trustworthy` stand on one that does not, as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from probe.estimators.estimate import NORMAL_975
from probe.verdict.resolution import PRECISE
from tests.support.experiment import Drawn
from tests.support.intervals import VERDICT_HEADS, coverage, coverage_cell, verdict_cells

ESTIMATES_HEAD = "| family | B_E | estimate | sequence | token |\n|---|---|---|---|---|"
VERDICTS_HEAD = (
    f"| family | B_E | {VERDICT_HEADS} | covers among trustworthy | a perfect interval |"
    "\n|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Coverage:
    """Repeated draws of an E of one size.

    Attributes:
        family: what the tables call the policy.
        size: prompts in E.
        exact: what each estimate estimates, `[sequence, token]`, nats per response and per token.
        runs: what the probe made of each E.
    """

    family: str
    size: int
    exact: dict[str, list[float]]
    runs: Sequence[Drawn]

    def shares(self, name: str, which: int, shift: float = 0.0) -> tuple[float, float]:
        """Share of runs whose interval covers: with 1.96 standard errors, and as reported.

        Args:
            name: of the estimate.
            which: 0 per response, 1 per token.
            shift: added to the exact value, nats.
        """
        exact = [value + shift for value in self.exact[name]]
        return coverage([run.intervals(name, exact)[which] for run in self.runs])

    def estimate_rows(self) -> list[str]:
        """Coverage of every estimate, %: with 1.96 standard errors to as reported; under `ESTIMATES_HEAD`."""
        rows = []
        for name in self.runs[0].estimates:
            pairs = [run.intervals(name, self.exact[name]) for run in self.runs]
            cells = [coverage_cell(of_one) for of_one in zip(*pairs, strict=True)]
            rows.append(f"| {self.family} | {self.size} | {name} | {' | '.join(cells)} |")
        return rows

    def verdict_row(self) -> str:
        """Shares of verdicts and what they are worth, %; under `VERDICTS_HEAD`."""
        words = [run.verdict.word for run in self.runs]
        shares = verdict_cells(words, [self.misses(run) for run in self.runs])
        own, perfect = (f"{100 * x:.0f}" if math.isfinite(x) else "-" for x in self.among_trustworthy())
        return f"| {self.family} | {self.size} | {shares} | {own} | {perfect} |"

    def misses(self, run: Drawn) -> bool:
        """Whether the interval of the measured change per token misses, or that of the prediction does."""
        return not all(run.covers(name, self.exact[name])[1] for name in run.reported)

    def among_trustworthy(self) -> tuple[float, float]:
        """Coverage of the measurement per token among trustworthy runs, and that of a perfect normal interval.

        The perfect one: `N(delta, sigma^2)` with the exact change and the true spread, among estimates of at least
        `PRECISE` times `sigma`.
        """
        name = self.runs[0].reported[-1]
        exact = self.exact[name][1]
        chosen = [
            run.covers(name, self.exact[name])[1] for run in self.runs if run.verdict.word == "trustworthy"
        ]
        errors = torch.tensor([list(run.estimates[name])[1].value - exact for run in self.runs])
        own = sum(chosen) / len(chosen) if chosen else math.nan
        return own, _perfect(abs(exact) / float(errors.square().mean().sqrt()))


def _perfect(m: float) -> float:
    """Coverage of a perfect interval of a normal estimate of `m` standard deviations, where it is `PRECISE` of them."""
    normal = torch.distributions.Normal(0.0, 1.0).cdf

    def between(low: float, high: float) -> float:
        return max(float(normal(torch.tensor(high)) - normal(torch.tensor(low))), 0.0)

    standing_out = between(PRECISE - m, math.inf) + between(-math.inf, -PRECISE - m)
    held = between(max(PRECISE - m, -NORMAL_975), NORMAL_975) + between(
        -NORMAL_975, min(-PRECISE - m, NORMAL_975)
    )
    return held / standing_out if standing_out else math.nan
