"""Which process this is, as far as the environment says: known before any library is there."""

from __future__ import annotations

import os

_SIZES = ("WORLD_SIZE", "SLURM_NTASKS", "JSM_NAMESPACE_SIZE")
_RANKS = ("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Variables of launchers (torchrun, SLURM, LSF) that start all processes of a job."""


def first_process() -> bool:
    """Whether this process is the first of its job: the one that speaks and writes."""
    if not any(_number(key) > 1 for key in _SIZES):
        return True
    own = next((key for key in _RANKS if os.environ.get(key)), None)
    if own is not None:
        return _number(own) == 0
    return _number("NODE_RANK") == 0 and _number("LOCAL_RANK") == 0


def started_by_first() -> bool:
    """Whether the first process of this machine has started this one, and no launcher, which would look after it."""
    return not any(os.environ.get(key) for key in _RANKS) and _number("LOCAL_RANK") > 0


def _number(key: str) -> int:
    """What a variable says; 0 where it says no number."""
    try:
        return int(os.environ.get(key) or 0)
    except ValueError:
        return 0
