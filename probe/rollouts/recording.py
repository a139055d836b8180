"""The rollouts of one update of a TRL training as rows of a rollout file, with their token ids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from probe.distributed.ranks import rank_and_size
from probe.rollouts.generation import end_ids
from probe.rollouts.tables import write_table
from probe.snapshot import isolated_rng

_IDS, _NUMBERS = pa.list_(pa.int64()), pa.list_(pa.float64())
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("group", pa.int64()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("prompt_ids", _IDS),
        ("completion_ids", _IDS),
        ("truncated", pa.bool_()),
        ("advantage", pa.float64()),
        ("old_logprobs", _NUMBERS),
        ("sampling_logprobs", _NUMBERS),
        ("loss_tokens", pa.float64()),
    ]
)
"""Columns of a file; see `probe.rollouts.read`."""


def record_update(trainer: Any, step: int, folder: Path, file_format: str) -> Path:
    """Write the rollouts that an update is made from.

    Args:
        trainer: TRL's GRPOTrainer, about to take the optimizer's step.
        step: of the update, from 1.
        folder: where the file goes, `rollouts_00061.parquet` for update 61; one per rank where there are several.
        file_format: `parquet` or `jsonl`.

    Returns:
        The file.

    Raises:
        ValueError: the rollouts cannot be told, or have tokens that were not sampled.
        OSError: the file cannot be written.
    """
    with isolated_rng():
        rows = update_rows(trainer, step)
    rank, size = rank_and_size()
    name = f"rollouts_{step:05d}" + (f"_rank{rank}" if size > 1 else "")
    there = [field for field in SCHEMA if any(field.name in row for row in rows)]
    return write_table(folder / f"{name}.{file_format}", rows, pa.schema(there))


def update_rows(trainer: Any, step: int, also: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """One row for each response in the microbatches that this update has accumulated.

    Args:
        trainer: TRL's GRPOTrainer, about to take the optimizer's step.
        step: of the update, from 1.
        also: columns beside those of a file (`ref_logprobs`).

    Raises:
        ValueError: some of them are gone, because responses were sampled anew in between; or see `_row`.
    """
    held, count = trainer._buffered_inputs, trainer.current_gradient_accumulation_steps
    used = _accumulated(held, trainer._step, count)
    processor = trainer.processing_class
    tokenizer = getattr(processor, "tokenizer", processor)
    ends = set(end_ids(trainer.model, tokenizer))
    cap = getattr(trainer, "max_completion_length", None)
    items = used[0].get("num_items_in_batch")  # tokens of the whole generation
    tokens = {} if items is None else {"loss_tokens": max(float(items), 1.0) * count / len(held)}
    rows: list[dict[str, Any]] = []
    groups: dict[tuple[int, ...], int] = {}
    for batch in used:
        for i in range(len(batch["completion_ids"])):
            row = _row(batch, i, ends, cap) | tokens
            row["step"] = step
            row["group"] = groups.setdefault(tuple(row["prompt_ids"]), len(groups))
            row["prompt"] = tokenizer.decode(row["prompt_ids"])
            row["completion"] = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
            rows.append({name: row[name] for name in (*SCHEMA.names, *also) if name in row})
    return rows


def _accumulated(held: list[Any], step: int, count: int) -> list[Any]:
    """The microbatches of an update.

    Args:
        held: those that were sampled together.
        step: TRL's count of microbatches, past the last one of this update.
        count: microbatches in an update.

    Raises:
        ValueError: it has more than were sampled together.
    """
    last = (step - 1) % len(held)
    if count > last + 1:
        raise ValueError(
            f"expected an update of rollouts that were sampled together, found {count} microbatches accumulated "
            f"over generations of {len(held)}; make steps_per_generation a multiple of "
            "gradient_accumulation_steps"
        )
    return held[last + 1 - count : last + 1]


def _row(batch: Mapping[str, Any], i: int, ends: set[int], cap: int | None) -> dict[str, Any]:
    """One response, without padding. What ends without EOS below the cap was ended by a stop string.

    Raises:
        ValueError: tokens in it were not sampled (answers of tools), which a rollout file has no place for.
    """
    # The mask of a response that was cut off is all 0 where the trainer leaves it out (mask_truncated_completions).
    mask = batch["completion_mask"][i].bool()
    ids = batch["completion_ids"][i]
    left_out = not bool(mask.any())
    tool_mask = batch.get("tool_mask")
    if tool_mask is not None and not bool(tool_mask[i].bool()[mask].all()):
        raise ValueError("expected responses of sampled tokens alone, found answers of tools in one")
    if left_out:
        mask = torch.ones_like(mask)
    response = ids[mask].tolist()
    row = {
        "prompt_ids": batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist(),
        "completion_ids": response,
        "truncated": left_out or (response[-1] not in ends and (cap is None or len(response) >= cap)),
        "advantage": float(batch["advantages"][i].double().mean()),
    }
    for key, name in (
        ("old_per_token_logps", "old_logprobs"),
        ("sampling_per_token_logps", "sampling_logprobs"),
        ("ref_per_token_logps", "ref_logprobs"),
    ):
        values: Tensor | None = batch.get(key)
        if values is not None:
            numbers = values[i][mask].double().tolist()
            row[name] = [
                None if math.isnan(x) else x for x in numbers
            ]  # a token that the engine gave none for
    return row
