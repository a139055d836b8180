"""This process among those of a distributed training."""

from __future__ import annotations

import torch


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes; 0 and 1 where training is not distributed."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)
