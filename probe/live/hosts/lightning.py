"""What Lightning's Trainer tells the probe, and its loggers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.distributed.fsdp import FSDPModule

from probe.errors.exceptions import ConfigError
from probe.live.alarm import OnAlarm
from probe.live.attach import PROBE_CHECKPOINTS
from probe.live.names import MAIN, full_name, monitored
from probe.live.notes import Notes
from probe.live.optimizers import moved_parameters
from probe.live.outlets import Log, Outlet, tensorboard_layout, to_logger
from probe.live.settings import WatchSettings
from probe.live.watch import Watch
from probe.live.zero import is_zero, zero_optimizer
from probe.shards import is_sharded

UPDATE = "entropy_probe_update"
"""The method of a LightningModule that gives the batch of its update, see `HostUpdate`."""


def attached(
    trainer: Trainer,
    policy: nn.Module,
    prompts: Iterable[Any],
    tokenizer: Any,
    settings: WatchSettings,
    log: Log,
    on_alarm: OnAlarm | str | None,
) -> Watch:
    """A watch on those of a trainer's optimizers that move the policy; see `watch` for the other arguments.

    Raises:
        ConfigError: trainer, policy, optimizers or tokenizer cannot be used.
        DataError: the prompts cannot be used.
        ProbeError: a small rehearsal failed.
    """
    refuse_sharded(trainer)
    _refuse_outer_shards(trainer.lightning_module, policy)
    optimizers = policy_optimizers(trainer, policy)
    update = getattr(trainer.lightning_module, UPDATE, None)
    if settings.attribution and not callable(update):
        raise ConfigError(
            f"attribution: expected a method `{UPDATE}(policy)` of the LightningModule, which gives the batch that an "
            f"update is made from (probe.live.HostUpdate), found none in {type(trainer.lightning_module).__name__}"
        )
    made = Watch(policy, optimizers, prompts, tokenizer, settings, log, on_alarm, counted_steps(trainer))
    made.update_of = update if settings.attribution else None
    made.schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return made


def refuse_sharded(trainer: Trainer) -> None:
    """Sharded training would fail on the first probed step.

    Raises:
        ConfigError: it is.
    """
    kind = type(trainer.strategy).__name__
    if any(word in kind for word in ("FSDP",)):
        raise ConfigError(
            f"trainer: expected DDP, DeepSpeed's ZeRO-1 or ZeRO-2, or FSDP2 by ModelParallelStrategy, found {kind}; "
            f"{PROBE_CHECKPOINTS}"
        )


def _refuse_outer_shards(module: nn.Module, policy: nn.Module) -> None:
    """The first forward, which is the probe's, would make the policy FSDP2's root in the place of a module around it.

    Raises:
        ConfigError: there is one.
    """
    for part in module.modules():
        if (
            part is not policy
            and is_sharded(policy)
            and isinstance(part, FSDPModule)
            and policy in part.modules()
        ):
            raise ConfigError(
                "trainer: expected fully_shard on the policy and modules in it, found it on the "
                f"{type(part).__name__} around it; leave that out"
            )


def find_policy(module: LightningModule, path: str | None) -> nn.Module:
    """The policy inside of a LightningModule.

    Args:
        module: the user's.
        path: name of the attribute, dots allowed; None where there is only one transformers model that is trained.

    Raises:
        ConfigError: it cannot be told which it is.
    """
    if path is not None:
        named: Any = module
        for name in path.split("."):
            if not hasattr(named, name):
                raise ConfigError(
                    f"policy: expected an attribute of {type(module).__name__}, found no {path!r}"
                )
            named = getattr(named, name)
        return named  # type: ignore[no-any-return]
    candidates: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in candidates)
        if not inside and callable(getattr(part, "generate", None)) and hasattr(part, "config"):
            candidates[name] = part
    trained = {n: m for n, m in candidates.items() if any(p.requires_grad for p in m.parameters())}
    if len(trained) != 1:
        names = ", ".join(trained) or "none"
        raise ConfigError(
            f"policy: expected {type(module).__name__} to hold one trainable transformers model, found {names}; "
            "name its attribute: EntropyProbeCallback(..., policy='model')"
        )
    return next(iter(trained.values()))


def policy_optimizers(trainer: Trainer, policy: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers that move the policy; all of them where none does, for the message about it."""
    own = {id(p) for p in policy.parameters() if p.requires_grad}
    moving = [
        one
        for one in trainer.optimizers
        if not own.isdisjoint(moved_parameters([zero_optimizer(one) if is_zero(one) else one]))
    ]
    return moving or list(trainer.optimizers)


def counted_steps(trainer: Trainer) -> int:
    """The step under which Lightning's own callbacks log; `global_step` counts every optimizer."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


class LoggerOutlets:
    """The trainer's loggers; one that fails gets nothing any more, unless `strict`."""

    def __init__(self, strict: bool) -> None:
        """Args: `strict`, whether errors of loggers are raised."""
        self._strict = strict
        self._outlets: list[Outlet] = []

    def start(self, loggers: Iterable[Any]) -> None:
        """A training begins: no logger has failed yet, and TensorBoard gets the layout of the probe's charts."""
        self._outlets = []
        for logger in loggers:
            self._outlets.append(Outlet(to_logger(logger), type(logger).__name__, self._strict))
            with contextlib.suppress(Exception):  # it will be said when there is something to log
                writer: Any = getattr(logger, "experiment", None)
                if hasattr(writer, "add_custom_scalars"):
                    writer.add_custom_scalars(tensorboard_layout())

    def send(self, numbers: Mapping[str, float], step: int) -> None:
        """Log numbers to all of them."""
        for outlet in self._outlets:
            outlet.send(numbers, step)

    def show(self, notes: Notes, step: int) -> None:
        """Show what is more than numbers, on those that take it."""
        for outlet in self._outlets:
            outlet.show(notes, step)


def let_monitor(trainer: Trainer, watch: Watch | None) -> None:
    """Give the last probe's main numbers to callbacks that monitor one (EarlyStopping, ModelCheckpoint).

    They stay until the next probe. Every rank has them, with the same values, as these callbacks need it.
    """
    if watch is not None and watch.last is not None:
        known = monitored(watch.last)
        gone = [name for name in map(full_name, MAIN) if name not in known]
        for name in gone:
            trainer.callback_metrics.pop(name, None)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in known.items()})
