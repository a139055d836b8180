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
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from probe.estimators.control_variates import SMALLEST_SAMPLE
from tests.support.coverage import ESTIMATES_HEAD, VERDICTS_HEAD, Coverage
from tests.support.tabular import FAMILIES, draw, tabular


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(ESTIMATES_HEAD)
    verdicts = []
    for family, (kind, rare) in FAMILIES.items():
        space = tabular(kind, rare)
        for size in options.sizes:
            g = torch.Generator().manual_seed(11)
            runs = [draw(space, size, g, size >= SMALLEST_SAMPLE) for _ in range(options.repetitions)]
            found = Coverage(family, size, space.exact, runs)
            print("\n".join(found.estimate_rows()), flush=True)
            verdicts.append(found.verdict_row())
    print(f"\n{VERDICTS_HEAD}")
    print("\n".join(verdicts))


if __name__ == "__main__":
    main()
