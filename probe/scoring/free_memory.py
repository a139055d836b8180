"""How many positions a gradient has memory for on a CPU, where asking for too much ends the process.

A GPU refuses what it has no memory for, and what was refused is run again in halves. A machine's main memory is
promised to whoever asks, and the process that uses what is not there is killed.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.scoring.head import OutputHead
from probe.scoring.policy import Policy

logger = logging.getLogger(__name__)

SHARE = 0.5
"""Share of the free memory that what a gradient keeps of its forward may take; the backward needs some beside it."""
CGROUPS = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Files of a container's limit and use, and what of the use is given back when it is needed, by version."""


def free_memory() -> int:
    """Bytes that this process may still use: of the machine, or up to its container's limit."""
    free = int(psutil.virtual_memory().available)
    for limit, use, stat, cached in _LIMITS:
        try:
            most, used = (CGROUPS / limit).read_text().strip(), int((CGROUPS / use).read_text())
            lines = dict(line.split() for line in (CGROUPS / stat).read_text().splitlines())
        except OSError:
            continue
        if most != "max":
            free = min(free, max(int(most) - used + int(lines.get(cached, 0)), 0))
    return free


def kept_per_position(policy: Policy, batch: RolloutBatch) -> float:
    """Bytes that a gradient keeps of the network's forward, for each position of a microbatch.

    Args:
        policy: any.
        batch: a few responses, of which the first microbatch goes through the model.
    """
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    weights |= {b.untyped_storage().data_ptr() for b in policy.model.buffers()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = next(replace(policy, share_prompts=False).microbatches(batch))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        hidden = policy.hidden_states(OutputHead(policy.model), inputs)
    found = sum(kept.values()) / inputs.padded
    del hidden  # until here, so that no two storages had one place
    return found


def bound_by_free_memory(policy: Policy, few: RolloutBatch, processes: int = 1) -> None:
    """Let no gradient take more positions at a time than there is memory for (`policy.traffic.room`).

    Args:
        policy: on a CPU.
        few: responses of its batch.
        processes: that compute gradients at the same time.
    """
    free = free_memory() // processes
    most = max(int(SHARE * free / max(kept_per_position(policy, few), 1.0)), 1)
    budget = policy.limits("backward")[1]
    if budget is None or most < budget:
        policy.traffic.room["backward"] = most
        logger.info("gradients: at most %d tokens at a time, for %.1f GiB of free memory", most, free / 2**30)
