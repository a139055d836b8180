"""The drop-in probe: the handle of a probe that runs inside of a training, and `watch`, which makes one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any

from probe.distributed.ranks import Ranks
from probe.errors.exceptions import ConfigError
from probe.files.atomic import ensure_replaceable
from probe.live.alarm import Alarms, OnAlarm, check_on_alarm
from probe.live.attach import backward_hooks, checked_attachment, say_attached
from probe.live.attribution import UpdateOf
from probe.live.history import History, read_state, saved_state
from probe.live.hooks import StepHooks, are_watched
from probe.live.optimizers import momentum
from probe.live.outlets import Log, Outlets, as_log
from probe.live.ranks import of_one_policy
from probe.live.say import say
from probe.live.schedule import Schedule
from probe.live.settings import SMALLEST_E, WatchSettings
from probe.live.shown import ShownWatch
from probe.live.source import SampledSource
from probe.live.step import UpdateProbe
from probe.live.updates import ProbedUpdates
from probe.report.summary import Summary, summary_of
from probe.scoring.room import Room


class Watch(ShownWatch, AbstractContextManager["Watch"]):
    """A running probe; made by `watch`. A `with` block detaches it in the end.

    Attributes:
        settings: as given.
        model: the policy, unwrapped.
        optimizers: those that are watched, unwrapped.
        schedule: which steps are probed, and what that costs.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        prompts: Iterable[Any],
        tokenizer: Any,
        settings: WatchSettings,
        log: Log | None = None,
        on_alarm: OnAlarm | str | None = None,
        first_step: int = 0,
    ) -> None:
        """Check everything, rehearse a small probe, and register the hooks; see `watch`."""
        start = time.perf_counter()
        job = Ranks.of_job()
        with job.together("attach"):
            on = checked_attachment(model, optimizer, prompts, tokenizer, settings)
            check_on_alarm(on_alarm)
            if settings.report_path is not None and job.first:
                ensure_replaceable(settings.report_path)
        self.settings, self.model, self.optimizers = settings, on.model, on.optimizers
        self.schedule = Schedule(
            settings.every, settings.budget, settings.B_E, SMALLEST_E, settings.at_least_every
        )
        # the first rank acts on an alarm; what it changes holds for all, see `follow_first_rank`
        self._alarms = Alarms(on.model, on.optimizers, on_alarm if job.first else None)
        self._history = History(settings, first_step, most=math.log(Room.of(on.model).tokens))
        ranks = of_one_policy(job, dict(on.model.named_parameters()))
        self._probe = UpdateProbe(
            on.model, on.parameters, SampledSource(on.tokenizer, on.prompts, settings), settings
        )
        if ranks is not None:
            self._probe.ranks = ranks
            self._probe.source.prompts = ranks.from_first("prompts", lambda: on.prompts)
        self._outlets = Outlets(log if ranks is not None and ranks.first else None, self.schedule, settings)
        self._updates = ProbedUpdates(
            self._probe,
            on.optimizers,
            self._history,
            self.schedule,
            self._outlets,
            self._alarms,
        )
        if settings.report_path is not None:
            self._outlets.report = partial(self.report, settings.report_path)
        self._hooks = StepHooks(on.optimizers, self._updates)
        if ranks is None:
            return
        if are_watched(on.optimizers):
            say("this optimizer is watched already; every probe will be made and logged twice", warn=True)
        self._updates.rehearse()
        self._hooks.register()
        self.schedule.add_attaching(time.perf_counter() - start)
        say_attached(on, self._probe.way.mode, self._probe.way.reason)
        if hooked := backward_hooks(on.parameters, on.optimizers):
            self._updates.probe_early(
                f"{len(hooked)} trainable tensors have hooks that run in the backward pass ({hooked[0]}, ...)",
                agreed=True,
            )
            self._hooks.detach_after_error()

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry per probe: `step`, `verdict`, and numbers by the names of `LIVE_KEYS` and `LIVE_NUMBERS`."""
        return self._history.run.history

    @property
    def last(self) -> dict[str, Any] | None:
        """The last entry of `history`."""
        return self.history[-1] if self.history else None

    @property
    def active(self) -> bool:
        """Whether the hooks are there."""
        return self._hooks.active

    @property
    def step(self) -> int:
        """Number of optimizer steps seen, `first_step` included."""
        return self._history.run.step

    @property
    def error(self) -> BaseException | None:
        """The exception that switched the probe off, or None."""
        return self._updates.error

    @property
    def should_stop(self) -> bool:
        """Whether an alarm asked for the end of training."""
        return self._alarms.should_stop

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        self._alarms.should_stop = value

    @property
    def update_of(self) -> UpdateOf | None:
        """What gives the batch of the training's own update; see `watch`."""
        return self._probe.update_of

    @update_of.setter
    def update_of(self, value: UpdateOf | None) -> None:
        self._probe.update_of = value

    @property
    def schedulers(self) -> Sequence[Any]:
        """Learning-rate schedulers that an alarm is told of."""
        return self._alarms.schedulers

    @schedulers.setter
    def schedulers(self, value: Sequence[Any]) -> None:
        self._alarms.schedulers = value

    def summary(self) -> Summary | None:
        """What the training did to the entropy so far, in a few numbers and lines; None with fewer than two probes."""
        return summary_of(self.history, self.step, self.schedule.share)

    def note_entropy(self, H: float, step: int | None = None) -> None:
        """Take in an entropy that the training has logged itself, of batches of its own; it sharpens the forecast.

        It may differ from the probe's by a constant (other prompts, say), and its error is taken from how it scatters
        from one log to the next: five of them are needed. TRL's `entropy` is noted by the callback. An alarm may start.

        Args:
            H: nats per token, at the probe's temperature; what is not positive and finite is left out.
            step: the optimizer step before which the policy had it, from 1; by default the last one seen.

        Raises:
            ConfigError: `step` is no step that was seen.
        """
        if step is not None and not 0 <= step <= self.step:
            raise ConfigError(
                f"step: expected an optimizer step of the {self.step} seen so far, found {step!r}; give the number of "
                "the update, not of tokens or samples"
            )
        if self.active:
            self._updates.note_entropy(float(H), self.step if step is None else step)

    def detach(self) -> None:
        """Remove the hooks, and say the summary; the history stays."""
        ends = self.active
        try:
            conclude(self)
        finally:
            self._hooks.detach()
        if ends and (found := self.summary()) is not None:
            say(f"summary: {found}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on with curves and forecast: plain numbers and texts.

        Of the history the first entry, which the curves start from, and the last 20.
        """
        return saved_state(self._history.run, self._alarms.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ConfigError: it is none.
        """
        run, self._alarms.state = read_state(state)
        self._history.adopt(run)

    def replay(self, entries: Iterable[Mapping[str, Any]], logged: Iterable[tuple[int, float]] = ()) -> None:
        """Go on from what an earlier training has logged: curves and forecast as if it had not been interrupted.

        Standard errors are pooled over neighbouring probes; the first ones after a replay pool those of the log, which
        are pooled already. `load_state_dict` goes on exactly.

        Args:
            entries: one per probe in the order of their `step`, with numbers by the names of `LIVE_KEYS` and
                `LIVE_NUMBERS`. What is absent in one is taken as not known. Alarms are entries of their own, with
                their step.
            logged: steps and entropies as `note_entropy` gets them.
        """
        for step, H in logged:
            self._history.note_logged(step, H)
        entries = list(entries)
        for entry in entries:
            self._alarms.state.replay(entry)
        self._history.replay(entries, momentum(self.optimizers))


def conclude(watch: Watch) -> None:
    """Show the last picture and the summary where the log takes any, as far as they have not been shown.

    `detach` does it; trainers that close their loggers before callbacks hear of the end need it earlier.
    """
    if watch.active:
        watch._outlets.publish_end(watch.history, watch.summary(), watch.step)


def watch(
    model: Any,
    optimizer: Any,
    prompts: Iterable[Any],
    tokenizer: Any,
    *,
    log: Any = None,
    on_alarm: OnAlarm | str | None = None,
    first_step: int = 0,
    update: UpdateOf | None = None,
    **settings: Any,
) -> Watch:
    """Probe a running training: what each update does to the policy's entropy, predicted and measured.

    Attaches to the optimizer's step hooks. On a probed step a batch E of responses is drawn from the policy just before
    the step; after it, deltaH1 of the true step `theta_new - theta_old` and deltaH_true are worked out, logged, and a
    forecast is made. Parameters, gradients, optimizer, random streams, flags and buffers of the training are bitwise
    what they would be without the probe.

    Args:
        model: the policy, a transformers causal LM (with peft or not; inside DistributedDataParallel or torch.compile
            or not) on its device.
        optimizer: the torch optimizer that holds its trainable parameters, in a wrapper of Fabric's, Lightning's or
            Accelerate's or not; a list, where several make one update together.
        prompts: texts, message lists, or rows with a column `prompt`: what E's prompts are drawn from. Like those of
            training, best not the same ones.
        tokenizer: the policy's.
        log: where the numbers go: a function of `(mapping, step)` such as `fabric.log_dict`, a Lightning logger, a
            `SummaryWriter`, a run of Weights & Biases or trackio. None keeps them in `history` only.
        on_alarm: called with an `Alarm` when a collapse or an explosion is likely within `horizon` steps; `"stop"` sets
            `should_stop`. Its exceptions are raised.
        first_step: optimizer steps taken before, where training was resumed.
        update: gives the batch that the update is made from (`probe.live.HostUpdate`), so that the probe says what
            classes of its tokens add to deltaH1.
        settings: of `WatchSettings`: `every`, `budget`, `B_E`, or `target_se` which
            chooses it, `max_new_tokens`, `temperature`, ...

    Returns:
        The handle, with `history`; use it in a `with` block or call `detach()` in the end.

    Raises:
        ConfigError: model, optimizer, tokenizer or a setting cannot be used; one line says which and why.
        DataError: the prompts cannot be used.
        ProbeError: a small rehearsal failed.

    Example:
        >>> watch = probe.watch(model, optimizer, prompts, tokenizer, every=10)  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     training_step(model, batch)
        >>> watch.last["deltaH_true_tok"], watch.last["outlook"]  # doctest: +SKIP
    """
    own = WatchSettings.of(settings)
    if own.attribution and update is None:
        raise ConfigError(
            "attribution: expected `update`, which gives the batch that an update is made from, found none; give it "
            "(probe.live.HostUpdate), or leave attribution out (TRL's GRPOTrainer gives its batch by itself)"
        )
    made = Watch(model, optimizer, prompts, tokenizer, own, as_log(log), on_alarm, first_step)
    made.update_of = update
    return made
