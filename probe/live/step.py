"""One probed optimizer step: E is drawn before it; what it did to the policy's entropy is worked out after it.

    before    sample E from the policy, copy the trainable parameters
    (the host's optimizer takes its step)
    after     step = new - old; deltaH1 by forward mode at the old parameters, deltaH_true by rescoring E at the new

The step is whatever the optimizer did: its rule, clipping, decay, fused kernels and all. Nothing is written to the
model: passes at the old parameters use `probe.snapshot.standing_in`. Parts of sharded parameters alone are moved for a
pass, and put back bitwise (`probe.distributed.lockstep`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from probe.distributed.ranks import ALONE, Ranks
from probe.errors.exceptions import ProbeError, RolloutError
from probe.estimators.step_parts import StepParts, step_parts
from probe.finite import require_finite_moments
from probe.live.attribution import TokenChanges, UpdateOf, token_changes, token_entropy_gradient
from probe.live.optimizers import largest_rate
from probe.live.outcome import (
    Before,
    Outcome,
    outcome_of_no_step,
    outcome_of_step,
    refuse_merged,
    step_taken,
)
from probe.live.parts import PartChanges, part_changes
from probe.live.ranks import same_parts
from probe.live.rehearsal import rehearsed_way
from probe.live.say import say
from probe.live.settings import WatchSettings
from probe.live.source import Source
from probe.parameters import norm
from probe.phases.controls import Controls, controls_of_prediction, fitted_controls, too_few_prompts
from probe.phases.fit_memory import FitMemory
from probe.phases.ground_truth import measured_change, with_noise_floor
from probe.phases.passes import AlongStep, StepOnBatch, Way, along_step
from probe.phases.prediction import predict
from probe.rollouts.draw import stream_seed
from probe.rollouts.sampling import check_sampling
from probe.scoring.features import feature_basis
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from probe.scoring.traffic import Traffic
from probe.shards import nonzero
from probe.snapshot import copied
from probe.text import error_text
from probe.timing import Clock

TOO_LATE = "the step was known to be over only when the next one began"
UNTRIED = Way("jvp", "not tried yet")


@dataclass
class UpdateProbe:
    """Probes optimizer steps of one policy.

    Attributes:
        model: the policy, unwrapped.
        parameters: the trainable parameters that the optimizers move, by name.
        source: where E comes from.
        settings: how.
        way: to differentiate; chosen by `rehearse`.
        memory: what earlier probes taught the control variates.
        check_scale: the `StepCheck.scale` of the last probe.
        responses: in the next E; None takes as many as the settings say.
        traffic: of all probes.
        ranks: the processes that probe together, each with the whole policy.
        update_of: gives the batch of the training's own update; None where nobody asked which of its tokens did it.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    source: Source
    settings: WatchSettings
    way: Way = UNTRIED
    memory: FitMemory | None = None
    check_scale: int = 0
    responses: int | None = None
    traffic: Traffic = field(default_factory=Traffic)
    ranks: Ranks = ALONE
    update_of: UpdateOf | None = None

    @property
    def size(self) -> int:
        """Responses in the next E."""
        return self.responses or self.settings.B_E

    @property
    def policy(self) -> Policy:
        """The policy at the parameters it has now."""
        own = self.settings
        return Policy(
            model=self.model,
            temperature=own.temperature,
            microbatch_size=None if own.microbatch_size == "auto" else own.microbatch_size,
            head_chunk_tokens=own.head_chunk_tokens,
            traffic=self.traffic,
            ranks=self.ranks,
        )

    @property
    def mode(self) -> str:
        """How deltaH1 is differentiated: `jvp` or `finite_difference`."""
        return self.way.mode

    def rehearse(self) -> None:
        """Sample a few tokens, try the longest responses, and find out how this model can be differentiated.

        Raises:
            ProbeError: something that every probe needs does not work with this model.
        """
        try:
            self.way = rehearsed_way(self.policy, self.source, self.settings)
        except ProbeError:
            raise
        except Exception as error:  # the model's own code raises what it likes
            raise ProbeError(
                "model: expected one that samples and scores a few tokens when the probe is attached, found "
                f"{' '.join(error_text(error).split())[:300]}; make `model.generate` and a forward of a batch of "
                "padded prompts run on this model, or train without the probe"
            ) from error

    def before(self, number: int) -> Before:
        """Draw E from the policy, and copy the parameters.

        Args:
            number: of the optimizer step that comes next, from 1: every step has random numbers of its own.
        """
        start, settings = time.perf_counter(), self.settings
        E, seen = self.source.draw(self.policy, number, self.size)
        if not bool(E.mask.any()):
            raise RolloutError(f"expected at least one response token, found {len(E)} empty responses")
        X = None if self.update_of is None else token_entropy_gradient(self.policy, E)
        old = copied(self.parameters, settings.snapshot_device)
        return Before(number, E, seen, old, time.perf_counter() - start, X)

    def after(
        self, before: Before, optimizers: Sequence[torch.optim.Optimizer], late: bool = False
    ) -> Outcome:
        """Work out what the step did.

        Args:
            before: from `before`.
            optimizers: those that took the step, their gradients still there.
            late: the gradients may be those of the next step already, so that the parts of this one are not known.

        Raises:
            NumericalError: the step, a moment of the optimizers or a score is not finite.
        """
        clock = Clock()
        require_finite_moments(optimizers, self.parameters.items())
        refuse_merged(self.model)
        E, step = before.E, step_taken(self.parameters, before.old)
        policy, rate = self.policy.at(before.old), largest_rate(optimizers, self.parameters)
        if not nonzero(*step.values()):
            return outcome_of_no_step(before, score_tokens(policy, E), rate)
        basis = None if self.memory is None else self.memory.basis
        on = StepOnBatch(policy, E, step, after=self.policy.point(step), basis=basis)
        with clock.measures("derivative"):
            passes = self._differentiate(on)
        if before.seen is not None:
            check_sampling(self.policy, before.seen, passes.scores)
        with clock.measures("rescoring"), passes.way.kernels(policy):
            new = passes.new or score_tokens(self.policy, E)
        # a rate of 0 with a step that is not 0 leaves bars_dot undefined
        prediction = predict(passes, E.group, rate or math.nan)
        controls, note = self._controls(before, passes)
        if controls is None:
            prediction = replace(prediction, control_variates=note)
        else:
            prediction = prediction.with_control_variates(
                controls_of_prediction(controls, passes, E.group), note
            )
        truth = measured_change(passes.scores, new, E.group, controls=controls)
        shares: PartChanges | None = None
        tokens: TokenChanges | None = None
        if self.settings.shares or self.update_of is not None:
            with clock.measures("shares"), passes.way.kernels(policy):
                parts = TOO_LATE if late else self._parts(before.old, optimizers, step)
                if self.settings.shares:
                    memory = None if controls is None else self.memory
                    shares = part_changes(parts, on, passes, prediction, memory, draw_name(before))
        if self.update_of is not None and before.X is not None:
            with clock.measures("attribution"):
                tokens = token_changes(
                    policy, before.X, parts, step, passes, self.update_of, self.source.tokenizer
                )
        wanted = self.settings.noise_floor
        if wanted == "on" or (wanted == "auto" and policy.half_precision):
            with clock.measures("noise_floor"), passes.way.kernels(policy):
                seed = stream_seed(self.settings.seed, f"sham step {before.number}")
                truth = with_noise_floor(truth, policy, E, passes.scores, step, seed)
        return outcome_of_step(
            before,
            prediction,
            truth,
            rate,
            policy.half_precision,
            norm(step),
            clock.seconds,
            shares,
            tokens,
        )

    # ---------------------------------------------------------------- parts

    def _parts(
        self,
        old: Mapping[str, Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        step: Mapping[str, Tensor],
    ) -> StepParts | str:
        """The parts of the step, or why there are none."""
        keep_map = self.update_of is not None
        return same_parts(self.ranks, step_parts(optimizers, self.parameters, old, step, keep_map))

    def _differentiate(self, on: StepOnBatch) -> AlongStep:
        """E's scores and their derivatives along the step.

        What forward mode gives is compared with differences of forwards; where these contradict it, they take its
        place from here on, unless forward mode was asked for.
        """
        binding = self.settings.derivative == "jvp"
        passes = along_step(on, self.way, binding=binding, check_scale=self.check_scale)
        if passes.check is not None:
            self.check_scale = passes.check.scale
        if passes.way != self.way:
            self.way = passes.way
            say(f"deltaH1 by {self.way.mode} from here on: {self.way.reason}", warn=True)
        return passes

    def _controls(self, before: Before, passes: AlongStep) -> tuple[Controls | None, str]:
        """Control variates for this step, or why there are none.

        Features must not depend on the E they are used on: those of the first probe's E serve from the second on.
        """
        if not self.settings.control_variates:
            return None, "off: control_variates"
        if too_few := too_few_prompts(len(before.E)):
            return None, f"off: {too_few}"
        if self.memory is None:
            basis = feature_basis(self.model, before.E)
            if basis is None:
                return None, "off: the output layer has no dense weight"
            self.memory = FitMemory(basis, policy="live")
            return None, "off: the first probe, whose responses make the features of the next ones"
        controls = fitted_controls(before.E, passes, self.memory, draw_name(before))
        self.memory = controls.learnt
        return controls, f"on: fitted on other prompts and {controls.earlier} earlier probes"


def draw_name(before: Before) -> str:
    """Where an E comes from; those of different steps are independent draws."""
    return f"step {before.number}"
