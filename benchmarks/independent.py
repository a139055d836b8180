"""The independent check: a fresh sample of the updated policy against reweighting the old one, over seeds.

For each seed, E is drawn and the update taken; deltaH_true is measured by reweighting E and again from fresh
responses of the updated policy to the same prompts. Their difference in units of its own standard error (prompt by
prompt, so that what they share cancels) is a standard normal number if both are right.

    python benchmarks/independent.py --seeds 20
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys

from probe import OfflineEntropyProbe
from probe.config.files import read_config_file
from probe.snapshot import one_thread


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument(
        "--learning_rate", type=float, default=5e-3, help="large enough for resampling to see it"
    )
    options = parser.parse_args()
    config = {**read_config_file(options.config), "detailed_logging": {"enabled": False}}
    config |= {"importance": {"is_mode": "resample", "noise_floor": False}}
    rework = {"curvature": "off", "update_spread": False, "learning_rate": options.learning_rate}
    config |= {"probe_rework": rework, "trainer": {"logger": False}}
    names = ("snis", "per_decision", "per_decision+cv")
    print("| seed | resample | per_decision+cv | z per token: " + " | z: ".join(names) + " |")
    print("|---|---|---|" + "---|" * len(names))
    scores: dict[str, list[float]] = {name: [] for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in (*names, "resample")}
    with one_thread():
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            probe = OfflineEntropyProbe({**config, "seed_everything": seed})
            with contextlib.redirect_stdout(io.StringIO()):
                probe.run_mixed_probe()
            truth = probe.runner.state.ground_truth
            assert truth is not None
            fresh, best = truth.estimates["resample"].token, truth.estimates["per_decision+cv"].token
            cells = []
            for name in names:
                difference = fresh - truth.estimates[name].token
                scores[name].append(difference.value / difference.se)
                cells.append(f"{scores[name][-1]:+.2f}")
            for name in ratios:
                ratios[name].append((truth.estimates["snis"].token.se / truth.estimates[name].token.se) ** 2)
            print(
                f"| {seed} | {fresh.value:+.5f} +/- {fresh.se:.5f} | {best.value:+.5f} +/- {best.se:.5f} "
                f"| {' | '.join(cells)} |",
                flush=True,
            )
    for name in names:
        inside = sum(abs(z) < 1.96 for z in scores[name])
        print(
            f"\n{name}: |z| < 1.96 in {inside} of {options.seeds}; mean z {statistics.mean(scores[name]):+.2f}, "
            f"standard deviation {statistics.stdev(scores[name]):.2f}"
        )
    for name, found in ratios.items():
        print(f"\nvariance of snis over that of {name}: {statistics.mean(found):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
