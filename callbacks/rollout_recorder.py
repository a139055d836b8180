"""Records the rollouts of a TRL training with their token ids, for a probe of its checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from probe.distributed.ranks import rank_and_size
from probe.errors.exceptions import ConfigError
from probe.files.atomic import ensure_writable
from probe.live.say import say
from probe.rollouts.generation import end_ids
from probe.rollouts.tables import write_table
from probe.snapshot import isolated_rng
from probe.text import error_text

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


class RolloutRecorderCallback(TrainerCallback):
    """Writes the rollouts that each update of a GRPO training uses, as they were sampled.

    Texts alone do not give the tokens back: they may be cut in another way, and whether EOS was sampled is lost. One
    file per update, `rollouts_00061.parquet` for update 61, which is the next one after checkpoint-60:

        trainer.add_callback(RolloutRecorderCallback(trainer, "output/rollouts", every=20))

    Rows are in the order of the update. `group` numbers the prompts, `advantage` is the one that the trainer worked
    out. `old_logprobs` are there where the trainer keeps them, `sampling_logprobs` where another engine sampled,
    `loss_tokens` is what a loss that is a mean over tokens was divided by.
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        folder: str | Path = "rollouts",
        *,
        every: int = 1,
        file_format: Literal["parquet", "jsonl"] = "parquet",
    ) -> None:
        """Nothing is written before training begins.

        Args:
            trainer: TRL's GRPOTrainer, or one that buffers its rollouts as it does.
            folder: where the files go; made if it is not there.
            every: record update 1 and each `every`-th after it. The update after a checkpoint is one more than the
                checkpoint's number: with `save_steps=20`, `every=20` records just these.
            file_format: `parquet` or `jsonl`.

        Raises:
            ConfigError: the trainer has no rollouts, or a setting cannot be used.
            LogError: the folder cannot be written to.
        """
        if not isinstance(trainer, Trainer) or not hasattr(trainer, "_buffered_inputs"):
            raise ConfigError(
                f"trainer: expected TRL's GRPOTrainer, found {type(trainer).__name__}; make the trainer first, then "
                "trainer.add_callback(RolloutRecorderCallback(trainer, ...))"
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"every: expected an integer of at least 1, found {every!r}")
        if file_format not in ("parquet", "jsonl"):
            raise ConfigError(f"file_format: expected 'parquet' or 'jsonl', found {file_format!r}")
        self.trainer = trainer
        self.folder = ensure_writable(folder)
        self.files: list[Path] = []
        self._every, self._format = every, file_format
        self._failed = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what the update that comes now was made from; what fails there does not end the training."""
        step = state.global_step + 1
        if self._failed or (step - 1) % self._every != 0:
            return
        try:
            with isolated_rng():
                rows = self._rows(step)
            rank, size = rank_and_size()
            name = f"rollouts_{step:05d}" + (f"_rank{rank}" if size > 1 else "")
            there = [field for field in SCHEMA if any(field.name in row for row in rows)]
            self.files.append(write_table(self.folder / f"{name}.{self._format}", rows, pa.schema(there)))
        except Exception as error:
            self._failed = True
            say(f"rollouts are not recorded any more, from step {step} on ({error_text(error)})", warn=True)

    def _rows(self, step: int) -> list[dict[str, Any]]:
        """The rows of the microbatches that this update has accumulated.

        Raises:
            ValueError: some of them are gone, because responses were sampled anew in between.
        """
        trainer: Any = self.trainer
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
