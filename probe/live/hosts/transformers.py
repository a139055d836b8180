"""What transformers' Trainer and TRL's trainers tell the probe."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from probe.errors.exceptions import ConfigError, DataError, ProbeError, RolloutError
from probe.from_checkpoint.options import READ
from probe.live.alarm import OnAlarm
from probe.live.attach import PROBE_CHECKPOINTS
from probe.live.hosts.reporters import passed_over, reporters
from probe.live.hosts.trl import sampling_changes, trainer_prompts, trainer_update
from probe.live.names import ALARMS, history_names
from probe.live.notes import Notes
from probe.live.outlets import Log, LogTo, tensorboard_layout
from probe.live.say import say
from probe.live.settings import WatchSettings
from probe.live.watch import Watch, watch
from probe.text import error_text

LOGGED_ENTROPY = "entropy"
"""Name under which TRL logs the mean entropy of its batches' tokens, nats."""


def note_logged_entropy(watch: Watch | None, state: TrainerState, logs: Mapping[str, float] | None) -> None:
    """Tell the watch of an entropy among what the trainer has just logged."""
    H = (logs or {}).get(LOGGED_ENTROPY)
    if H is not None and watch is not None:
        watch.note_entropy(H, min(_middle(state.global_step, state), watch.step))


def logged_levels(state: TrainerState) -> list[tuple[int, float]]:
    """The entropies in a trainer's log, each with the step that it belongs to."""
    logs = [one for one in state.log_history if LOGGED_ENTROPY in one]
    return [(_middle(int(one["step"]), state), float(one[LOGGED_ENTROPY])) for one in logs]


