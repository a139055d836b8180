"""How long the command line takes to say something: medians of several runs, as multiples of Python's own start.

Each command is a process of its own. Give the folder of another version to compare it in the same minute.

    python benchmarks/startup.py --runs 9
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import probe": ["-c", "import probe"],
    "entropy-probe --version": ["-m", "probe", "--version"],
    "entropy-probe --help": ["-m", "probe", "--help"],
    "entropy-probe run --help": ["-m", "probe", "run", "--help"],
    "entropy-probe run --print_config": ["-m", "probe", "run", "--print_config"],
    "a misspelt key": ["-m", "probe", "run", "--batch_config.B_EE", "5"],
    "a wrong type": ["-m", "probe", "run", "--batch_config.B_E", "x"],
    "an impossible value": ["-m", "probe", "run", "--batch_config.B_E", "1"],
    "a misspelt logger": ["-m", "probe", "run", "--trainer.logger", "lightning.pytorch.loggers.CSVLoggr"],
}


def seconds(command: list[str], root: Path) -> float:
    """Wall time of one process that imports the package from `root`."""
    start = time.perf_counter()
    env = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, *command], cwd=root, env=env, capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> int:
    """Time the commands in turns and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="folder of the package")
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.runs + 1):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command, options.root))
    found = {name: median(values[1:]) for name, values in times.items()}  # the first round fills caches
    base = found["python -c pass"]
    print("| | seconds | times `python -c pass` |\n|---|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.2f} | {value / base:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
