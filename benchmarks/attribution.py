"""What an attribution costs beside the run it is part of: `run`, `attribute` and `whatif` of the demo policy in turns.

The named alternative is `entropy-probe run` with the same E and U, on one thread of the same process; medians over
rounds of the ratio of whole runs, and the passes that these make.

    python benchmarks/attribution.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from statistics import median
from typing import Any

import torch

from probe import OfflineEntropyProbe
from probe.config.files import read_config_file

KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "run": {},
    "contributions alone": {"attribution": {"states": 0, "responses": 0, "league": False}},
    "with the league table": {"attribution": {"states": 0, "responses": 0}},
    "attribute": {"attribution": {}},
    "whatif": {"attribution": {"states": 0, "responses": 0, "league": False}, "whatif": {}},
}


def sections(kind: str) -> dict[str, Any]:
    """The quickstart configuration, without loggers."""
    config = read_config_file("quickstart")
    config |= {"detailed_logging": {"enabled": False}, "trainer": {"accelerator": "cpu", "logger": False}}
    for name, keys in KINDS[kind].items():
        config[name] = {"enabled": True, **keys}
    return config


def main() -> int:
    """Run in turns and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = defaultdict(list)
    passes = {}
    for _ in range(options.rounds):
        for kind in KINDS:
            probe = OfflineEntropyProbe(sections(kind))
            start = time.perf_counter()
            found = probe.run_mixed_probe()
            seconds[kind].append(time.perf_counter() - start)
            passes[kind] = found["diagnostics"]["passes_E"], found["diagnostics"]["passes_U"]
    print("\n| | seconds, median | times the run | passes over E | over U |\n|---|---|---|---|---|")
    for kind, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["run"], strict=True)]
        E, U = passes[kind]
        print(f"| {kind} | {median(own):.1f} | {median(ratios):.1f} | {E:.1f} | {U:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