def _middle(step: int, state: TrainerState) -> int:
    """The optimizer step in the middle of those that a log averages over, from 1."""
    # `logging_steps` of the state is in optimizer steps, also where the arguments give a share
    return max(step - int(state.logging_steps or 1) // 2, 1)


def refuse_sharded(trainer: Trainer) -> None:
    """Sharded training would fail on the first probed step.

    Raises:
        ConfigError: it is.
    """
    state = getattr(trainer.accelerator, "state", None)
    version = int(getattr(getattr(state, "fsdp_plugin", None), "fsdp_version", 1))
    stage = int(getattr(getattr(state, "deepspeed_plugin", None), "zero_stage", 3))
    unsupported = {
        f"DeepSpeed's ZeRO-{stage}": getattr(trainer, "is_deepspeed_enabled", False) and stage > 2,
        "FSDP with fsdp_version: 1": getattr(trainer, "is_fsdp_enabled", False) and version < 2,
    }
    for kind in (kind for kind, found in unsupported.items() if found):
        raise ConfigError(
            f"trainer: expected DDP, ZeRO-1 or ZeRO-2, or FSDP with fsdp_version: 2, found {kind}; "
            f"{PROBE_CHECKPOINTS}"
        )


def attached(
    trainer: Trainer,
    args: TrainingArguments,
    state: TrainerState,
    prompts: Iterable[Any] | None,
    given: Mapping[str, Any],
    log: Log,
    on_alarm: OnAlarm | str | None,
) -> Watch | None:
    """A watch on a trainer's optimizer, which goes on from what the trainer has logged before.

    Args:
        trainer: about to train.
        args: its arguments.
        state: its state, with the log.
        prompts: what E's prompts are drawn from; None takes those of the trainer's data.
        given: settings of the probe that the user has given.
        log: where the numbers go.
        on_alarm: see `watch`.

    Returns:
        The watch; None where the prompts allow none, which is said, unless `strict` is set.

    Raises:
        ConfigError: model, data set, tokenizer or optimizer cannot be used.
    """
    asked, tokenizer = WatchSettings.of(given), trainer_tokenizer(trainer)
    prompts = default_prompts(trainer) if prompts is None else prompts
    try:
        examples = trainer_prompts(trainer, prompts, tokenizer, asked.seed)
    except DataError as error:
        if asked.strict:
            raise
        _say_not_attached(error)
        return None
    try:
        made = watch(
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.optimizer,
            examples,
            tokenizer,
            log=log,
            on_alarm=on_alarm,
            first_step=state.global_step,
            update=partial(trainer_update, trainer) if asked.attribution else None,
            **merged_settings(trainer, args, given),
        )
    except RolloutError as error:  # no prompt fits
        if asked.strict:
            raise
        _say_not_attached(error)
        return None
    made.schedulers = [trainer.lr_scheduler]
    made.replay(logged_entries(state), logged_levels(state))
    for reporter in reporters(trainer):
        writer: Any = getattr(reporter.callback, "tb_writer", None)
        if hasattr(writer, "add_custom_scalars"):
            writer.add_custom_scalars(tensorboard_layout())
    return made


def _say_not_attached(error: ProbeError) -> None:
    say(f"not attached, training goes on without it: {error_text(error)}", warn=True)


def merged_settings(trainer: Trainer, args: TrainingArguments, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings given, and for the others temperature and length of the trainer's own rollouts, where it has any."""
    settings: dict[str, Any] = {}
    for name in ("temperature", "max_completion_length"):
        if getattr(args, name, None) is not None:
            settings[READ[name].key.removeprefix("generation.")] = getattr(args, name)
    settings |= given
    changes = sampling_changes(trainer)
    if changes:
        say(
            f"the trainer samples with {', '.join(f'{name} {value}' for name, value in changes.items())}; the "
            f"entropies here are those of the whole distribution at temperature "
            f"{WatchSettings.of(settings).temperature}",
            warn=True,
        )
    return settings


def trainer_tokenizer(trainer: Trainer) -> Any:
    """The trainer's tokenizer, with what TRL gives to its chat template."""
    processor: Any = trainer.processing_class
    tokenizer = getattr(processor, "tokenizer", processor)
    options = getattr(trainer, "chat_template_kwargs", None)
    if options and tokenizer is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **options)
    return tokenizer


def default_prompts(trainer: Trainer) -> Any:
    """The prompts of the trainer's own data: those of evaluation, else those of training.

    Raises:
        ConfigError: there is no data set with a column `prompt`.
    """
    evaluation = trainer.eval_dataset
    data: Any = trainer.train_dataset if evaluation is None else evaluation
    columns = getattr(data, "column_names", None)
    if isinstance(data, Mapping) or not columns or "prompt" not in columns or not hasattr(data, "__len__"):
        raise ConfigError(
            "prompts: expected the trainer's data set to have a length and a column `prompt`, found none; give the "
            "probe its prompts: EntropyProbeTrainerCallback(trainer, prompts=[...])"
        )
    return data


def log_through(trainer: Trainer, numbers: Mapping[str, float], step: int) -> None:
    """Log where a trainer reports, but not where it prints: some forty numbers are no line to read.

    Args:
        trainer: whose log it is.
        numbers: by name.
        step: for what the probe writes to itself; the trainer's log notes the step that it has counted.
    """
    own = reporters(trainer)
    printing = [one for one in trainer.callback_handler.callbacks if prints_logs(one)]
    with passed_over(trainer, [*(one.callback for one in own), *printing]):
        # not `trainer.log`: TRL's empties the averages of its own metrics there, which would change its logs
        Trainer.log(trainer, dict(numbers))
    for reporter in own:
        reporter.board.numbers(numbers, step)


def prints_logs(callback: TrainerCallback) -> bool:
    """Whether a callback prints what is logged on the console, where the probe has its one line.

    A class derived from those that do, with an `on_log` of its own, is the user's, and gets the numbers.
    """
    by: Any = type(callback).on_log
    home = getattr(by, "__module__", ""), getattr(by, "__qualname__", "")
    return by in (PrinterCallback.on_log, ProgressCallback.on_log) or (
        # TRL need not be installed
        home == ("trl.trainer.callbacks", "RichProgressCallback.on_log")
    )


def show_through(trainer: Trainer, notes: Notes, step: int) -> None:
    """Show what is more than numbers where a trainer reports and it can be shown."""
    for reporter in reporters(trainer):
        notes.show_on(reporter.board, step)


def trainer_log(trainer: Trainer) -> LogTo:
    """The log of a trainer."""
    return LogTo(partial(log_through, trainer), partial(show_through, trainer))


def logged_entries(state: TrainerState) -> list[dict[str, Any]]:
    """The probe's entries and alarms in a trainer's log, by the names of the history."""
    entries = []
    for logs in state.log_history:
        own = history_names(logs)
        if any(name in own for name in ("H_orig_tok", *ALARMS.values())):
            entries.append({"step": logs["step"], **own})
    return entries
