"""The drop-in probe: hooks on the steps of a running training's optimizer."""

from __future__ import annotations

import copy
import functools
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from probe.distributed.ranks import rank_and_size
from probe.errors.exceptions import ConfigError
from probe.forecast.curves import CumulativeSum
from probe.forecast.forecast import Forecast, forecast
from probe.forecast.readings import EntropyReading
from probe.live.adapters import ActiveAdapters
from probe.live.alarm import Alarm, CollapseAlarm, OnAlarm, check_on_alarm
from probe.live.attach import (
    backward_hooks,
    check_first_step,
    check_tokenizer,
    prompt_examples,
    unwrapped_model,
    watched_parameters,
)
from probe.live.lines import alarm_line, cost_line, outlook, probe_line
from probe.live.names import STEPS, flat_values, scalars
from probe.live.neutral import undisturbed
from probe.live.optimizers import learning_rate, moved_parameters, unwrapped_optimizers
from probe.live.outcome import Before, Outcome
from probe.live.outlets import Log, as_log
from probe.live.say import say
from probe.live.schedule import Schedule
from probe.live.settings import WatchSettings
from probe.live.step import UpdateProbe
from probe.live.words import in_own_words
from probe.rollouts.generation import encode_prompts
from probe.scoring.room import check_prompts, fitting_prompts
from probe.snapshot import isolated_rng
from probe.text import error_text
from probe.verdict.words import WORDS

STATE_FORMAT = "entropy-probe/watch/1"
WINDOW_HORIZONS, LEAST_WINDOW = 4, 5
"""Older probes do not enter the forecast, unless there are fewer than so many: rates change in the course of a run."""
READING = ("H_orig_tok", "H_orig_tok_se", "deltaH_true_tok", "deltaH_true_tok_se")
"""Names of what the forecast takes from a probe."""
STILL_STEPS = 3
"""Probed steps of exactly 0 after which there is a warning."""
SMALLEST_ENTROPY = 1e-9
"""Nats per token that a policy without any choice left is taken to have, for the logarithm's sake."""
_FULL_BYTES = 4
"""Bytes of a float32 number."""
KEPT_ENTRIES = 20
"""Entries of the history, beside the first one, that a `state_dict` holds."""
Method = TypeVar("Method", bound=Callable[..., Any])


