"""What the drop-in probe costs: the same TRL training with and without it, and the cost model's own account.

Trainings of the demo policy (`benchmarks/collapse.py`, healthy rate) with and without the probe take turns in one
process, so that both see the same machine. The probe's defaults apply: `budget` 0.05, `B_E` 64. Peak memory is that of
two processes of their own.

    python benchmarks/overhead.py --steps 150 --rounds 3
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import torch

sys.path.insert(0, str(Path(__file__).parent))
from collapse import HEALTHY, make_trainer


def training(folder: Path, steps: int, probed: bool, settings: dict[str, int]) -> tuple[float, object]:
    """Seconds that a training took, and its callback."""
    from probe.callbacks.training_transformers import EntropyProbeTrainerCallback

    trainer = make_trainer(folder, HEALTHY, steps, seed=0)
    callback = EntropyProbeTrainerCallback(trainer, strict=True, **settings)
    if probed:
        trainer.add_callback(callback)
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start, callback


def peak_memory(probed: bool, microbatch_size: int) -> float:
    """Largest resident memory, in MB, of a process that trains for 12 steps, probing every third or none."""
    mode = "probed" if probed else "plain"
    command = [sys.executable, __file__, "--only", mode, "--microbatch_size", str(microbatch_size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> int:
    """Run the trainings and print both accounts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--microbatch_size", type=int, default=8)
    parser.add_argument("--only", choices=("plain", "probed"), help="a short training, and its peak memory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("probe.live").setLevel(logging.WARNING)
    settings = {"microbatch_size": options.microbatch_size}
    if options.only is not None:
        with tempfile.TemporaryDirectory() as scratch:
            training(Path(scratch), 12, options.only == "probed", {**settings, "every": 3})
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return 0
    plain, probed, shares = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        training(Path(scratch) / "warm", 3, True, settings)
        for k in range(options.rounds):
            order = (False, True) if k % 2 == 0 else (True, False)
            for with_probe in order:
                seconds, callback = training(
                    Path(scratch) / f"{k}{with_probe}", options.steps, with_probe, settings
                )
                (probed if with_probe else plain).append(seconds)
                if with_probe:
                    shares.append(callback.watch.schedule.share)
                    last = callback.watch.last
    print(
        f"{options.rounds} trainings of {options.steps} steps each way, {last['every']} steps between probes\n"
    )
    print("| | seconds, median | |")
    print("|---|---|---|")
    print(f"| without the probe | {median(plain):.1f} | {min(plain):.1f} to {max(plain):.1f} |")
    print(f"| with the probe | {median(probed):.1f} | {min(probed):.1f} to {max(probed):.1f} |")
    ratio = [b / a - 1 for a, b in zip(plain, probed, strict=True)]
    print(f"\nmore time with it, by rounds: {', '.join(f'{100 * r:.1f} %' for r in ratio)}")
    print(f"share in probes by the schedule's own account: {100 * mean(shares):.1f} % (budget 5 %)")
    memory = [peak_memory(probed, options.microbatch_size) for probed in (False, True)]
    print(f"peak memory of a process: {memory[0]:.0f} MB without the probe, {memory[1]:.0f} MB with it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
