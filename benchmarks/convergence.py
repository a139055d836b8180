"""The convergence plot: deltaH1 and deltaH_true against the learning rate, and their same-E difference.

A sweep of the demo policy in float64: one E, one U and one update direction per seed, many learning rates. The slope of
deltaH_true against the learning rate is 1 and that of the same-E difference 2, as the learning rate goes to 0.

    python benchmarks/convergence.py --output docs/convergence.png
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from probe.config.files import read_config_file
from probe.sweep import run_sweep

FACTORS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Learning rates relative to the one the policy was trained with."""
SMALLEST, LARGEST = 1 / 16, 1 / 2
"""The range of the table: above the rounding of float32 (inside the model's norms), below the cubic term."""


def main() -> int:
    """Run the sweep, copy the plot and print the slopes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="docs/convergence.png", help="where the plot goes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", default=None, help="keep the sweep here: a second call continues it")
    options = parser.parse_args()
    config = read_config_file("quickstart")
    config = {**config, "checkpoint": {**config["checkpoint"], "dtype": "float64"}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.folder or scratch)
        table = run_sweep(config, eta_factors=FACTORS, seeds=range(options.seeds), output_folder=str(folder))
        shutil.copyfile(folder / "eta.png", options.output)
        summary = json.loads((folder / "sweep_summary.json").read_text())
    for row in summary["eta_slopes"]:
        print(f"{row['quantity']} per {row['estimand']}: slope {row['slope']:.3f} +/- {row['slope_se']:.3f}")
    small = table[table["eta_factor"].between(SMALLEST, LARGEST)]
    print("\nSame-E difference over eta^2, and its log-log slope, on each E\n")
    print(
        "| seed | estimand | "
        + " | ".join(f"{eta:.3g}" for eta in sorted(set(small["learning_rate"])))
        + " | slope |"
    )
    print("|---|---|" + "---|" * (small["learning_rate"].nunique() + 1))
    for seed, rows in small.sort_values("learning_rate").groupby("seed"):
        eta = rows["learning_rate"].to_numpy()
        for estimand, key in (("token", "residual_tok"), ("sequence", "residual")):
            found = rows[key].to_numpy()
            slope = np.polyfit(np.log(eta), np.log(np.abs(found)), 1)[0]
            cells = " | ".join(f"{x:+.1f}" for x in found / eta**2)
            print(f"| {seed} | {estimand} | {cells} | {slope:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
