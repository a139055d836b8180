"""Which process this is, as far as the environment says: known before any library is there."""

from __future__ import annotations

import os

_KEYS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Variables that launchers set, the most telling first (torchrun, Lightning's own, SLURM, LSF)."""


def first_process() -> bool:
    """Whether this process is the first of its job: the one that speaks and writes."""
    if int(os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or 0) > 0:
        return False
    found = [os.environ[key] for key in _KEYS if os.environ.get(key)]
    return not found or found[0] == "0"


def launched_by_others() -> bool:
    """Whether a launcher (torchrun, SLURM, LSF) has started all processes of the job, and looks after them."""
    return any(os.environ.get(key) for key in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))
