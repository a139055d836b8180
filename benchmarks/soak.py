"""A training of TRL's GRPOTrainer on several processes, with the drop-in probe and without: is it the same training?

Both runs are started by torchrun, with DistributedDataParallel over gloo; every rank writes its losses, rewards and
entropies as logged, and a fingerprint of its weights and of its optimizer's state in the end. They must be equal to
the last bit. What the probe found must be the same on all ranks.

    python benchmarks/soak.py [--processes 2] [--steps 200] [--every 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.collapse import COLLAPSING, attach_probe, make_trainer

CLOCKS = ("runtime", "per_second", "step_time", "seconds", "cost", "every")
"""Parts of the names of numbers that tell the time."""
COMPARED = {
    "losses and everything else in the log": "log",
    "weights": "weights",
    "state of the optimizer": "optimizer",
}
"""What both runs must have alike, and the entry that a rank writes it under."""


def worker(args: argparse.Namespace) -> None:
    """One rank of one run."""
    import torch

    from probe.distributed.same import fingerprint

    torch.set_num_threads(1)
    trainer = make_trainer(
        args.folder, COLLAPSING / 4, args.steps, per_device_train_batch_size=16, ddp_backend="gloo"
    )
    callback = None
    if args.variant == "probed":
        callback = attach_probe(trainer, args.every, 64, 0, 0.2)
    trainer.train()
    optimizer = trainer.optimizer.state_dict()["state"]
    found = {
        "log": _without_clocks(trainer.state.log_history),
        "weights": fingerprint(trainer.model.state_dict().values()),
        "optimizer": fingerprint(x for s in optimizer.values() for x in s.values() if torch.is_tensor(x)),
        "history": [] if callback is None else _without_clocks(callback.watch.history),
        "seconds": [] if callback is None else [entry["seconds"] for entry in callback.watch.history],
    }
    path = Path(args.folder) / f"{args.variant}-{os.environ['RANK']}.json"
    path.write_text(json.dumps(found, default=str))


def _without_clocks(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of a log without what tells the time, and without the probe's own numbers; those that are left."""
    kept = [
        {k: v for k, v in entry.items() if not any(word in k for word in CLOCKS) and "entropy_probe" not in k}
        for entry in entries
    ]
    return [entry for entry in kept if set(entry) - {"epoch", "step"}]


def run(args: argparse.Namespace, folder: str, variant: str) -> list[dict[str, Any]]:
    """What every rank of a run has written."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(args.processes),
        __file__,
    ]
    command += [
        "--variant",
        variant,
        "--folder",
        folder,
        "--steps",
        str(args.steps),
        "--every",
        str(args.every),
    ]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [json.loads((Path(folder) / f"{variant}-{k}.json").read_text()) for k in range(args.processes)]


def main() -> int:
    """Run both, compare, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("processes", 2), ("steps", 200), ("every", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        worker(args)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        plain, probed = (run(args, folder, variant) for variant in ("plain", "probed"))
    losses = [entry["loss"] for entry in plain[0]["log"] if "loss" in entry]
    equal = {
        what: [one[key] for one in plain] == [one[key] for one in probed] for what, key in COMPARED.items()
    } | {
        "what the probe found, on all ranks": all(one["history"] == probed[0]["history"] for one in probed),
    }
    probes = len(probed[0]["history"])
    print(f"{args.processes} processes, {len(losses)} steps, {probes} probes of 64 responses, ", end="")
    print(f"{statistics.median(probed[0]['seconds']):.2g} s each\n")
    print("| | the same to the last bit |\n|---|---|")
    for what, same in equal.items():
        print(f"| {what} | {'yes' if same else 'NO'} |")
    return 0 if all(equal.values()) and probes and len(losses) == args.steps else 1


if __name__ == "__main__":
    sys.exit(main())
