"""What several processes gain: a whole probe without its sampling on 1 and on N processes of one thread each.

Strong scaling has the same E and U on both sides, weak scaling N times as many responses on N processes. Both sides
take turns in one job: the first process runs alone while the others wait, then all run together. An efficiency is the
median over rounds of `seconds alone / (N * seconds together)` (strong), `seconds alone / seconds together` (weak). The
machine's own is `seconds alone / seconds of N processes that each work alone at the same time`: what cores that share
caches and memory leave of it.
The bytes are those that one rank hands to collectives in a phase (`probe.distributed.ranks.Ranks.sent`).

    python benchmarks/scaling.py [--policy demo|medium] [--processes 2] [--B_E 1024] [--B_U 32] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.whole_probe import large_checkpoint, phases
from probe.config.files import read_config_file
from probe.distributed.ranks import ALONE, Ranks
from probe.module import EntropyProbe
from probe.snapshot import evaluation_mode
from tests.support.loaded import loaded_probe

Times = dict[str, float]


MEDIUM = {"hidden_size": 512, "num_hidden_layers": 4, "vocab_size": 8192, "intermediate_size": 2048}
"""A policy whose passes take long beside what is done on every rank alike."""


def sections(B_E: int, B_U: int, checkpoint: Path | None) -> dict[str, Any]:
    """The quickstart configuration with batches of these sizes."""
    config = dict(read_config_file("quickstart"))
    config["batch_config"] = {**config["batch_config"], "B_E": B_E, "B_U": B_U}
    config["memory_config"] = {"microbatch_size": 16, "threads": 1}
    if checkpoint is not None:
        config["checkpoint"] = {"checkpoint_path": str(checkpoint)}
        config["batch_config"] |= {"reward": "whole_probe:even_length"}
        config["generation"] = {**config["generation"], "max_new_tokens": 16}
    return config


def timed(module: EntropyProbe, sample: Any, ranks: Ranks) -> tuple[Times, Times]:
    """Seconds and bytes of each phase after sampling."""
    module.ranks = ranks
    seconds, sent = {}, {}
    for name, compute in phases(module, sample):
        before, start = ranks.sent, time.perf_counter()
        compute()
        seconds[name], sent[name] = time.perf_counter() - start, float(ranks.sent - before)
    seconds["whole"] = sum(seconds.values())
    sent["whole"] = sum(sent.values())
    return seconds, sent


def connected(rank: int, processes: int, port: int) -> Ranks:
    """The processes of the job, of one thread each."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(processes),
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    sys.path.insert(0, str(Path(__file__).parent))  # of the reward
    return Ranks.of_job()


def worker(rank: int, args: argparse.Namespace, port: int, checkpoint: Path | None) -> None:
    """One of the processes; the first one prints the table."""
    ranks = connected(rank, args.processes, port)
    one = loaded_probe(sections(args.B_E, args.B_U, checkpoint))
    larger = loaded_probe(sections(args.B_E * args.processes, args.B_U * args.processes, checkpoint))
    with evaluation_mode(one), evaluation_mode(larger):
        one.ranks = larger.ranks = ranks
        samples = one.sample(), larger.sample()
        strong: dict[str, list[float]] = {}
        weak: dict[str, list[float]] = {}
        machine: dict[str, list[float]] = {}
        sent: Times = {}
        for round_number in range(args.rounds + 1):
            alone: Times = timed(one, samples[0], ALONE)[0] if rank == 0 else {}
            ranks.gathered("turn", 0)
            crowded, _ = timed(one, samples[0], ALONE)
            ranks.gathered("turn", 0)
            together, sent = timed(one, samples[0], ranks)
            many, _ = timed(larger, samples[1], ranks)
            if rank == 0 and (round_number or not args.rounds):  # the first round only warms up
                for name, seconds in alone.items():
                    machine.setdefault(name, []).append(seconds / crowded[name])
                    strong.setdefault(name, []).append(seconds / (args.processes * together[name]))
                    weak.setdefault(name, []).append(seconds / many[name])
    if rank == 0:
        print(
            f"{args.policy}: {args.processes} processes of one thread, E of {args.B_E} and U of {args.B_U} prompts.\n"
        )
        columns = (strong, weak, machine)
        print(
            "| phase | strong scaling | weak scaling | the machine's | kB sent by each rank |\n|---|---|---|---|---|"
        )
        for name in strong:
            cells = " | ".join(f"{statistics.median(column[name]):.2f}" for column in columns)
            print(f"| {name} | {cells} | {sent[name] / 1e3:,.0f} |")
    torch.distributed.destroy_process_group()


def measure(worker: Callable[..., None], description: str | None, **defaults: Any) -> int:
    """Read the options, make the policy, and run `worker` in so many processes.

    Args:
        worker: called with its rank, the options, a free port and the checkpoint (None for the demo policy).
        description: of the benchmark.
        defaults: of the options.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", choices=("demo", "medium"), default=defaults.pop("policy"))
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = None if args.policy == "demo" else large_checkpoint(Path(scratch), MEDIUM, heads=8)
        multiprocessing.spawn(worker, (args, port, checkpoint), nprocs=args.processes)
    return 0


if __name__ == "__main__":
    sys.exit(measure(worker, __doc__, policy="demo", processes=2, B_E=1024, B_U=32, rounds=5))
