"""The drop-in probe for transformers' Trainer and TRL's trainers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from probe.errors.exceptions import ConfigError
from probe.live import Watch, WatchSettings
from probe.live.alarm import OnAlarm, check_on_alarm
from probe.live.hosts.host import HostedWatch
from probe.live.hosts.transformers import attached, note_logged_entropy, refuse_sharded, trainer_log
from probe.live.outlets import Outlet


class EntropyProbeTrainerCallback(TrainerCallback):
    """Says what the updates of a transformers or TRL trainer do to the policy's entropy.

    Numbers go to wherever the trainer reports (TensorBoard, Weights & Biases, `log_history`), as `entropy_probe/...`;
    pictures and alarms in words too, where it can show them. Its other metrics are neither flushed nor delayed.

        trainer = GRPOTrainer(...)
        trainer.add_callback(EntropyProbeTrainerCallback(trainer, every=10))
        trainer.train()
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
            on_alarm: called with an `Alarm` when a collapse or explosion is forecast; `"stop"` ends training.
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
        strict = WatchSettings.of(settings).strict
        check_on_alarm(on_alarm)
        self.trainer = trainer
        self._host = HostedWatch(on_alarm is not None)
        self._prompts, self._on_alarm, self._settings = prompts, on_alarm, settings
        self._log = Outlet(trainer_log(trainer), "the trainer's log", strict)

    @property
    def watch(self) -> Watch | None:
        """The running probe, with its `history`; None before training begins."""
        return self._host.watch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the optimizer, which exists now."""
        refuse_sharded(self.trainer)
        self._host.clear()
        self._host.watch = attached(
            self.trainer, args, state, self._prompts, self._settings, self._host.log, self._on_alarm
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what the step brought, now that the trainer has counted it."""
        asked = control.should_log
        ends = self._host.end_step(self._log, state.global_step, control.should_training_stop)
        control.should_training_stop = ends
        control.should_log = asked  # logging takes it back, and the trainer's own log is still to come

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The entropy that TRL logs of its own batches is one more reading for the forecast, and may raise an alarm."""
        note_logged_entropy(self.watch, state, kwargs.get("logs"))
        self._host.hand_on(self._log, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show what the training comes to, and remove the hooks; the history stays."""
        self._host.conclude(self._log, state.global_step)
        self._host.detach()
