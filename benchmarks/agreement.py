"""Do prediction and measurement agree on the demo policy? A table over seeds, at the checkpoint's learning rate.

    python benchmarks/agreement.py [--seeds 5] [--config quickstart]

For learning rates see `convergence.py`, for fresh samples of the updated policy `independent.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
from typing import Any

from probe import OfflineEntropyProbe
from probe.config.files import read_config_file
from probe.snapshot import one_thread


def probe(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """One run without any files; the first probe of a configuration also makes the demo policy."""
    sections = {
        **config,
        "seed_everything": seed,
        "detailed_logging": {"enabled": False},
        "trainer": {**config.get("trainer", {}), "logger": False},
    }
    with contextlib.redirect_stdout(io.StringIO()), one_thread():  # the report of each run
        return OfflineEntropyProbe(sections).run_mixed_probe()


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--config", default="quickstart")
    options = parser.parse_args()
    config = read_config_file(options.config)
    print("| seed | deltaH1 | deltaH_true | H before | ESS / B_E | verdict |\n|---|---|---|---|---|---|")
    runs = []
    for seed in range(options.seeds):
        runs.append(r := probe(config, seed))
        values = [f"{r[key]:+.4f} +/- {r[f'{key}_se']:.4f}" for key in ("deltaH1", "deltaH_true")]
        ess = r["diagnostics"]["ESS"] / r["B_E"]
        print(
            f"| {seed} | {' | '.join(values)} | {r['H_orig']:.3f} | {ess:.3f} | {r['verdict']} |", flush=True
        )
    columns = {name: [r[name] for r in runs] for name in ("deltaH1", "deltaH_true")}
    columns["difference"] = [r["deltaH1"] - r["deltaH_true"] for r in runs]
    for name, found in columns.items():
        print(
            f"\n{name}: mean {statistics.mean(found):+.4f}, standard deviation {statistics.stdev(found):.4f}"
        )
    print(f"\nsame sign in {sum(r['deltaH1'] * r['deltaH_true'] > 0 for r in runs)} of {options.seeds} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
