"""The drop-in probe for Lightning's Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from itertools import product
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from probe.errors.exceptions import ConfigError
from probe.live.alarm import OnAlarm, check_on_alarm
from probe.live.outlets import log_or_say, tensorboard_layout
from probe.live.ranks import follow_first_rank
from probe.live.settings import WatchSettings
from probe.live.watch import Watch


class EntropyProbeCallback(Callback):
    """Says what the updates of a Lightning training do to the policy's entropy.

    Numbers go to the trainer's loggers, as `entropy_probe/...`. Automatic and manual optimisation, gradient
    accumulation and several optimizers are fine: an update is what the optimizers that hold the policy's parameters
    do, from the first one's step to the last one's.

        trainer = Trainer(callbacks=[EntropyProbeCallback(prompts, tokenizer, every=10)])

    Attributes:
        watch: the running probe, with its `history`; None before training begins.
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
            on_alarm: called with an `Alarm` when a collapse is forecast; `"stop"` ends training.
            settings: see `probe.live.WatchSettings`.

        Raises:
            ConfigError: a setting is unknown or cannot be used.
        """
        WatchSettings.of(settings)
        check_on_alarm(on_alarm)
        self.watch: Watch | None = None
        self._prompts, self._tokenizer, self._policy = prompts, tokenizer, policy
        self._on_alarm = on_alarm
        self._settings = settings  # a line of its own, or jsonargparse loses track of it
        self._waiting: list[dict[str, float]] = []
        self._failed_loggers: list[Any] = []
        self._state: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizers that hold the policy's parameters."""
        self._refuse_sharded(trainer)
        model = self._find_policy(pl_module)
        tokenizer = self._tokenizer if self._tokenizer is not None else getattr(pl_module, "tokenizer", None)
        mine = {id(p) for p in model.parameters() if p.requires_grad}
        optimizers = [
            o for o in trainer.optimizers if any(id(p) in mine for g in o.param_groups for p in g["params"])
        ]
        self._detach()  # of an earlier training
        self._waiting = []
        self.watch = Watch(
            model,
            optimizers or list(trainer.optimizers),
            self._prompts,
            tokenizer,
            WatchSettings(**self._settings),  # this call also tells LightningCLI what `settings` can be
            log=lambda metrics, step: self._waiting.append(dict(metrics)),
            on_alarm=self._on_alarm,
            first_step=trainer.fit_loop.epoch_loop._batches_that_stepped,
        )
        self.watch.schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        if self._state is not None:
            self.watch.load_state_dict(self._state)
            self._state = None
        self._failed_loggers = []
        for logger in trainer.loggers:
            with contextlib.suppress(Exception):  # it will be said when there is something to log
                writer: Any = getattr(logger, "experiment", None)
                if hasattr(writer, "add_custom_scalars"):
                    writer.add_custom_scalars(tensorboard_layout())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the update brought, at the step under which Lightning logs this batch."""
        waiting, self._waiting = self._waiting, []
        # the counter that Lightning's own callbacks use: `global_step` counts every optimizer
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for metrics, logger in product(waiting, trainer.loggers):
            self._log(logger, metrics, step)
        if self.watch is not None and self._on_alarm is not None:
            follow_first_rank(self.watch)
        if self.watch is not None and self.watch.should_stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hooks; the history stays."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training goes on with: curves and forecast, plain numbers and texts."""
        return {} if self.watch is None else {"watch": self.watch.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's state when training starts."""
        self._state = state_dict.get("watch")

    def _log(self, logger: Any, metrics: dict[str, float], step: int) -> None:
        """Log to one of the trainer's loggers; one that fails gets nothing any more, unless `strict`."""
        if any(logger is failed for failed in self._failed_loggers):
            return
        strict = bool(self._settings.get("strict", False))
        if not log_or_say(lambda: logger.log_metrics(metrics, step=step), type(logger).__name__, strict):
            self._failed_loggers.append(logger)

    def _detach(self) -> None:
        if self.watch is not None:
            self.watch.detach()

    def _find_policy(self, pl_module: LightningModule) -> nn.Module:
        """The policy inside of the LightningModule.

        Raises:
            ConfigError: it cannot be told which it is.
        """
        if self._policy is not None:
            found: Any = pl_module
            for name in self._policy.split("."):
                if not hasattr(found, name):
                    raise ConfigError(
                        f"policy: expected an attribute of {type(pl_module).__name__}, found no {self._policy!r}"
                    )
                found = getattr(found, name)
            return found  # type: ignore[no-any-return]
        candidates: dict[str, nn.Module] = {}
        for name, module in pl_module.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer in candidates)
            if not inside and callable(getattr(module, "generate", None)) and hasattr(module, "config"):
                candidates[name] = module
        trained = {n: m for n, m in candidates.items() if any(p.requires_grad for p in m.parameters())}
        if len(trained) != 1:
            names = ", ".join(trained) or "none"
            raise ConfigError(
                f"policy: expected {type(pl_module).__name__} to hold one trainable transformers model, found {names}; "
                "name its attribute: EntropyProbeCallback(..., policy='model')"
            )
        return next(iter(trained.values()))

    def _refuse_sharded(self, trainer: Trainer) -> None:
        """Sharded training would fail on the first probed step.

        Raises:
            ConfigError: it is.
        """
        kind = type(trainer.strategy).__name__
        if any(word in kind for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise ConfigError(
                f"trainer: expected whole parameters on every device, found {kind}; sharded training is not supported "
                "yet, probe its checkpoints with `entropy-probe run`"
            )
