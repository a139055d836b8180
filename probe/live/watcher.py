"""The drop-in probe: hooks on the steps of a running training's optimizer."""

from __future__ import annotations

import copy
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn

from probe.errors import ConfigError
from probe.live.attach import (
    check_tokenizer,
    prompt_examples,
    unwrapped_model,
    unwrapped_optimizers,
    watched_parameters,
)
from probe.live.cost import Schedule
from probe.live.forecast import CollapseAlarm, EntropyReading, Forecast, forecast
from probe.live.measure import Before, Outcome, UpdateProbe
from probe.live.neutral import undisturbed
from probe.live.report import (
    Log,
    alarm_line,
    as_log,
    cost_line,
    flat_values,
    probe_line,
    say,
    scalars,
)
from probe.live.settings import WatchSettings
from probe.live.words import in_own_words
from probe.rollouts.sampling import check_context, encode_prompts

STATE_FORMAT = "entropy-probe/watch/1"
WINDOW_HORIZONS, LEAST_WINDOW = 4, 5
"""Older probes do not enter the forecast, unless there are fewer than so many: rates change in the course of a run."""
SMALLEST_ENTROPY = 1e-9
"""Nats per token that a policy without any choice left is taken to have, for the logarithm's sake."""

GROUP_RATES, SCHEDULER_RATES = {"lr", "initial_lr", "max_lr", "min_lr"}, {"base_lrs", "max_lrs"}
"""Learning rates in an optimizer's groups, and lists of them in a scheduler."""


@dataclass(frozen=True)
class Alarm:
    """A forecast collapse, as `on_alarm` gets it.

    Attributes:
        step: optimizer step after which it was raised, from 1.
        message: the warning that was printed.
        forecast: steps left, with interval.
        entry: the history entry of this probe.
        model: the policy.
        optimizers: those that are watched.
        stop: asks the host to end training after this step; a plain loop reads `watch.should_stop`.
        schedulers: the learning-rate schedulers, where the host is a trainer.
    """

    step: int
    message: str
    forecast: Forecast
    entry: Mapping[str, Any]
    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    stop: Callable[[], None]
    schedulers: Sequence[Any] = ()

    def scale_learning_rate(self, factor: float, *schedulers: Any) -> None:
        """Multiply the learning rate of every group, now and in what schedulers make of it later.

        Args:
            factor: what the rate is multiplied by.
            schedulers: those of a plain loop. Many (LambdaLR, say) work every rate out from base rates of their own,
                and would undo the change. Those of Lightning's and transformers' trainers are known.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for key in GROUP_RATES & set(group):
                    group[key] = group[key] * factor
        for scheduler in single_schedulers([*self.schedulers, *schedulers]):
            for key in SCHEDULER_RATES & set(vars(scheduler)):
                setattr(scheduler, key, [rate * factor for rate in getattr(scheduler, key)])


def single_schedulers(schedulers: Iterable[Any]) -> list[Any]:
    """Learning-rate schedulers, those inside of SequentialLR, ChainedScheduler and Accelerate's wrapper, each once."""
    found: dict[int, Any] = {}
    for one in schedulers:
        inside = getattr(one, "_schedulers", None) or [getattr(one, "scheduler", None)]
        parts = [one, *single_schedulers(part for part in inside if part is not None)]
        found |= {id(part): part for part in parts}
    return list(found.values())


OnAlarm = Callable[[Alarm], None]


@dataclass
class _Sum:
    """A cumulative sum of per-step changes, known on probed steps and interpolated linearly between them.

    The steps `k_j .. k_(j+1) - 1`, of which the first is probed, change entropy by
    `g c_j + (g - 1) / 2 (c_(j+1) - c_j)` with `g = k_(j+1) - k_j`: their exact sum for `g = 1`, and wherever the
    change is linear in the step. The variance is that of sampling, and that of the steps between probes, whose scatter
    is taken from the difference of neighbouring probes, as if the steps were independent:
    `((g - 1) + (g - 1)^2) (c_(j+1) - c_j)^2 / 2`.
    """

    total: float = 0.0
    variance: float = 0.0
    step: int | None = None
    change: float = 0.0
    change_variance: float = 0.0
    weight: float = 0.0

    def advance(self, step: int, change: float, se: float) -> tuple[float, float]:
        """Take the change of one probed step in.

        Returns:
            The sum of the changes from the first probed step up to but without this one, and its standard error.
        """
        if self.step is not None:
            gap = step - self.step
            before, here = (gap + 1) / 2, (gap - 1) / 2
            self.total += before * self.change + here * change
            # the last change was in the sum already with the weight of the gap before it
            self.variance += ((self.weight + before) ** 2 - self.weight**2) * self.change_variance
            self.variance += here**2 * se**2
            # what was not probed: g - 1 steps of their own, and two probed ones that stand for others
            self.variance += ((gap - 1) + (gap - 1) ** 2) * (change - self.change) ** 2 / 2
            self.weight = here
        self.step, self.change, self.change_variance = step, change, se**2
        return self.total, math.sqrt(self.variance)


