"""Records the rollouts of a TRL training with their token ids, for a probe of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from probe.distributed.ranks import rank_and_size
from probe.errors.exceptions import ConfigError
from probe.files.atomic import ensure_writable
from probe.live.say import say
from probe.rollouts.buffered import SCHEMA, buffered_rows
from probe.rollouts.tables import write_table
from probe.snapshot import isolated_rng
from probe.text import error_text


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
                rows = buffered_rows(self.trainer, step)
            rank, size = rank_and_size()
            name = f"rollouts_{step:05d}" + (f"_rank{rank}" if size > 1 else "")
            there = [field for field in SCHEMA if any(field.name in row for row in rows)]
            self.files.append(write_table(self.folder / f"{name}.{self._format}", rows, pa.schema(there)))
        except Exception as error:
            self._failed = True
            say(f"rollouts are not recorded any more, from step {step} on ({error_text(error)})", warn=True)
