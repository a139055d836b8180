"""What earlier batches of a policy taught the control variates, in a safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.errors.exceptions import DataError
from probe.estimators.control_variates import FitStatistics
from probe.files.atomic import atomic_write_bytes
from probe.scoring.features import FeatureBasis

FORMAT = "entropy-probe/control-variates/1"
LARGEST_MEMORY = 64
"""Batches kept; the oldest go first."""


@dataclass(frozen=True)
class FitMemory:
    """A feature basis, and the fit statistics of batches made with it.

    Attributes:
        basis: the features; all batches must share it.
        batches: statistics by the draw and the fingerprint of the batch, `draw|fingerprint`: a batch never learns from
            its own draw, whatever its size.
        policy: what was probed, for the check that a file belongs to it.
    """

    basis: FeatureBasis
    policy: str
    batches: Mapping[str, FitStatistics] = field(default_factory=dict)

    def earlier_than(self, batch: RolloutBatch, draw: str = "") -> list[FitStatistics]:
        """Statistics of the batches of other draws.

        Args:
            batch: the batch that is to learn.
            draw: where it comes from: the seed it was sampled with, or its file. Batches of one seed share sequences
                (or the random numbers behind them), whatever their sizes and settings.
        """
        return [found for name, found in self.batches.items() if not _same_draw(name, _name(batch, draw))]

    def with_batch(self, batch: RolloutBatch, statistics: FitStatistics, draw: str = "") -> FitMemory:
        """The memory with one more batch; of one draw the largest is kept."""
        name = _name(batch, draw)
        same = [other for other in self.batches if _same_draw(other, name)]
        if any(self.batches[other].tokens > statistics.tokens for other in same):
            return self
        others = {other: found for other, found in self.batches.items() if other not in same}
        kept = list({**others, name: statistics}.items())[-LARGEST_MEMORY:]
        return replace(self, batches=dict(kept))


def _name(batch: RolloutBatch, draw: str) -> str:
    """The key of a batch."""
    return f"{draw}|{fingerprint(batch)}"


def _same_draw(one: str, other: str) -> bool:
    """Whether two batches come from one draw, by name or by content."""
    (draw, content), (other_draw, other_content) = one.rsplit("|", 1), other.rsplit("|", 1)
    return content == other_content or (draw != "" and draw == other_draw)


def fingerprint(batch: RolloutBatch) -> str:
    """Identifies a draw by its first two sequences: the larger batches of a seed begin with the smaller ones."""
    first = [
        [*batch.prompt_ids[i], -1, *batch.completion_ids[i][batch.mask[i]].tolist()]
        for i in range(min(2, len(batch)))
    ]
    return hashlib.sha256(json.dumps(first).encode()).hexdigest()[:16]


def read_fit_memory(path: Path, policy: str) -> FitMemory | None:
    """Read the file; None where there is none.

    Raises:
        DataError: it is no such file, or belongs to another policy.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise DataError(f"probe_rework.control_variates_path: cannot read {path}: {error}") from error
    if header.get("format") != FORMAT:
        raise DataError(
            f"probe_rework.control_variates_path: expected a file of the format {FORMAT}, found "
            f"{header.get('format')!r} in {path}; give a file of its own"
        )
    if header.get("policy") != policy:
        raise DataError(
            f"probe_rework.control_variates_path: expected a file of the policy {policy}, found one of "
            f"{header.get('policy')} in {path}; use one file per checkpoint"
        )
    names = json.loads(header["batches"])
    batches = {
        name: FitStatistics(tensors[f"gram.{k}"], tensors[f"cross.{k}"], float(tensors[f"tokens.{k}"]))
        for k, name in enumerate(names)
    }
    return FitMemory(FeatureBasis(tensors["basis.tokens"], tensors["basis.directions"]), policy, batches)


def write_fit_memory(path: Path, memory: FitMemory) -> None:
    """Write the file, whole or not at all."""
    tensors: dict[str, Tensor] = {
        "basis.tokens": memory.basis.tokens.contiguous(),
        "basis.directions": memory.basis.directions.contiguous(),
    }
    for k, found in enumerate(memory.batches.values()):
        tensors |= {
            f"gram.{k}": found.gram.contiguous(),
            f"cross.{k}": found.cross.contiguous(),
            f"tokens.{k}": torch.tensor(found.tokens, dtype=torch.float64),
        }
    header = {"format": FORMAT, "policy": memory.policy, "batches": json.dumps(list(memory.batches))}
    atomic_write_bytes(path, save(tensors, header))
