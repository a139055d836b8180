"""The drop-in probe for transformers' Trainer and TRL's trainers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from probe.errors.exceptions import ConfigError, DataError, RolloutError
from probe.from_checkpoint.options import READ
from probe.live.alarm import OnAlarm, check_on_alarm
from probe.live.hosts.trl import sampling_changes, trainer_prompts
from probe.live.names import PREFIX
from probe.live.outlets import log_or_say, tensorboard_layout
from probe.live.ranks import follow_first_rank
from probe.live.say import say
from probe.live.settings import WatchSettings
from probe.live.watch import Watch, watch
from probe.text import error_text

HOST_PREFIX = "train/"
"""What transformers' reporting callbacks put before names."""


class EntropyProbeTrainerCallback(TrainerCallback):
    """Says what the updates of a transformers or TRL trainer do to the policy's entropy.

    Numbers go through the trainer's own log to wherever it reports (TensorBoard, Weights & Biases, `log_history`), as
    `entropy_probe/...`. The trainer's other metrics are neither flushed nor delayed by it.

        trainer = GRPOTrainer(...)
        trainer.add_callback(EntropyProbeTrainerCallback(trainer, every=10))
        trainer.train()

    Attributes:
        watch: the running probe, with its `history`; None before training begins.
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        prompts: Iterable[Any] | None = None,
        *,
        on_alarm: Literal["stop"] | OnAlarm | None = None,
        **settings: Any,
    ) -> None:
        """Nothing is loaded before training begins.

        Args:
            trainer: the trainer that the callback is added to; its log is where the numbers go.
            prompts: what E's prompts are drawn from: texts, message lists, or rows with a column `prompt`. By default
                those of the trainer's evaluation data, else of its training data.
            on_alarm: called with an `Alarm` when a collapse is forecast; `"stop"` ends training.
            settings: see `probe.live.WatchSettings`. `temperature` and `max_new_tokens` are by default those of a GRPO
                configuration (`temperature`, `max_completion_length`).

        Raises:
            ConfigError: `trainer` is no transformers Trainer, or a setting is unknown or cannot be used.
        """
        if not isinstance(trainer, Trainer):
            raise ConfigError(
                f"trainer: expected a transformers Trainer (or TRL's), found {type(trainer).__name__}; make the "
                "trainer first, then trainer.add_callback(EntropyProbeTrainerCallback(trainer, ...))"
            )
        WatchSettings.of(settings)
        check_on_alarm(on_alarm)
        self.trainer = trainer
        self.watch: Watch | None = None
        self._prompts, self._on_alarm, self._settings = prompts, on_alarm, settings
        self._waiting: list[dict[str, float]] = []
        self._log_failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the optimizer, which exists now."""
        self._refuse_sharded()
        if self.watch is not None:
            self.watch.detach()  # an exception ended an earlier training: there was no `on_train_end`
            self.watch = None
        self._waiting = []
        tokenizer = self._tokenizer()
        prompts = self._default_prompts() if self._prompts is None else self._prompts
        try:
            examples = trainer_prompts(self.trainer, prompts, tokenizer, int(self._settings.get("seed", 0)))
        except DataError as error:
            if self._settings.get("strict", False):
                raise
            say(f"not attached, training goes on without it: {error_text(error)}", warn=True)
            return
        try:
            self.watch = watch(
                self.trainer.accelerator.unwrap_model(self.trainer.model),
                self.trainer.optimizer,
                examples,
                tokenizer,
                log=lambda metrics, step: self._waiting.append(dict(metrics)),
                on_alarm=self._on_alarm,
                first_step=state.global_step,
                **{**self._own_settings(args), **self._settings},
            )
        except RolloutError as error:  # no prompt fits
            if self._settings.get("strict", False):
                raise
            say(f"not attached, training goes on without it: {error_text(error)}", warn=True)
            return
        self.watch.schedulers = [self.trainer.lr_scheduler]
        self.watch.replay(_logged(state))  # what a training that is resumed has logged before
        for callback in self.trainer.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if writer is not None and hasattr(writer, "add_custom_scalars"):
                writer.add_custom_scalars(tensorboard_layout(HOST_PREFIX))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what the step brought, now that the trainer has counted it."""
        waiting, self._waiting = self._waiting, []
        asked = control.should_log
        for metrics in waiting:
            self._log(metrics)
        control.should_log = asked  # logging takes it back, and the trainer's own log is still to come
        if self.watch is not None and self._on_alarm is not None:
            follow_first_rank(self.watch)
        if self.watch is not None and self.watch.should_stop:
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks; the history stays."""
        if self.watch is not None:
            self.watch.detach()

    def _log(self, metrics: dict[str, float]) -> None:
        """Log through the trainer; what fails there does not end the training, unless `strict`."""
        if self._log_failed:
            return
        strict = bool(self._settings.get("strict", False))
        # Not `trainer.log`: TRL's empties the averages of its own metrics there, which would change its logs.
        self._log_failed = not log_or_say(
            lambda: Trainer.log(self.trainer, metrics), "the trainer's log", strict
        )

    def _own_settings(self, args: TrainingArguments) -> dict[str, Any]:
        """Temperature and length of the trainer's own rollouts, where it has any."""
        found = {}
        for name in ("temperature", "max_completion_length"):
            if getattr(args, name, None) is not None:
                found[READ[name].key.removeprefix("generation.")] = getattr(args, name)
        changes = sampling_changes(self.trainer)
        if changes:
            temperature = self._settings.get("temperature", found.get("temperature", 1.0))
            say(
                f"the trainer samples with {', '.join(f'{name} {value}' for name, value in changes.items())}; the "
                f"entropies here are those of the whole distribution at temperature {temperature}",
                warn=True,
            )
        return found

    def _tokenizer(self) -> Any:
        """The trainer's tokenizer, with what TRL gives to its chat template."""
        processor: Any = self.trainer.processing_class
        found = getattr(processor, "tokenizer", processor)
        options = getattr(self.trainer, "chat_template_kwargs", None)
        if options and found is not None:
            found = copy.copy(found)
            found.apply_chat_template = partial(found.apply_chat_template, **options)
        return found

    def _default_prompts(self) -> Any:
        """The prompts of the trainer's own data."""
        evaluation = self.trainer.eval_dataset
        data: Any = self.trainer.train_dataset if evaluation is None else evaluation
        columns = getattr(data, "column_names", None)
        if (
            isinstance(data, Mapping)
            or not columns
            or "prompt" not in columns
            or not hasattr(data, "__len__")
        ):
            raise ConfigError(
                "prompts: expected the trainer's data set to have a length and a column `prompt`, found none; give the "
                "probe its prompts: EntropyProbeTrainerCallback(trainer, prompts=[...])"
            )
        return data

    def _refuse_sharded(self) -> None:
        """Sharded training would fail on the first probed step.

        Raises:
            ConfigError: it is.
        """
        for name in ("is_deepspeed_enabled", "is_fsdp_enabled"):
            if getattr(self.trainer, name, False):
                kind = name.removeprefix("is_").removesuffix("_enabled")
                raise ConfigError(
                    f"trainer: expected whole parameters on every device, found {kind}; sharded training is not "
                    "supported yet, probe its checkpoints with `entropy-probe run`"
                )


def _logged(state: TrainerState) -> list[dict[str, Any]]:
    """The probe's entries in a trainer's log, by the names of the history."""
    entries = []
    for logs in state.log_history:
        own = {
            name.removeprefix(f"{PREFIX}/"): x for name, x in logs.items() if name.startswith(f"{PREFIX}/")
        }
        if "H_orig_tok" in own:
            entries.append({"step": logs["step"], **own})
    return entries
