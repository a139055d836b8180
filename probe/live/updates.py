"""The updates of a training, probed one after the other: E before, what the update did after, and the time of both.

begin     the training step before it is timed; E is drawn if this update is to be probed
(the host's optimizers take their steps)
end       what they did enters the history, is said and logged, and may raise an alarm
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from probe.distributed.ranks import ALONE, Ranks
from probe.distributed.same import check_same
from probe.errors.exceptions import ConfigError, ForwardCutOffError, in_words_of
from probe.live.adapters import ActiveAdapters
from probe.live.alarm import Alarm, Alarms
from probe.live.batch_size import ProbeSizes
from probe.live.history import History
from probe.live.neutral import undisturbed
from probe.live.optimizers import may_have_moved, momentum, moved_parameters
from probe.live.outcome import Before
from probe.live.outlets import Outlets
from probe.live.ranks import Company
from probe.live.say import say
from probe.live.schedule import Schedule
from probe.live.step import UpdateProbe
from probe.live.writes import OutsideWrites
from probe.text import error_text

Result = TypeVar("Result")
EARLY = (
    "parameters may move outside of optimizer.step (updates fused into the backward pass, LOMO, layerwise optimizers). "
    "An update is probed from the end of one step to that of the next, and the copy of the parameters is kept all that "
    "time"
)
"""What is said of trainings that are probed early."""


class ProbedUpdates:
    """Probes those updates that the schedule chooses.

    Attributes:
        probe: of one update.
        company: what ranks tell each other.
        early: whether updates are probed from the end of one step to that of the next.
        error: the exception that ended the probing, or None.
    """

    def __init__(
        self,
        probe: UpdateProbe,
        optimizers: Sequence[torch.optim.Optimizer],
        history: History,
        schedule: Schedule,
        outlets: Outlets,
        alarms: Alarms,
    ) -> None:
        """Args: `probe` of one update, the `optimizers` that make it, and what takes in its results."""
        self.probe, self.company = probe, Company(probe)
        self.error: BaseException | None = None
        self._optimizers, self._history, self._schedule = optimizers, history, schedule
        self._outlets, self._alarms = outlets, alarms
        outlets.notes.spent = self.spend
        self._adapters = ActiveAdapters(probe.model)
        self._writes = OutsideWrites(probe.parameters)
        self._sizes = ProbeSizes(probe.settings, schedule, history)
        self.early, self._draw_seconds = False, 0.0
        self._drawn: Before | None = None
        self._step_started = time.perf_counter()
        self._resumed: float | None = None

    def rehearse(self) -> None:
        """Try a small probe out.

        Raises:
            ProbeError: something that every probe needs does not work with this model.
        """
        with undisturbed(self.probe.model), in_words_of("training"):
            self.probe.rehearse()
        self._writes.note(self.probe.parameters)

    def begin(self) -> None:
        """An update begins, and with it the training step before it has ended."""
        if self._resumed is not None:
            self._schedule.add_step(time.perf_counter() - self._resumed)
            self._outlets.say_cost()
        self._history.run.step += 1
        self._writes.step_begins(self.probe.parameters)
        if not self.early:
            self._draw(self._history.run.step)
        self._writes.note(self.probe.parameters)
        self._step_started = time.perf_counter()

    def end(self, late: bool) -> None:
        """The update is over.

        Args:
            late: the gradients may be those of the next one already.
        """
        drawn, self._drawn = self._drawn, None
        if not self.early and self._writes.step_left_alone(self.probe.parameters):
            drawn = None  # too late: the parameters had moved already
            self.probe_early(f"step {self._history.run.step} has left alone what had moved before it")
        if drawn is not None:
            _finish_queue(self.probe.model)
        step_seconds = time.perf_counter() - self._step_started
        found = partial(self._conclude, drawn, late or self.early) if drawn is not None else None
        alarms = None if found is None else self._guarded(found)
        # the optimizer's own time belongs to the training step that ends here
        self._resumed = time.perf_counter() - step_seconds
        self._act_on(alarms)

    def note_entropy(self, H: float, step: int) -> None:
        """Take in an entropy that the training has logged itself; see `Watch.note_entropy`."""
        history, start = self._history, time.perf_counter()
        if not history.note_logged(step, H) or not history.run.history:
            return
        # an entropy may be noted on one rank alone, which meets nobody for it
        ahead = self._guarded(lambda: history.look_ahead(momentum(self._optimizers)), ALONE)
        self.spend(time.perf_counter() - start)
        if ahead is not None:
            alarms = self._alarms.raised(ahead, history.run.history[-1], history.run.step, probed=False)
            self._act_on(self._outlets.publish_alarms(alarms, history.run.history, probed=False))

    def spend(self, seconds: float) -> None:
        """Count time between two updates as the probe's, not as the training's."""
        self._schedule.probe_seconds += seconds
        self._resumed = None if self._resumed is None else self._resumed + seconds

    def between(self) -> None:
        """The update has ended, and nothing of the next one has begun."""
        self._writes.note(self.probe.parameters)
        if self.early:
            self._draw(self._history.run.step + 1)

    def probe_early(self, why: str, agreed: bool = False) -> None:
        """Probe updates from the end of one step to the end of the next: parameters move outside of `step`.

        Args:
            why: what shows it.
            agreed: all ranks know; otherwise they hear of it at the next update.
        """
        if self.early or (not agreed and self.company.suspects(why)):
            return
        self.early = True
        say(f"{why}: {EARLY}", warn=True)
        if self.company.alone or self._resumed is None:
            self._draw(self._history.run.step + 1)

    def forget(self) -> None:
        """Free what was drawn and copied for an update that is not probed to its end."""
        self._drawn = None

    def _draw(self, number: int) -> None:
        """Draw E for an update and copy the parameters, where it is to be probed."""
        due = self._drawn is None and self._schedule.due(number, self._sizes.wanted)
        due = bool(self._guarded(lambda: self.company.agree(due, number), ALONE))
        if self.company.early and not self.early:
            self.probe_early(self.company.suspicion or "another rank has found it", agreed=True)
        elif due:
            _finish_queue(self.probe.model)
            start = time.perf_counter()
            self._drawn = self._guarded(lambda: self._prepare(number))
            _finish_queue(self.probe.model)
            self._draw_seconds = time.perf_counter() - start

    def _prepare(self, number: int) -> Before:
        """E and the copies, of the parameters as they are trained now."""
        with undisturbed(self.probe.model):
            self._adapters.use()
            self._adopt_parameters()
            self.probe.responses = self.probe.ranks.from_first("responses", self._sizes.chosen)
            check_same(self.probe.ranks, self.probe.parameters)
            return self.probe.before(number)

    def _adopt_parameters(self) -> None:
        """Parameters may have been unfrozen, added or replaced since the last probe."""
        known = self.probe.parameters
        moved = moved_parameters(self._optimizers)
        # what was trainable once is kept: Lightning freezes one optimizer's parameters while another takes its step
        trained = {
            name: p
            for name, p in self.probe.model.named_parameters()
            if id(p) in moved and (p.requires_grad or name in known)
        }
        if not trained:
            raise ConfigError(
                "optimizer: expected the trained parameters in it, found none of them any more (its groups were "
                "emptied, or the model's parameters replaced); attach the probe again, to what is trained now"
            )
        if {name: id(p) for name, p in trained.items()} != {name: id(p) for name, p in known.items()}:
            say(f"the trained parameters have changed: {len(trained)} tensors are watched now")
            self.probe.parameters = trained

    def _act_on(self, alarms: list[Alarm] | None) -> None:
        for alarm in alarms or []:
            self._alarms.act_on(alarm)

    def _conclude(self, drawn: Before, late: bool) -> list[Alarm]:
        """What the update did, its entry in the history and the log, and the alarms that it raises."""
        start = time.perf_counter()
        with undisturbed(self.probe.model):
            self._adapters.use()
            outcome = self.probe.after(drawn, self._optimizers, late)
        if not outcome.moved and not self.early and may_have_moved(self.probe.parameters, self._optimizers):
            self.probe_early(f"step {self._history.run.step} has changed nothing, at a learning rate above 0")
            return []
        entry, ahead = self._history.add(outcome, momentum(self._optimizers))
        if len(self._history.run.history) == 1:
            self._alarms.begin(entry)
        entry["seconds"] = self._draw_seconds + (time.perf_counter() - start)
        self._schedule.add_probe(entry["seconds"], entry["step"], outcome.sizes.B_E)
        entry |= {"cost_share": self._schedule.share, "every": self._schedule.interval}
        self._outlets.publish(entry, outcome)
        alarms = self._alarms.raised(ahead, entry, entry["step"])
        return self._outlets.publish_alarms(alarms, self._history.run.history)

    def _guarded(self, part: Callable[[], Result], ranks: Ranks | None = None) -> Result | None:
        """Run a part on all ranks; an error ends the probe on all, and the training where a forward was cut off."""
        try:
            with in_words_of("training"), (ranks or self.probe.ranks).together("probe"):
                return part()
        except Exception as error:
            if ranks is ALONE and not self.company.alone:  # the others do not know of it
                say(f"an entropy was not taken in: {error_text(error)}", warn=True)
                return None
            self.error, self.company.over = error, True
            self.forget()
            if self.probe.settings.strict or isinstance(error, ForwardCutOffError):
                raise
            say(
                f"switched off at step {self._history.run.step}, training goes on: {error_text(error)}\n"
                f"{traceback.format_exc()}",
                warn=True,
            )
            _let_go(error)
            return None


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
