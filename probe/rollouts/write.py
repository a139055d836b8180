"""Rollout files, written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.errors.exceptions import DataError
from probe.rollouts.tables import write_table

_SCHEMA = {
    "prompt": pa.string(),
    "completion": pa.string(),
    "prompt_ids": pa.list_(pa.int64()),
    "completion_ids": pa.list_(pa.int64()),
    "truncated": pa.bool_(),
    "group": pa.int64(),
    "reward": pa.float64(),
    "advantage": pa.float64(),
    "old_logprobs": pa.list_(pa.float64()),
    "sampling_logprobs": pa.list_(pa.float64()),
    "loss_tokens": pa.float64(),
    "row": pa.string(),
    "bias_flags": pa.list_(pa.string()),
    "doubts": pa.list_(pa.string()),
}


def write_rollouts(path: str | Path, batch: RolloutBatch) -> Path:
    """Write a batch as `.jsonl` or `.parquet` with its exact token ids.

    `read_rollouts` gives an equal batch back, but for `source` and padding. Rows of the data set are kept as JSON;
    what JSON cannot hold is written as text.

    Args:
        path: the file; its ending says which format.
        batch: what is written.

    Returns:
        The path.

    Raises:
        DataError: the ending is another, or a number of the batch is not finite.
        LogError: the file cannot be written.
    """
    columns: dict[str, list[Any]] = {
        "prompt": list(batch.prompts),
        "completion": list(batch.completions),
        "prompt_ids": [list(ids) for ids in batch.prompt_ids],
        "completion_ids": _ragged(batch.completion_ids, batch.mask),
        "truncated": batch.truncated.tolist(),
        "group": batch.group.tolist(),
        "bias_flags": [list(batch.bias_flags)] * len(batch),
    }
    for name, values in (("reward", batch.rewards), ("advantage", batch.advantages)):
        if values is not None:
            columns[name] = _require_finite(values.to(torch.float64), name).tolist()
    if batch.old_logprobs is not None:
        _require_finite(batch.old_logprobs[batch.mask], "old_logprobs")
        columns["old_logprobs"] = _ragged(batch.old_logprobs.to(torch.float64), batch.mask)
    if batch.sampling_logprobs is not None:
        given = _ragged(batch.sampling_logprobs.to(torch.float64), batch.mask)
        columns["sampling_logprobs"] = [[None if math.isnan(x) else x for x in row] for row in given]
    if batch.loss_tokens is not None:
        columns["loss_tokens"] = [batch.loss_tokens] * len(batch)
    if batch.doubts:
        columns["doubts"] = [list(own) for own in batch.doubts]
    if batch.rows:
        columns["row"] = [json.dumps(dict(row), default=str) for row in batch.rows]
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(batch))]
    return write_table(path, rows, pa.schema([(name, _SCHEMA[name]) for name in columns]))


def _ragged(values: Tensor, mask: Tensor) -> list[list[Any]]:
    """The rows of a padded tensor, without padding."""
    return [row[own].tolist() for row, own in zip(values, mask, strict=True)]


def _require_finite(values: Tensor, name: str) -> Tensor:
    """The values, if all are finite."""
    if not bool(values.isfinite().all()):
        raise DataError(
            f"{name}: expected finite numbers to write, found {values[~values.isfinite()][0].item()}"
        )
    return values