def _out_of_dynamo(method: Method) -> Method:
    """A hook that a compiled optimizer step calls as it is: compiling a probe takes minutes and breaks it."""
    disabled: Any = None

    @functools.wraps(method)
    def call(*args: Any, **kw: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:  # nothing is compiled here, and loading it takes seconds
                return method(*args, **kw)
            disabled = torch.compiler.disable(method)
        return disabled(*args, **kw)

    return cast(Method, call)


@dataclass
class _Run:
    """What a watch has seen so far; plain values, so that it can go into a checkpoint."""

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    readings: list[EntropyReading] = field(default_factory=list)
    threshold: float | None = None
    sums: dict[str, CumulativeSum] = field(default_factory=dict)


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
        start = time.perf_counter()
        self.settings = settings
        self.model = unwrapped_model(model)
        self.optimizers = unwrapped_optimizers(optimizer)
        parameters, left_out = watched_parameters(self.model, self.optimizers)
        check_tokenizer(tokenizer, self.model)
        own_tokenizer = copy.deepcopy(tokenizer)  # encoding sets its padding and truncation
        with in_own_words():
            examples = prompt_examples(prompts, own_tokenizer, settings.seed)
            encoded = encode_prompts(own_tokenizer, examples)
            fitting = fitting_prompts(self.model, encoded, settings.max_new_tokens) or range(len(examples))
            if len(fitting) < len(examples):
                say(
                    f"{len(examples) - len(fitting)} of {len(examples)} prompts are left out: with a response of "
                    f"{settings.max_new_tokens} tokens they are longer than the model's positions",
                    warn=True,
                )
            examples, encoded = [examples[i] for i in fitting], [encoded[i] for i in fitting]
            check_prompts(self.model, encoded, settings.max_new_tokens)
        check_on_alarm(on_alarm)
        check_first_step(first_step)
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
        self._still = 0
        self._adapters = ActiveAdapters(self.model)
        self._early = False
        self._seen_versions: dict[int, int] = {}
        self._moved_before: set[int] = set()
        self._foreign: set[int] = set()
        self._step_started = time.perf_counter()
        self._resumed: float | None = None
        self._cost_said = False
        self._cost_of: tuple[int, float, Mapping[str, float]] | None = None
        self._said_verdict = ""
        self._handles: list[Any] = []
        if rank_and_size()[0] > 0:
            return  # parameters are the same on all ranks of data parallelism: the first one probes
        if any(isinstance(getattr(h, "__self__", None), Watch) for h in self._present_hooks()):
            say("this optimizer is watched already; every probe will be made and logged twice", warn=True)
        with undisturbed(self.model), in_own_words():
            self._probe.rehearse()
        self._register()
        self._seen_versions = self._versions()
        self.schedule.probe_seconds = time.perf_counter() - start  # attaching counts too
        count = sum(p.numel() for p in parameters.values())
        what = f"watching {len(parameters)} trainable tensors ({count:,} numbers); deltaH1 by {self._probe.way.mode}"
        say(f"{what}: {self._probe.way.reason}")
        if left_out:
            say(
                f"{len(left_out)} trainable tensors are in no watched optimizer and taken as constant "
                f"({', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''})",
                warn=True,
            )
        half = [name for name, p in parameters.items() if p.element_size() < _FULL_BYTES]
        if half:
            say(
                f"{len(half)} of {len(parameters)} trainable tensors are in 16 bits: steps below their resolution are "
                "rounded away in training itself; what is predicted and measured is the step that remains"
            )
        if hooked := backward_hooks(parameters):
            self._probe_early(
                f"{len(hooked)} trainable tensors have hooks that run in the backward pass ({hooked[0]}, ...)"
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

    def _present_hooks(self) -> list[Any]:
        """Hooks that the optimizers have already."""
        return [hook for o in self.optimizers for hook in o._optimizer_step_pre_hooks.values()]

    def _register(self) -> None:
        """Hooks on the watched optimizers, and one that sees the steps of others."""
        own = [
            handle
            for optimizer in self.optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._on_pre_step),
                optimizer.register_step_post_hook(self._on_post_step),
            )
        ]
        # first in the list, last in the dictionary of hooks: see `detach`
        self._handles = [*own, register_optimizer_step_post_hook(self._on_any_step)]

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
        """What a resumed training needs to go on with curves and forecast: plain numbers and texts.

        Of the history the first entry, which the curves start from, and the last 20.
        """
        history = self._run.history
        kept = [*history[:1], *history[1:][-KEPT_ENTRIES:]]
        run = asdict(replace(self._run, history=kept))
        return {"format": STATE_FORMAT, "run": run, "alarm": asdict(self._alarm)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ConfigError: it is none.
        """
        if not isinstance(state, Mapping) or state.get("format") != STATE_FORMAT:
            found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
            raise ConfigError(f"state: expected one of the format {STATE_FORMAT}, found {found!r}")
        try:
            run, alarm = _run_of(state["run"]), CollapseAlarm(**state["alarm"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"state: expected what `state_dict` returned, found something else ({error_text(error)})"
            ) from error
        self._run, self._alarm = run, alarm

    def replay(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Go on from what an earlier training has logged: curves and forecast as if it had not been interrupted.

        Args:
            entries: one per probe in the order of their `step`, with numbers by the names of `LIVE_KEYS` and
                `LIVE_NUMBERS`. What is absent in one is taken as not known.
        """
        for given in entries:
            entry = dict(given)
            if "verdict_code" in entry:
                entry.setdefault("verdict", WORDS[int(entry["verdict_code"])])
            for name in ("deltaH1", "deltaH_true"):
                for suffix in ("", "_tok"):
                    change, se = entry.get(f"{name}{suffix}"), entry.get(f"{name}{suffix}_se")
                    if change is not None and se is not None:
                        self._sum(f"{name}{suffix}").advance(entry["step"], change, se, self._momentum())
            if entry.get("collapse_entropy") is not None:
                self._run.threshold = entry["collapse_entropy"]
            needed = [entry[name] for name in READING if entry.get(name) is not None]
            if len(needed) == len(READING):
                self._add_reading(EntropyReading(entry["step"], *needed))
            self._run.history.append(entry)

    # ---------------------------------------------------------------- hooks

    @_out_of_dynamo
    def _on_pre_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before a step of an optimizer: an update begins, unless another optimizer has begun it."""
        with self._hook():
            if self._in_update and id(optimizer) not in self._waiting:
                # a second step of one optimizer: the others take no part in this update
                self._end_update(late=True)
            if not self._in_update and self.active:
                self._begin_update()
            self._waiting.discard(id(optimizer))

    @_out_of_dynamo
    def _on_post_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After a step: the update is over when every optimizer has had its turn."""
        with self._hook():
            if self._in_update and not self._waiting:
                self._end_update()
                self._seen_versions = self._versions()
                if self._early and self.active:
                    self._draw(self._run.step + 1)

    @_out_of_dynamo
    def _on_any_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After a step of any optimizer: one that is not watched may have taken a watched one's place."""
        if (
            not self.active
            or self._in_update
            or id(optimizer) in self._foreign
            or optimizer in self.optimizers
        ):
            return
        watched = {id(p) for p in self._probe.parameters.values()}
        if watched.isdisjoint(moved_parameters([optimizer])):
            return
        self._foreign.add(id(optimizer))
        say(
            f"an optimizer that is not watched ({type(optimizer).__name__}) has moved watched parameters: was it "
            "replaced after the probe was attached? Its steps are not probed; attach the probe to it",
            warn=True,
        )

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
            self._say_cost()
        self._run.step += 1
        self._in_update, self._waiting = True, {id(o) for o in self.optimizers}
        now_versions = self._versions()
        self._moved_before = {i for i, v in now_versions.items() if self._seen_versions.get(i, v) != v}
        if not self._early:
            self._draw(self._run.step)
        self._seen_versions = self._versions()
        self._step_started = time.perf_counter()

    def _draw(self, number: int) -> None:
        """Draw E for an update and copy the parameters, where it is to be probed."""
        self._seconds = 0.0
        if self._before is None and self.schedule.due(number):
            _finish_queue(self.model)
            start = time.perf_counter()
            self._before = self._guarded(lambda: self._prepare(number))
            _finish_queue(self.model)
            self._seconds = time.perf_counter() - start

    def _prepare(self, number: int) -> Before:
        """E and the copies, of the parameters as they are trained now."""
        with undisturbed(self.model):
            self._adapters.use()
            self._adopt_parameters()
            return self._probe.before(number)

    def _versions(self) -> dict[int, int]:
        """How often each watched parameter was written to."""
        return {id(p): p._version for p in self._probe.parameters.values() if not p.is_inference()}

    def _moved_outside(self) -> bool:
        """Whether parameters were written to before this step, and left alone by the step itself."""
        now = self._versions()
        return any(now.get(i) == self._seen_versions.get(i) for i in self._moved_before)

    def _probe_early(self, why: str) -> None:
        """Probe updates from the end of one step to the end of the next: parameters move outside of `step`."""
        if self._early:
            return
        self._early = True
        say(
            f"{why}: parameters may move outside of optimizer.step (updates fused into the backward pass, LOMO, "
            "layerwise optimizers). An update is probed from the end of one step to that of the next, and the copy of "
            "the parameters is kept all that time",
            warn=True,
        )
        if not self._in_update:
            self._draw(self._run.step + 1)

    def _adopt_parameters(self) -> None:
        """Parameters may have been unfrozen, added or replaced since the last probe."""
        known = self._probe.parameters
        moved = moved_parameters(self.optimizers)
        # what was trainable once is kept: Lightning freezes one optimizer's parameters while another takes its step
        found = {
            name: p
            for name, p in self.model.named_parameters()
            if id(p) in moved and (p.requires_grad or name in known)
        }
        if not found:
            raise ConfigError(
                "optimizer: expected the trained parameters in it, found none of them any more (its groups were "
                "emptied, or the model's parameters replaced); attach the probe again, to what is trained now"
            )
        if {name: id(p) for name, p in found.items()} != {name: id(p) for name, p in known.items()}:
            say(f"the trained parameters have changed: {len(found)} tensors are watched now")
            self._probe.parameters = found

    def _end_update(self, late: bool = False) -> None:
        self._in_update = False
        before, self._before = self._before, None
        if not self._early and self._moved_outside():
            before = None  # drawn too late: the parameters had moved already
            self._probe_early(f"step {self._run.step} has left alone what had moved before it")
        if before is not None:
            _finish_queue(self.model)
        step_seconds = time.perf_counter() - self._step_started
        alarm = None
        if before is not None:
            alarm = self._guarded(lambda: self._conclude(before, late or self._early))
        # the optimizer's own time belongs to the training step that ends here
        self._resumed = time.perf_counter() - step_seconds
        if alarm is not None:
            self._act_on(alarm)

    def _conclude(self, before: Before, late: bool) -> Alarm | None:
        """What the step did, its entry in the history and the log, and the alarm that it raises."""
        start = time.perf_counter()
        with undisturbed(self.model):
            self._adapters.use()
            outcome = self._probe.after(before, self.optimizers, late)
        if not outcome.moved and not self._early and self._may_have_moved():
            self._probe_early(f"step {self._run.step} has changed nothing, at a learning rate above 0")
            return None
        entry, found = self._enter(outcome)
        self._seconds += time.perf_counter() - start
        self.schedule.add_probe(self._seconds)
        entry["seconds"] = self._seconds
        entry |= {"cost_share": self.schedule.share, "every": self.schedule.interval}
        self._say(entry, outcome.values)
        self._send(entry)
        self._watch_for_standstill(outcome)
        return self._raised(found, entry)

    def _may_have_moved(self) -> bool:
        """Whether a step of exactly 0 may be one whose update was made before it, and whose gradients are used up."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        rate = max((learning_rate(group.get("lr")) or 0.0 for group in groups), default=0.0)
        return rate > 0 and all(p.grad is None for p in self._probe.parameters.values())

    def _guarded(self, part: Callable[[], Any]) -> Any:
        """Run a part of the probe; an error ends the probe, not the training."""
        try:
            with in_own_words():
                return part()
        except Exception as error:
            self.detach()
            self.error = error
            if self.settings.strict:
                raise
            say(
                f"switched off at step {self._run.step}, training goes on: {error_text(error)}\n"
                f"{traceback.format_exc()}",
                warn=True,
            )
            _let_go(error)
            return None

    # ---------------------------------------------------------------- results

    def _enter(self, outcome: Outcome) -> tuple[dict[str, Any], Forecast | None]:
        """Add an outcome to the history, and look ahead."""
        step = self._run.step
        entry = {"step": step, **flat_values(outcome.values)}
        entry |= self._cumulative(outcome, step)
        found = self._ahead(outcome, step)
        steps = (None, None, None) if found is None else (found.steps, found.low, found.high)
        entry |= {
            "collapse_entropy": self._run.threshold,
            **dict(zip(STEPS, steps, strict=True)),
            "entropy_rate": None if found is None else found.rate,
            "outlook": outlook(found, self.settings.horizon),
        }
        self._run.history.append(entry)
        return entry, found

    def _send(self, entry: dict[str, Any]) -> None:
        """Log an entry. A log that fails is not used again; the probe goes on."""
        if self._log is None:
            return
        try:
            with isolated_rng():  # loggers draw names for files and runs
                self._log(scalars(entry), entry["step"])
        except Exception as error:
            if self.settings.strict:
                raise
            self._log = None
            say(
                f"the log failed at step {entry['step']} and is not used any more ({error_text(error)}); "
                "the numbers are still in `history`",
                warn=True,
            )

    def _watch_for_standstill(self, outcome: Outcome) -> None:
        """Warn where the parameters seem to move outside of `optimizer.step`."""
        self._still = 0 if outcome.moved else self._still + 1
        if self._still == STILL_STEPS:
            say(
                f"{STILL_STEPS} probed steps in a row have changed nothing: a learning rate of 0, gradients of 0, "
                "steps below the resolution of 16-bit weights, or an optimizer that moves parameters outside of its "
                "step (in gradient hooks, say), which the probe does not see",
                warn=True,
            )

    def _sum(self, name: str) -> CumulativeSum:
        """The cumulative sum of a quantity."""
        return self._run.sums.setdefault(name, CumulativeSum())

    def _add_reading(self, reading: EntropyReading) -> None:
        """Keep what the forecast is made from."""
        readings = [*self._run.readings, reading]
        oldest = reading.step - WINDOW_HORIZONS * self.settings.horizon
        recent = [one for one in readings[:-LEAST_WINDOW] if one.step >= oldest]
        self._run.readings = [*recent, *readings[-LEAST_WINDOW:]][-self.settings.window :]

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
                sums = self._sum(f"{name}{suffix}")
                total, se = sums.advance(step, change.value, change.se, self._momentum())
                found |= {f"cumulative_{name}{suffix}": total, f"cumulative_{name}{suffix}_se": se}
                found[f"{level}{suffix}"] = start + total
            found[f"cumulative_H{suffix}"] = H.value - start
            found[f"cumulative_H{suffix}_se"] = math.hypot(H.se, spread) if self._run.history else 0.0
        return found

    def _ahead(self, outcome: Outcome, step: int) -> Forecast | None:
        """The forecast after this probe; None with fewer than three that moved."""
        run, H, change = self._run, outcome.H[1], outcome.deltaH_true[1]
        if run.threshold is None:
            given = self.settings.collapse_entropy
            run.threshold = (
                self.settings.collapse_fraction * max(H.value, SMALLEST_ENTROPY) if given is None else given
            )
        if outcome.moved:
            level = max(H.value, SMALLEST_ENTROPY)
            self._add_reading(EntropyReading(step, level, H.se, change.value, change.se))
        return forecast(run.readings, run.threshold, self.settings.window, momentum=self._momentum())

    def _momentum(self) -> float:
        """The largest decay of a gradient average: what correlates the updates of neighbouring steps."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        rates = [learning_rate(g["betas"][0] if g.get("betas") else g.get("momentum")) or 0.0 for g in groups]
        return max(rate for rate in [*rates, 0.0] if rate < 1.0)

    def _raised(self, found: Forecast | None, entry: dict[str, Any]) -> Alarm | None:
        """A new alarm, with its warning; None where there is none."""
        step = self._run.step
        if found is None or not self._alarm.update(found, step):
            return None
        message = alarm_line(entry, found.threshold, self.settings.horizon)
        entry["alarm"] = True
        say(message, warn=True)
        stop = self._request_stop
        return Alarm(step, message, found, entry, self.model, self.optimizers, stop, self.schedulers)

    def _act_on(self, alarm: Alarm) -> None:
        """Do what the user wants done; exceptions of a user's function are the user's."""
        if self._on_alarm == "stop":
            alarm.stop()
        elif callable(self._on_alarm):
            self._on_alarm(alarm)

    def _request_stop(self) -> None:
        self.should_stop = True

    def _say(self, entry: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """One line per probe; with the first reason where the verdict has changed for the worse."""
        line = probe_line(entry)
        if entry["verdict"] not in ("trustworthy", self._said_verdict):
            line += f" [{entry['verdict_reasons'][0]}]"
        self._said_verdict = entry["verdict"]
        say(line)
        timing = dict(values["timing"])
        timing["other"] = max(entry["seconds"] - sum(timing.values()), 0.0)
        self._cost_of = (values["B_E"], values["avg_generation_length"], timing)

    def _say_cost(self) -> None:
        """The cost model, once a probe and a training step have been timed."""
        if self._cost_of is None or self._cost_said:
            return
        self._cost_said = True
        say(cost_line(self.schedule, *self._cost_of))


def _run_of(state: Mapping[str, Any]) -> _Run:
    """What a watch had seen, from its `state_dict`.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not what `state_dict` returned.
    """
    run = dict(state)
    run["readings"] = [EntropyReading(**reading) for reading in run["readings"]]
    run["sums"] = {name: CumulativeSum(**found) for name, found in run["sums"].items()}
    run["history"] = [dict(entry) for entry in run["history"]]
    for entry in run["history"]:
        _require_numbers(entry["step"], entry["H_orig"], entry["H_orig_tok"])
    for reading in run["readings"]:
        _require_numbers(*asdict(reading).values())
    found = _Run(**run)
    check_first_step(found.step)
    if found.threshold is not None:
        _require_numbers(found.threshold)
    return found


def _require_numbers(*values: Any) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"expected a number, found {value!r}")


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of an exception hold: copies of parameters, activations."""
    while error is not None:
        if error.__traceback__ is not None:
            traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


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
        >>> watch.last["deltaH_true_tok"], watch.last["outlook"]  # doctest: +SKIP
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
