"""The peak memory of a whole probe against the number of responses in E, on the demo policy.

Each run is a process of its own. What is there once the policy is loaded is taken off; sampling is included.

    python benchmarks/memory.py [--sizes 64 256 1024 2048]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from process_memory import peak

sys.path.insert(0, str(Path(__file__).parents[1]))

from probe.config.files import read_config_file
from probe.snapshot import evaluation_mode
from tests.support.loaded import loaded_probe


def run_one(size: int) -> None:
    """Print what a probe takes above the loaded policy, in MB, and the places of tokens in E."""
    torch.set_num_threads(1)
    config = dict(read_config_file("quickstart"))
    config["batch_config"] = {**config["batch_config"], "B_E": size}
    module = loaded_probe(config)
    before = peak()
    with evaluation_mode(module):
        sample = module.sample()
        derivative, update = module.entropy_gradient(sample), module.update(sample)
        module.ground_truth(sample, update, module.prediction(sample, derivative, update))
    print(f"{peak() - before:.0f} {sample.E.mask.numel()}")


def main() -> int:
    """Run every size in a process of its own, and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024, 2048])
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.size is not None:
        run_one(options.size)
        return 0
    print("| responses in E | places of tokens | peak above the loaded policy, MB |\n|---|---|---|")
    for size in options.sizes:
        command = [sys.executable, __file__, "--size", str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        above, places = done.stdout.splitlines()[-1].split()
        print(f"| {size} | {int(places):,} | {above} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
