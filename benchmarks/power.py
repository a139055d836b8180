"""How often a run of the size that a pilot recommends resolves the change, on policies whose truth is known.

Policies of known tails, enumerated (`tests/support/tabular.py`). Each repetition draws a pilot (and a second one of the
size that the plan names, where it recommends none), takes the recommended size (power 0.8, rounded up), draws a fresh E
of that size and asks whether the 95 % interval of deltaH_true per token excludes 0; the same for 4 standard errors.
Beside it what the pilot's value in the place of the truth (`plug-in`) would have led to.

    python benchmarks/power.py [--repetitions 200] [--pilots 64 128] [--families light low ...]

`change` is the true change in true standard errors of the pilot; the promise begins at 0.85. `again`: a second pilot
was asked for. Without control variates, or with `--cv`: pilot and run have them from 256 prompts on, as `auto` does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from probe.estimators.control_variates import SMALLEST_SAMPLE
from probe.estimators.estimate import Estimate
from probe.estimators.power import Pilot, needed_size, size_for
from probe.plan.sizes import Wanted
from probe.verdict.resolution import PRECISE
from probe.verdict.sample import FEW_RESPONSES
from probe.verdict.sentences import round_up
from tests.support.tabular import Tabular, draw, tabular

FAMILIES = {
    "light": ("light", 0.0),
    "low": ("low", 0.0),
    "branch 1/50": ("branch", 1 / 50),
    "branch 1/200": ("branch", 1 / 200),
    "branch 1/500": ("branch", 1 / 500),
}
AGAIN = 8
"""Times the pilot that follows one whose responses are all alike, about that for a change of one standard error."""
LARGEST = 40_000
"""A run that is recommended larger is drawn of this size."""


@dataclass(frozen=True)
class Outcome:
    """One repetition.

    Attributes:
        size: recommended.
        again: whether a second pilot was asked for.
        resolved: whether the run of that size excludes 0.
        precise: whether the run of the size for `PRECISE` standard errors has them; None where none was recommended.
        plug_in: whether the run of the size by the pilot's value excludes 0.
    """

    size: int
    again: bool
    resolved: bool
    precise: bool | None
    plug_in: bool


def estimate(space: Tabular, size: int, g: torch.Generator, cv: bool) -> Estimate:
    """DeltaH_true per token of a fresh E."""
    run = draw(space, size, g, cv and size >= SMALLEST_SAMPLE)
    return run.estimates[run.reported[1]].token


def excludes_zero(found: Estimate) -> bool:
    """Whether the interval does."""
    low, high = found.ci95
    return low > 0 or high < 0


def planned(
    space: Tabular, pilot_size: int, g: torch.Generator, cv: bool
) -> tuple[Estimate, Pilot, int, int | None]:
    """The first pilot's estimate, the last pilot, and what it recommends: to resolve, and to be precise."""
    first: Estimate | None = None
    while True:
        found = estimate(space, pilot_size, g, cv)
        first = found if first is None else first
        if found.se == 0.0:  # all responses alike: nothing to plan from
            pilot_size *= AGAIN
            continue
        pilot = Pilot(found.value, found.se, found.df, pilot_size)
        size, precise = (
            Wanted.of(needed_size(pilot, multiple=multiple), FEW_RESPONSES).size
            for multiple in (None, PRECISE)
        )
        if size is not None:
            return first, pilot, size, precise
        pilot_size = min(round_up(size_for(pilot, 1.0)), LARGEST)


def repetitions(space: Tabular, pilot_size: int, times: int, cv: bool) -> Iterator[tuple[Estimate, Outcome]]:
    """Pilot, recommended size, fresh run."""
    g = torch.Generator().manual_seed(23)
    for _ in range(times):
        first, pilot, size, precise = planned(space, pilot_size, g, cv)
        resolved = excludes_zero(estimate(space, min(size, LARGEST), g, cv))
        far = None if precise is None else estimate(space, min(precise, LARGEST), g, cv)
        exact = None if far is None else abs(far.value) >= PRECISE * far.se
        naive = min(round(max(size_for(pilot, pilot.z), FEW_RESPONSES)), LARGEST)
        plug_in = excludes_zero(estimate(space, naive, g, cv))
        yield first, Outcome(size, pilot.size != pilot_size, resolved, exact, plug_in)


def row(name: str, pilot_size: int, times: int, cv: bool) -> str:
    """One line of the table."""
    kind, rare = FAMILIES[name]
    space = tabular(kind, rare or 0.02)  # type: ignore[arg-type]
    pilots, outcomes = zip(*repetitions(space, pilot_size, times, cv), strict=True)
    effect = abs(float(space.change[1])) / statistics.stdev(one.value for one in pilots)

    def share(values: list[bool | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{100 * sum(known) / len(known):.0f}" if known else "-"

    cells = (
        f"{name}{' cv' if cv else ''}",
        str(pilot_size),
        f"{effect:.2g}",
        f"{100 * sum(excludes_zero(one) for one in pilots) / times:.0f}",
        f"{100 * sum(one.again for one in outcomes) / times:.0f}",
        f"{statistics.median(one.size for one in outcomes):.0f}",
        share([one.resolved for one in outcomes]),
        share([one.precise for one in outcomes]),
        share([one.plug_in for one in outcomes]),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--pilots", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--cv", action="store_true", help="with control variates")
    options = parser.parse_args()
    torch.set_num_threads(1)
    heads = (
        "family",
        "pilot",
        "change",
        "pilot resolves",
        "again",
        "median B_E",
        "resolves",
        "precise",
        "plug-in",
    )
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name in options.families:
        for pilot_size in options.pilots:
            print(row(name, pilot_size, options.repetitions, options.cv), flush=True)


if __name__ == "__main__":
    main()
