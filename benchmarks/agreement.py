"""Do prediction and measurement agree on the demo policy? Prints two tables in Markdown.

1. Over seeds, at the learning rate the checkpoint was trained with: deltaH1 (causal weights) and deltaH_true.
2. Over learning rates, on one E: the difference deltaH1(matched) - deltaH_true(snis) shares every sampling error, so
   it is curvature alone and shrinks like the square of the learning rate. In float64: at these sizes float32 rounding
   would show.

    python benchmarks/agreement.py [--seeds 5] [--config quickstart]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
import sys
from typing import Any

from probe import OfflineEntropyProbe
from probe.parsing import read_config_file

FACTORS = (1.0, 2.0, 4.0, 8.0)
"""Learning rates of the second table, relative to the smallest."""
SMALLEST = 1 / 16
"""The smallest of them relative to the trained one."""


def probe(config: dict[str, Any], seed: int, **rework: Any) -> dict[str, Any]:
    """One run without any files; the first probe of a configuration also makes the demo policy."""
    sections = {
        **config,
        "seed_everything": seed,
        "probe_rework": {**config.get("probe_rework", {}), **rework},
        "detailed_logging": {"enabled": False},
        "trainer": {**config.get("trainer", {}), "logger": False},
    }
    with contextlib.redirect_stdout(io.StringIO()):  # the report of each run
        return OfflineEntropyProbe(sections).run_mixed_probe()


def over_seeds(config: dict[str, Any], seeds: int) -> float:
    """Print the first table; returns the trained learning rate."""
    runs = [probe(config, seed) for seed in range(seeds)]
    print("| seed | deltaH1 | deltaH_true | standard error | H before | ESS / B_E |")
    print("|---|---|---|---|---|---|")
    for seed, r in enumerate(runs):
        ess = r["diagnostics"]["ESS"] / r["B_E"]
        print(
            f"| {seed} | {r['deltaH1']:+.4f} | {r['deltaH_true']:+.4f} | {r['deltaH_true_se']:.4f} "
            f"| {r['H_orig']:.3f} | {ess:.3f} |"
        )
    for name in ("deltaH1", "deltaH_true"):
        values = [r[name] for r in runs]
        print(
            f"\n{name}: mean {statistics.mean(values):+.4f}, standard deviation {statistics.stdev(values):.4f}"
        )
    differences = [r["residual"] for r in runs]
    print(f"\ndifference: mean {statistics.mean(differences):+.4f}, sd {statistics.stdev(differences):.4f}")
    print(f"\nsame sign in {sum(r['deltaH1'] * r['deltaH_true'] > 0 for r in runs)} of {seeds} runs")
    return float(runs[0]["learning_rate"])


def over_learning_rates(config: dict[str, Any], trained: float, seeds: int) -> None:
    """Print the second table: the difference over eta^2, which tends to a constant, and the log-log slope."""
    precise = {**config, "checkpoint": {**config["checkpoint"], "dtype": "float64"}}
    etas = [trained * SMALLEST * factor for factor in FACTORS]
    print(f"\n| seed | estimand | {' | '.join(f'{eta:.3g}' for eta in etas)} | log-log slope |")
    print(f"|---|---|{'---|' * len(etas)}---|")
    for seed in range(seeds):
        runs = [probe(precise, seed, weighting="matched", learning_rate=eta) for eta in etas]
        for estimand, key in (("sequence", "residual"), ("token", "residual_tok")):
            scaled = [f"{r[key] / eta**2:+.1f}" for r, eta in zip(runs, etas, strict=True)]
            slope = log_log_slope(etas, [r[key] for r in runs])
            print(f"| {seed} | {estimand} | {' | '.join(scaled)} | {slope:.2f} |", flush=True)


def log_log_slope(x: list[float], y: list[float]) -> float:
    """Least-squares slope of `log |y|` against `log x`."""
    points = [(math.log(u), math.log(abs(v))) for u, v in zip(x, y, strict=True)]
    mx, my = (statistics.mean(p[k] for p in points) for k in (0, 1))
    return sum((u - mx) * (v - my) for u, v in points) / sum((u - mx) ** 2 for u, _ in points)


def main() -> int:
    """Run both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--config", default="quickstart")
    options = parser.parse_args()
    config = read_config_file(options.config)
    over_learning_rates(config, over_seeds(config, options.seeds), options.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