@dataclass
class _Run:
    """What a watch has seen so far; plain values, so that it can go into a checkpoint."""

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    readings: list[EntropyReading] = field(default_factory=list)
    threshold: float | None = None
    sums: dict[str, _Sum] = field(default_factory=dict)


class Watch:
    """A running probe; made by `watch`.

    Attributes:
        settings: as given.
        schedule: which steps are probed, and what that costs.
        error: the exception that switched the probe off, or None.
        should_stop: whether an alarm asked for the end of training.
        schedulers: learning-rate schedulers that an alarm is told of.
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
        self.settings = settings
        self.model = unwrapped_model(model)
        self.optimizers = unwrapped_optimizers(optimizer)
        parameters, left_out = watched_parameters(self.model, self.optimizers)
        check_tokenizer(tokenizer, self.model)
        own_tokenizer = copy.deepcopy(tokenizer)  # encoding sets its padding and truncation
        examples = prompt_examples(prompts, own_tokenizer, settings.seed)
        with in_own_words():
            longest = max(map(len, encode_prompts(own_tokenizer, examples)))
            check_context(self.model, longest, settings.max_new_tokens)
        if not (on_alarm is None or callable(on_alarm) or on_alarm == "stop"):
            raise ConfigError(f"on_alarm: expected a function, 'stop' or None, found {on_alarm!r}")
        self._probe = UpdateProbe(self.model, parameters, own_tokenizer, examples, settings)
        self._log, self._on_alarm = log, on_alarm
        self.schedulers: Sequence[Any] = ()
        self._run = _Run(step=first_step)
        self._alarm = CollapseAlarm(settings.horizon)
        self.schedule = Schedule(settings.every, settings.budget)
        self.should_stop = False
        self.error: BaseException | None = None
        self._before: Before | None = None
        self._waiting: set[int] = set()
        self._in_update = self._in_hook = False
        self._step_started = time.perf_counter()
        self._resumed: float | None = None
        self._cost_said = False
        self._origin = first_step
        self._handles: list[Any] = []
        if _rank() > 0:
            return  # parameters are the same on all ranks of data parallelism: the first one probes
        with undisturbed(self.model), in_own_words():
            self._probe.rehearse()
        self._handles = [
            handle
            for optimizer_ in self.optimizers
            for handle in (
                optimizer_.register_step_pre_hook(self._on_pre_step),
                optimizer_.register_step_post_hook(self._on_post_step),
            )
        ]
        count = sum(p.numel() for p in parameters.values())
        what = (
            f"watching {len(parameters)} trainable tensors ({count:,} numbers); deltaH1 by {self._probe.mode}"
        )
        say(f"{what}: {self._probe.reason}")
        if left_out:
            say(
                f"{len(left_out)} trainable tensors are in no watched optimizer and taken as constant "
                f"({', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''})",
                warn=True,
            )

    # ---------------------------------------------------------------- what a user reads

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry per probe: `step`, `verdict`, and numbers by the names of `LIVE_KEYS` and `LIVE_NUMBERS`."""
        return self._run.history

    @property
    def last(self) -> dict[str, Any] | None:
        """The last entry of `history`."""
        return self._run.history[-1] if self._run.history else None

    @property
    def active(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._handles)

    @property
    def step(self) -> int:
        """Number of optimizer steps seen, `first_step` included."""
        return self._run.step

    def detach(self) -> None:
        """Remove the hooks; the history stays."""
        for handle in self._handles:
            hooks = handle.hooks_dict_ref()
            # while torch goes through an optimizer's hooks, only the last one can go; the others do nothing any more
            if not self._in_hook or (hooks and next(reversed(hooks)) == handle.id):
                handle.remove()
        self._handles = []
        self._before = None

    def __enter__(self) -> Watch:
        """Watch for the length of a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on with curves and forecast: plain numbers and texts."""
        return {"format": STATE_FORMAT, "run": asdict(self._run), "alarm": asdict(self._alarm)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ConfigError: it is none.
        """
        if state.get("format") != STATE_FORMAT:
            raise ConfigError(
                f"state: expected one of the format {STATE_FORMAT}, found {state.get('format')!r}"
            )
        run = dict(state["run"])
        run["readings"] = [EntropyReading(**reading) for reading in run["readings"]]
        run["sums"] = {name: _Sum(**found) for name, found in run["sums"].items()}
        run["history"] = [dict(entry) for entry in run["history"]]
        self._run = _Run(**run)
        self._origin = self._run.step
        self._alarm = CollapseAlarm(**state["alarm"])

    # ---------------------------------------------------------------- hooks

    def _on_pre_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before a step of an optimizer: an update begins, unless another optimizer has begun it."""
        with self._hook():
            if self._in_update and id(optimizer) not in self._waiting:
                # a second step of one optimizer: the others take no part in this update
                self._end_update(late=True)
            if not self._in_update and self.active:
                self._begin_update()
            self._waiting.discard(id(optimizer))

    def _on_post_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After a step: the update is over when every optimizer has had its turn."""
        with self._hook():
            if self._in_update and not self._waiting:
                self._end_update()

    @contextmanager
    def _hook(self) -> Iterator[None]:
        """Inside of an optimizer's hook."""
        self._in_hook = True
        try:
            yield
        finally:
            self._in_hook = False

    def _begin_update(self) -> None:
        now = time.perf_counter()
        if self._resumed is not None:
            self.schedule.add_step(now - self._resumed)
        self._run.step += 1
        self._in_update, self._waiting = True, {id(o) for o in self.optimizers}
        if self.schedule.due(self._run.step - self._origin):
            _finish_queue(self.model)
            self._before = self._guarded(lambda: self._probe.before(self._run.step))
        self._step_started = time.perf_counter()

    def _end_update(self, late: bool = False) -> None:
        self._in_update = False
        before, self._before = self._before, None
        step_seconds = time.perf_counter() - self._step_started
        if before is not None:
            _finish_queue(self.model)
            step_seconds = time.perf_counter() - self._step_started
            start = time.perf_counter()
            outcome = self._guarded(lambda: self._probe.after(before, self.optimizers, late))
            if outcome is not None:
                seconds = before.seconds + time.perf_counter() - start
                self.schedule.add_probe(seconds)
                self._take(outcome, seconds)
        # the optimizer's own time belongs to the training step that ends here
        self._resumed = time.perf_counter() - step_seconds

    def _guarded(self, part: Callable[[], Any]) -> Any:
        """Run a part of the probe, leaving no trace; an error ends the probe, not the training."""
        try:
            with undisturbed(self.model), in_own_words():
                return part()
        except Exception as error:
            self.detach()
            self.error = error
            if self.settings.strict:
                raise
            say(
                f"switched off at step {self._run.step}, training goes on: {type(error).__name__}: {error}\n"
                f"{traceback.format_exc()}",
                warn=True,
            )
            return None

    # ---------------------------------------------------------------- results

    def _take(self, outcome: Outcome, seconds: float) -> None:
        """Add an outcome to the history, log it, and look ahead."""
        run, step = self._run, self._run.step
        entry = {"step": step, **flat_values(outcome.values), "seconds": seconds}
        entry |= self._cumulative(outcome, step)
        entry |= self._ahead(outcome, step)
        entry |= {"cost_share": self.schedule.share, "every": self.schedule.interval}
        run.history.append(entry)
        say(probe_line(entry))
        self._say_cost(outcome.values)
        if self._log is not None:
            self._log(scalars(entry), step)
        found = self._forecast()
        if self._alarm.update(found, step) and found is not None:
            self._raise_alarm(found, entry)

    def _cumulative(self, outcome: Outcome, step: int) -> dict[str, float]:
        """Predicted and measured change since the first probe, and the change of the level."""
        found: dict[str, float] = {}
        for which, suffix in enumerate(("", "_tok")):
            H = outcome.H[which]
            first = self._run.history[0] if self._run.history else {f"H_orig{suffix}": H.value}
            start = first[f"H_orig{suffix}"]
            spread = first.get(f"H_orig{suffix}_se", 0.0)
            for name, level, change in (
                ("deltaH1", "H_predicted", outcome.deltaH1[which]),
                ("deltaH_true", "H_tracked", outcome.deltaH_true[which]),
            ):
                sums = self._run.sums.setdefault(f"{name}{suffix}", _Sum())
                total, se = sums.advance(step, change.value, change.se)
                found |= {f"cumulative_{name}{suffix}": total, f"cumulative_{name}{suffix}_se": se}
                found[f"{level}{suffix}"] = start + total
            found[f"cumulative_H{suffix}"] = H.value - start
            found[f"cumulative_H{suffix}_se"] = math.hypot(H.se, spread) if self._run.history else 0.0
        return found

    def _ahead(self, outcome: Outcome, step: int) -> dict[str, float]:
        """The forecast after this probe."""
        run, H, change = self._run, outcome.H[1], outcome.deltaH_true[1]
        if run.threshold is None:
            given = self.settings.collapse_entropy
            run.threshold = (
                self.settings.collapse_fraction * max(H.value, SMALLEST_ENTROPY) if given is None else given
            )
        if outcome.moved:
            level = max(H.value, SMALLEST_ENTROPY)
            run.readings.append(EntropyReading(step, level, H.se, change.value, change.se))
            oldest = step - WINDOW_HORIZONS * self.settings.horizon
            recent = [reading for reading in run.readings[:-LEAST_WINDOW] if reading.step >= oldest]
            run.readings = [*recent, *run.readings[-LEAST_WINDOW:]][-self.settings.window :]
        found = self._forecast()
        values = {"collapse_entropy": run.threshold}
        if found is not None:
            values |= {
                "steps_to_collapse": found.steps,
                "steps_to_collapse_low": found.low,
                "steps_to_collapse_high": found.high,
                "entropy_rate": found.rate,
            }
        return values

    def _forecast(self) -> Forecast | None:
        """From the last probes; None with fewer than three."""
        if self._run.threshold is None or not self._run.readings:
            return None
        return forecast(
            self._run.readings, self._run.threshold, self.settings.window, momentum=self._momentum()
        )

    def _momentum(self) -> float:
        """The largest decay of a gradient average: what correlates the updates of neighbouring steps."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        rates = [float(g["betas"][0] if "betas" in g else g.get("momentum", 0.0)) for g in groups]
        return max(rate for rate in [*rates, 0.0] if rate < 1.0)

    def _raise_alarm(self, found: Forecast, entry: dict[str, Any]) -> None:
        """Warn, and call what the user wants called; its exceptions are the user's."""
        message = alarm_line(entry, found.threshold, self.settings.horizon)
        entry["alarm"] = True
        say(message, warn=True)
        stop, step = self._request_stop, self._run.step
        alarm = Alarm(step, message, found, entry, self.model, self.optimizers, stop, self.schedulers)
        if self._on_alarm == "stop":
            alarm.stop()
        elif callable(self._on_alarm):
            self._on_alarm(alarm)

    def _request_stop(self) -> None:
        self.should_stop = True

    def _say_cost(self, values: Mapping[str, Any]) -> None:
        """The cost model, once a training step has been timed."""
        if self._cost_said or self.schedule.step_seconds is None:
            return
        self._cost_said = True
        say(cost_line(self.schedule, values["B_E"], values["avg_generation_length"], values["timing"]))


def _rank() -> int:
    """This process's rank; 0 where training is not distributed."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if there else 0


def _finish_queue(model: nn.Module) -> None:
    """Wait for what training has queued on the GPU, so that its time is not taken for the probe's."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def watch(
    model: Any,
    optimizer: Any,
    prompts: Iterable[Any],
    tokenizer: Any,
    *,
    log: Any = None,
    on_alarm: OnAlarm | str | None = None,
    first_step: int = 0,
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
            `SummaryWriter`, a Weights & Biases run. None keeps them in `history` only.
        on_alarm: called with an `Alarm` when a collapse is forecast within `horizon` steps; `"stop"` sets
            `should_stop`. Its exceptions are raised.
        first_step: optimizer steps taken before, where training was resumed.
        settings: of `WatchSettings`: `every`, `budget`, `B_E`, `max_new_tokens`, `temperature`, ...

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
        >>> watch.last["deltaH_true_tok"], watch.last["steps_to_collapse"]  # doctest: +SKIP
    """
    return Watch(
        model,
        optimizer,
        prompts,
        tokenizer,
        WatchSettings.of(settings),
        as_log(log),
        on_alarm,
        first_step,
    )
