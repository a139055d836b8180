"""How often the 95 % intervals cover, and how often a verdict of `trustworthy` stands on one that does not.

Policies of known tails, enumerated (`tests/support/tabular.py`), so that the truth is exact. For each family and size
of E: coverage with normal intervals (1.96 standard errors) and with those that are reported, the share of each verdict,
and the share of all runs that are trustworthy and whose interval of prediction or measurement (per token) misses.
Coverage among the trustworthy alone is lowered by selection, as what stands out was overestimated as a rule; beside it
stands that of a perfect normal interval of the same power, among the estimates of 4 standard errors.

    python benchmarks/coverage.py [--repetitions 400] [--sizes 64 256 1024]

Control variates are used from 64 prompts on, as `auto` does.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from probe.estimators.control_variates import SMALLEST_SAMPLE
from probe.estimators.estimate import NORMAL_975
from probe.verdict.resolution import PRECISE
from tests.support.intervals import VERDICT_HEADS, coverage_cell, verdict_cells
from tests.support.tabular import FAMILIES, Drawn, Tabular, draw, tabular


def wrong(space: Tabular, run: Drawn) -> bool:
    """Whether the interval of the measured change per token misses, or that of the prediction does."""
    exact = space.exact
    return not all(run.covers(name, exact[name])[1] for name in run.reported)


def among_trustworthy(space: Tabular, runs: list[Drawn]) -> tuple[float, float]:
    """Coverage of the measurement per token among trustworthy runs, and that of a perfect normal interval.

    The perfect one: `N(delta, sigma^2)` with the exact change and the true spread, among estimates of at least
    `PRECISE` times `sigma`.
    """
    name = runs[0].reported[-1]
    exact = space.exact[name][1]
    chosen = [run.covers(name, space.exact[name])[1] for run in runs if run.verdict.word == "trustworthy"]
    errors = torch.tensor([list(run.estimates[name])[1].value - exact for run in runs])
    m = abs(exact) / float(errors.square().mean().sqrt())
    normal = torch.distributions.Normal(0.0, 1.0).cdf

    def between(low: float, high: float) -> float:
        return max(float(normal(torch.tensor(high)) - normal(torch.tensor(low))), 0.0)

    standing_out = between(PRECISE - m, math.inf) + between(-math.inf, -PRECISE - m)
    held = between(max(PRECISE - m, -NORMAL_975), NORMAL_975) + between(
        -NORMAL_975, min(-PRECISE - m, NORMAL_975)
    )
    own = sum(chosen) / len(chosen) if chosen else math.nan
    return own, held / standing_out if standing_out else math.nan


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| family | B_E | estimate | sequence | token |\n|---|---|---|---|---|")
    verdicts = []
    for family, (kind, rare) in FAMILIES.items():
        space = tabular(kind, rare)
        for size in options.sizes:
            g = torch.Generator().manual_seed(11)
            runs = [draw(space, size, g, size >= SMALLEST_SAMPLE) for _ in range(options.repetitions)]
            for name in runs[0].estimates:
                pairs = [run.intervals(name, space.exact[name]) for run in runs]
                cells = [coverage_cell(of_one) for of_one in zip(*pairs, strict=True)]
                print(f"| {family} | {size} | {name} | {' | '.join(cells)} |", flush=True)
            words = [run.verdict.word for run in runs]
            shares = verdict_cells(words, [wrong(space, run) for run in runs])
            own, perfect = (
                f"{100 * x:.0f}" if math.isfinite(x) else "-" for x in among_trustworthy(space, runs)
            )
            verdicts.append(f"| {family} | {size} | {shares} | {own} | {perfect} |")
    print(
        f"\n| family | B_E | {VERDICT_HEADS} | covers among trustworthy | a perfect interval |"
        "\n|---|---|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(verdicts))


if __name__ == "__main__":
    main()
