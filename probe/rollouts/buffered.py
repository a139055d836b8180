"""Rollouts as TRL's trainers hold them in memory, as rows of a rollout file."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from probe.rollouts.generation import end_ids

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


def buffered_rows(trainer: Any, step: int) -> list[dict[str, Any]]:
    """The rows of the microbatches that an update has accumulated, by the columns of `SCHEMA`.

    Args:
        trainer: TRL's GRPOTrainer, or one that buffers its rollouts as it does.
        step: the number of the update.

    Raises:
        ValueError: some of them are gone, because responses were sampled anew in between.
    """
    held = trainer._buffered_inputs
    # `_step` counts microbatches, and is past the last one of this update
    last, count = (trainer._step - 1) % len(held), trainer.current_gradient_accumulation_steps
    if count > last + 1:
        raise ValueError(
            f"expected an update of rollouts that were sampled together, found {count} microbatches accumulated "
            f"over generations of {len(held)}; make steps_per_generation a multiple of "
            "gradient_accumulation_steps"
        )
    used = held[last + 1 - count : last + 1]
    processor = trainer.processing_class
    tokenizer = getattr(processor, "tokenizer", processor)
    ends = set(end_ids(trainer.model, tokenizer))
    cap = getattr(trainer, "max_completion_length", None)
    items = used[0].get("num_items_in_batch")  # tokens of the whole generation
    tokens = None if items is None else max(float(items), 1.0) * count / len(held)
    rows: list[dict[str, Any]] = []
    groups: dict[tuple[int, ...], int] = {}
    for batch in used:
        for i in range(len(batch["completion_ids"])):
            row = _row(batch, i, ends, cap)
            prompt = tuple(row["prompt_ids"])
            row["group"] = groups.setdefault(prompt, len(groups))
            row["step"] = step
            if tokens is not None:
                row["loss_tokens"] = tokens
            row["prompt"] = tokenizer.decode(row["prompt_ids"])
            row["completion"] = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
            rows.append({name: row[name] for name in SCHEMA.names if name in row})
    return rows


def _row(batch: dict[str, Any], i: int, ends: set[int], cap: int | None) -> dict[str, Any]:
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
    ):
        values: Tensor | None = batch.get(key)
        if values is not None:
            found = values[i][mask].double().tolist()
            row[name] = [None if math.isnan(x) else x for x in found]  # a token that the engine gave none for
    return row
