"""The drop-in probe for Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from probe.live import Watch, WatchSettings
from probe.live.alarm import OnAlarm, check_on_alarm
from probe.live.hosts.host import HostedWatch
from probe.live.hosts.lightning import LoggerOutlets, attached, counted_steps, find_policy, let_monitor


class EntropyProbeCallback(Callback):
    """Says what the updates of a Lightning training do to the policy's entropy.

    Numbers go to the trainer's loggers, as `entropy_probe/...`; EarlyStopping and ModelCheckpoint can monitor the main
    ones, such as `entropy_probe/H_orig_tok`. Automatic and manual optimisation, gradient
    accumulation and several optimizers are fine: an update is what the optimizers that hold the policy's parameters
    do, from the first one's step to the last one's.

        trainer = Trainer(callbacks=[EntropyProbeCallback(prompts, tokenizer, every=10)])
    """

    def __init__(
        self,
        prompts: Iterable[Any],
        tokenizer: Any = None,
        policy: str | None = None,
        *,
        on_alarm: Literal["stop"] | OnAlarm | None = None,
        **settings: Any,
    ) -> None:
        """The settings are checked; everything else is when training begins.

        Args:
            prompts: what E's prompts are drawn from: texts, message lists, or rows with a column `prompt`.
            tokenizer: the policy's; by default the LightningModule's attribute `tokenizer`.
            policy: name of the LightningModule's attribute that is the policy (dots allowed); by default its only
                transformers or peft model.
            on_alarm: called with an `Alarm` when a collapse or explosion is forecast; `"stop"` ends training.
            settings: see `probe.live.WatchSettings`.

        Raises:
            ConfigError: a setting is unknown or cannot be used.
        """
        self._loggers = LoggerOutlets(WatchSettings.of(settings).strict)
        check_on_alarm(on_alarm)
        self._host = HostedWatch(on_alarm is not None)
        self._prompts, self._tokenizer, self._policy, self._on_alarm = prompts, tokenizer, policy, on_alarm
        self._settings = settings  # a line of its own, or jsonargparse loses track of it
        self._state: dict[str, Any] | None = None

    @property
    def watch(self) -> Watch | None:
        """The running probe, with its `history`; None before training begins."""
        return self._host.watch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizers that hold the policy's parameters."""
        self._host.clear()
        settings = WatchSettings(**self._settings)  # this call also tells LightningCLI what `settings` can be
        policy = find_policy(pl_module, self._policy)
        tokenizer = getattr(pl_module, "tokenizer", None) if self._tokenizer is None else self._tokenizer
        self._host.watch = attached(
            trainer, policy, self._prompts, tokenizer, settings, self._host.log, self._on_alarm
        )
        if self._state is not None:
            self._host.watch.load_state_dict(self._state)
            self._state = None
        self._loggers.start(trainer.loggers)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the update brought, at the step under which Lightning logs this batch."""
        self._host.hand_on(self._loggers, counted_steps(trainer))
        let_monitor(trainer, self.watch)
        if self._host.asks_to_stop():
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what the training comes to, and remove the hooks; the history stays."""
        self._host.conclude(self._loggers, counted_steps(trainer))
        self._host.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._host.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training goes on with: curves and forecast, plain numbers and texts."""
        return {} if self.watch is None else {"watch": self.watch.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's state when training starts."""
        self._state = state_dict.get("watch")
