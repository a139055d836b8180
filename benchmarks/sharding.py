"""What holding parts of the weights costs (`strategy: fsdp`), beside whole weights on every process (`ddp`).

Two processes of one thread each run the phases after sampling both ways in turns, by central differences on both sides,
with the same E and U. A ratio is the median over rounds of `seconds sharded / seconds whole`. Held are the weights and
moments of one process between forwards; what a forward brings together comes on top, one block of layers at a time.

    python benchmarks/sharding.py [--policy demo|medium] [--processes 2] [--B_E 256] [--B_U 8] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.scaling import connected, measure, sections, timed
from probe.distributed.sharding import by_blocks
from probe.module import EntropyProbe
from probe.shards import part
from probe.snapshot import evaluation_mode
from tests.support.loaded import loaded_probe


def held(module: EntropyProbe) -> float:
    """Megabytes of weights and moments on this process."""
    optimizer = module.loaded_optimizer.optimizer
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    tensors = [part(x) for x in (*module.policy.model.parameters(), *moments)]
    return sum(x.numel() * x.element_size() for x in tensors) / 1e6


def worker(rank: int, args: argparse.Namespace, port: int, checkpoint: Path | None) -> None:
    """One of the processes; the first one prints the table."""
    ranks = connected(rank, args.processes, port)
    config = sections(args.B_E, args.B_U, checkpoint)
    config["probe_rework"] = {**config.get("probe_rework", {}), "derivative_mode": "finite_difference"}
    mesh = torch.distributed.init_device_mesh("cpu", (args.processes,), mesh_dim_names=("data_parallel",))
    whole, sharded = loaded_probe(config), loaded_probe(config, lambda model: by_blocks(model, mesh))
    ratios: dict[str, list[float]] = {}
    with evaluation_mode(whole), evaluation_mode(sharded):
        whole.ranks = sharded.ranks = ranks
        samples = whole.sample(), sharded.sample()
        for round_number in range(args.rounds + 1):
            of_whole, _ = timed(whole, samples[0], ranks)
            of_parts, _ = timed(sharded, samples[1], ranks)
            if round_number or not args.rounds:  # the first round only warms up
                for name, seconds in of_whole.items():
                    ratios.setdefault(name, []).append(of_parts[name] / seconds)
    if rank == 0:
        print(f"{args.policy}: {args.processes} processes, E of {args.B_E} and U of {args.B_U} prompts.")
        print(f"Held: {held(sharded):.1f} of {held(whole):.1f} MB.\n")
        print("| phase | sharded / whole |\n|---|---|")
        for name, values in ratios.items():
            print(f"| {name} | {statistics.median(values):.2f} |")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(measure(worker, __doc__, policy="medium", processes=2, B_E=256, B_U=8, rounds=5))
