"""One probed optimizer step: E is drawn before it; what it did to the policy's entropy is worked out after it.

    before    sample E from the policy, copy the trainable parameters
    (the host's optimizer takes its step)
    after     step = new - old; deltaH1 by forward mode at the old parameters, deltaH_true by rescoring E at the new

The step is whatever the optimizer did: its rule, clipping, decay, fused kernels and all. Nothing is written to the
model: passes at the old parameters use `probe.snapshot.standing_in`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from probe.data.batch import PromptExample, RolloutBatch
from probe.errors.exceptions import NumericalError, ProbeError, RolloutError
from probe.estimators.control_variates import SMALLEST_SAMPLE, SMALLEST_TAUGHT, control_variates
from probe.estimators.estimate import Estimate, shrinkage
from probe.estimators.forward_mode_check import forward_mode_check
from probe.estimators.ground_truth import GroundTruth, measure
from probe.estimators.noise_floor import rescored_noise_floor
from probe.estimators.prediction import Prediction, from_tokens, token_first_order
from probe.estimators.step_check import StepCheck, step_check, stopped_gradients
from probe.estimators.step_parts import step_parts
from probe.finite import require_finite_moments
from probe.live.optimizers import learning_rate
from probe.live.outcome import (
    Before,
    Outcome,
    directions,
    entropies,
    judged,
    levels,
    part_values,
    with_influence,
)
from probe.live.say import say
from probe.live.settings import WatchSettings
from probe.parameters import norm
from probe.phases.fit_memory import FitMemory
from probe.results.changes import changes
from probe.results.diagnostics import batch_diagnostics, derivative_diagnostics, ground_truth_diagnostics
from probe.rollouts.draw import draw_prompts, stream_seed
from probe.rollouts.sampling import check_sampling, sample_rollouts
from probe.scoring.differences import choose_scale, difference_pair
from probe.scoring.differentiable import forward_mode_kernels
from probe.scoring.features import FeatureBasis, feature_basis
from probe.scoring.forward_mode import scores_and_tangents
from probe.scoring.microbatch import first_microbatch
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from probe.scoring.scores import TokenScores, TokenTangents
from probe.snapshot import copied
from probe.text import error_text
from probe.timing import Clock

REHEARSAL_RESPONSES, REHEARSAL_TOKENS = 2, 16
"""Size of the trial when attaching."""


@dataclass
class UpdateProbe:
    """Probes optimizer steps of one policy.

    Attributes:
        model: the policy, unwrapped.
        parameters: the trainable parameters that the optimizers move, by name.
        tokenizer: a tokenizer of the probe's own.
        prompts: what E's prompts are drawn from, with replacement.
        settings: how.
        mode: `jvp` or `finite_difference`; chosen by `rehearse`.
        reason: why.
        memory: what earlier probes taught the control variates.
        check_scale: the `StepCheck.scale` of the last probe.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    tokenizer: Any
    prompts: Sequence[PromptExample]
    settings: WatchSettings
    mode: str = "jvp"
    reason: str = ""
    memory: FitMemory | None = field(default=None)
    check_scale: int = 0

    @property
    def policy(self) -> Policy:
        """The policy at the parameters it has now."""
        return Policy(
            model=self.model,
            temperature=self.settings.temperature,
            microbatch_size=self.settings.microbatch_size,
            head_chunk_tokens=self.settings.head_chunk_tokens,
        )

    def rehearse(self) -> None:
        """Sample and score a few tokens, and find out how this model can be differentiated.

        Raises:
            ProbeError: something that every probe needs does not work with this model.
        """
        try:
            self._try_out()
        except ProbeError:
            raise
        except Exception as error:  # the model's own code raises what it likes
            raise ProbeError(
                "model: expected one that samples and scores a few tokens when the probe is attached, found "
                f"{' '.join(error_text(error).split())[:300]}; make `model.generate` and a forward of a batch of "
                "padded prompts run on this model, or train without the probe"
            ) from error

    def _try_out(self) -> None:
        """See `rehearse`."""
        settings, policy = self.settings, self.policy
        longest = max(self.prompts, key=lambda prompt: len(prompt.text))
        few = replace(settings.generation, max_new_tokens=min(settings.max_new_tokens, REHEARSAL_TOKENS))
        examples = [longest, self.prompts[0]][:REHEARSAL_RESPONSES]
        seed = stream_seed(settings.seed, "rehearsal")
        E, seen = sample_rollouts(policy, self.tokenizer, examples, few, seed)
        check_sampling(policy, seen, score_tokens(policy, E))
        if settings.derivative == "finite_difference":
            self.mode, self.reason = "finite_difference", "as configured"
            return
        check = forward_mode_check(policy, E)
        self.mode, self.reason = "jvp" if check.usable else "finite_difference", check.reason
        if settings.derivative == "jvp" and not check.usable:
            raise NumericalError(
                f"derivative: expected a model that allows jvp, found that {check.reason}; use auto or "
                "finite_difference, or load the model with attn_implementation eager"
            )

    def before(self, number: int) -> Before:
        """Draw E from the policy, and copy the parameters.

        Args:
            number: of the optimizer step that comes next, from 1: every step has random numbers of its own.
        """
        start, settings = time.perf_counter(), self.settings
        index, _ = draw_prompts(
            len(self.prompts), settings.B_E, 0, False, stream_seed(settings.seed, f"prompts {number}")
        )
        chosen = [self.prompts[i] for i in index]
        seed = stream_seed(settings.seed, f"E {number}")
        E, seen = sample_rollouts(self.policy, self.tokenizer, chosen, settings.generation, seed)
        if not bool(E.mask.any()):
            raise RolloutError(f"expected at least one response token, found {len(E)} empty responses")
        old = copied(self.parameters, settings.snapshot_device)
        return Before(number, E, seen, old, time.perf_counter() - start)

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
        self._refuse_merged()
        E, step = before.E, self._step(before.old)
        policy_old = self.policy.at(before.old)
        if not any(bool(change.any()) for change in step.values()):
            return self._no_step(before, policy_old, optimizers)
        with clock.measures("derivative"):
            tangent_of, scores, tangents, checked = self._differentiate(policy_old, E, step)
        check_sampling(self.policy, before.seen, scores)
        with clock.measures("rescoring"), tangent_of.kernels():
            new = tangent_of.new_scores or score_tokens(self.policy, E)
        prediction, earlier = self._prediction(E, scores, tangents, optimizers), self._earlier(before)
        truth = measure(scores, new, E.group)
        Z = self._control_variates(E, scores, tangents, earlier, before.number)
        if Z is None:
            prediction = replace(prediction, control_variates=self._why_no_control_variates(earlier))
        else:
            note = f"on: fitted on other prompts and {len(earlier)} earlier probes"
            # as much of them for both as the measurement shares the noise of, so that their difference stays that on E
            Z = [z.scaled(shrinkage(e, z)) for e, z in zip(truth.estimates["per_decision"], Z, strict=True)]
            prediction = prediction.with_control_variates(Z, note)
            truth = truth.with_control_variates(Z, reported=True)
        prediction = replace(
            prediction,
            difference_scale=tangent_of.scale,
            difference_error=tangent_of.scale_error,
            step_difference=None if checked is None else checked.difference,
            step_difference_error=None if checked is None else checked.error,
        )
        shares: dict[str, Any] = {}
        if self.settings.shares and late:
            shares = {"shares_reason": "the step was known to be over only when the next one began"}
        elif self.settings.shares:
            with clock.measures("shares"), tangent_of.kernels():
                shares = self._shares(before, step, optimizers, scores, tangent_of, prediction, Z is not None)
        if self.settings.noise_floor == "on" or (
            self.settings.noise_floor == "auto" and policy_old.half_precision
        ):
            with clock.measures("noise_floor"), tangent_of.kernels():
                seed = stream_seed(self.settings.seed, f"sham step {before.number}")
                floor = rescored_noise_floor(policy_old, E, scores, step, seed)
            truth = replace(truth, noise_floor=floor)
        if self.settings.control_variates and self.memory is None:
            self._found_memory(E)
        values = {
            **self._values(before, prediction, truth, scores, optimizers),
            **shares,
            "step_norm": norm(step),
        }
        values["timing"] = {"sample": before.seconds, **clock.seconds}
        first = prediction.estimates[prediction.reported]
        return Outcome(
            values=judged(values),
            H=entropies(scores, E),
            deltaH1=(
                Estimate(prediction.deltaH1, first[0].influence),
                Estimate(prediction.deltaH1_tok, first[1].influence),
            ),
            deltaH_true=(truth.sequence, truth.token),
            moved=True,
        )

    # ---------------------------------------------------------------- parts

    def _differentiate(
        self, policy: Policy, E: RolloutBatch, step: Mapping[str, Tensor]
    ) -> tuple[_Tangents, TokenScores, TokenTangents, StepCheck | None]:
        """E's scores and their derivatives along the step.

        What forward mode gives is compared with differences of forwards; where these contradict it, they take its
        place from here on, unless forward mode was asked for.
        """
        basis = None if self.memory is None else self.memory.basis
        tangent_of = _Tangents(policy, E, step, self.mode)
        with tangent_of.kernels():
            scores, tangents = tangent_of.step(basis, self.policy)
            if self.mode != "jvp":
                return tangent_of, scores, tangents, None
            checked = step_check(policy, E, scores, step, tangents, self.check_scale)
        self.check_scale = checked.scale
        if not checked.contradicted or self.settings.derivative == "jvp":
            return tangent_of, scores, tangents, checked
        self.mode, self.reason = "finite_difference", stopped_gradients(checked)
        say(f"deltaH1 by finite_difference from here on: {self.reason}", warn=True)
        return self._differentiate(policy, E, step)

    def _refuse_merged(self) -> None:
        """An adapter that is in its base's weights has no influence of its own, and would seem to change nothing.

        Raises:
            NumericalError: one is.
        """
        merged = [
            name
            for name, module in self.model.named_modules()
            if getattr(module, "merged", False) is True and any(p.requires_grad for p in module.parameters())
        ]
        if merged:
            raise NumericalError(
                f"expected the adapter beside its base, found it merged into {merged[0]} ({len(merged)} layers in all) "
                "after the optimizer's step; unmerge it (unmerge_adapter) before optimizer.step()"
            )

    def _step(self, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`theta_new - theta_old`, in float32 or better, where the old parameters are kept."""
        step = {}
        for name, p in self.parameters.items():
            wide = torch.promote_types(p.dtype, torch.float32)
            step[name] = p.detach().to(old[name].device, wide) - old[name].to(wide)
            if not bool(torch.isfinite(step[name]).all()):
                raise NumericalError(
                    f"expected a finite optimizer step, found NaN or infinity in that of {name}"
                )
        return step

    def _no_step(
        self, before: Before, policy: Policy, optimizers: Sequence[torch.optim.Optimizer]
    ) -> Outcome:
        """A step of exactly 0: a learning rate of 0 in a warm-up, or gradients of 0."""
        scores = score_tokens(policy, before.E)
        H = entropies(scores, before.E)
        nothing = Estimate(0.0, torch.zeros_like(H[0].influence))
        values = {
            "verdict": "unresolved",
            "verdict_reasons": ["The optimizer's step was exactly 0 (learning rate 0, or gradients of 0)."],
            **levels(H),
            **{f"{name}{suffix}": 0.0 for name in ("deltaH1", "deltaH_true") for suffix in ("", "_tok")},
            "learning_rate": self._learning_rate(optimizers),
            "B_E": len(before.E),
            "avg_generation_length": float(before.E.lengths.double().mean()),
            "step_norm": 0.0,
            "diagnostics": {**batch_diagnostics(before.E), "bias_flags": []},
            "timing": {"sample": before.seconds},
        }
        return Outcome(values, H, (nothing, nothing), (nothing, nothing), moved=False)

    def _prediction(
        self,
        E: RolloutBatch,
        scores: TokenScores,
        tangents: TokenTangents,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> Prediction:
        """DeltaH1 with its errors, without control variates."""
        by_name = {name: token_first_order(scores, tangents, E.group, name) for name in ("causal", "matched")}  # type: ignore[arg-type]
        # a rate of 0 with a step that is not 0 leaves bars_dot undefined
        found = from_tokens(by_name["causal"], self._learning_rate(optimizers) or math.nan)
        return replace(
            found,
            estimates={name: parts.total for name, parts in by_name.items()},
            reported="causal",
            mode=self.mode,
            reason=self.reason,
        )

    def _learning_rate(self, optimizers: Sequence[torch.optim.Optimizer]) -> float | None:
        """The largest learning rate of the groups that hold watched parameters; None where they have none."""
        mine = {id(p) for p in self.parameters.values()}
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = [learning_rate(g.get("lr")) for g in groups if any(id(p) in mine for p in g["params"])]
        return max((rate for rate in rates if rate is not None), default=None)

    # ---------------------------------------------------------------- control variates

    def _earlier(self, before: Before) -> list[Any]:
        """What earlier probes contribute to the fit; E's of different steps are independent draws."""
        return [] if self.memory is None else self.memory.earlier_than(before.E, f"step {before.number}")

    def _control_variates(
        self,
        E: RolloutBatch,
        scores: TokenScores,
        tangents: TokenTangents,
        earlier: Sequence[Any],
        number: int,
    ) -> list[Estimate] | None:
        """`[mean Z_seq, mean Z_tok]` for this step; None where they are off or not worth it yet."""
        if self.memory is None or scores.state_features is None:
            return None
        fitted = control_variates(scores, tangents, self.memory.basis.sampled(E), E.group, list(earlier))
        self.memory.add(E, fitted.statistics, f"step {number}")
        return fitted.means(scores, E.group) if self._enough(earlier) else None

    def _enough(self, earlier: Sequence[Any]) -> bool:
        """Whether E and what earlier ones taught are enough for errors that can be believed."""
        return (SMALLEST_TAUGHT if earlier else SMALLEST_SAMPLE) <= self.settings.B_E

    def _why_no_control_variates(self, earlier: Sequence[Any]) -> str:
        if not self.settings.control_variates:
            return "off: control_variates"
        if self.memory is None:
            return "off: the first probe; the next ones learn from it"
        least = SMALLEST_TAUGHT if earlier else SMALLEST_SAMPLE
        return f"off: {self.settings.B_E} prompts in E, they are used from {least} on"

    def _found_memory(self, E: RolloutBatch) -> None:
        """A basis of features from this E, for the ones to come."""
        basis = feature_basis(self.model, E)
        if basis is not None:
            self.memory = FitMemory(basis, policy="live")

    # ---------------------------------------------------------------- shares

    def _shares(
        self,
        before: Before,
        step: Mapping[str, Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        scores: TokenScores,
        tangent_of: _Tangents,
        prediction: Prediction,
        with_control_variates: bool,
    ) -> dict[str, Any]:
        """What momentum and weight decay contribute to deltaH1, and the gradient of this batch: the rest."""
        parts = step_parts(optimizers, self.parameters, before.old, step)
        if isinstance(parts, str):
            return {"shares_reason": parts}
        E, earlier = before.E, self._earlier(before)
        basis = self.memory.basis if self.memory is not None and with_control_variates else None
        rest = list(with_influence(prediction))
        values: dict[str, Any] = {"shares_error": parts.error}
        for name, direction in directions(parts).items():
            of_part = [Estimate(0.0, torch.zeros_like(e.influence)) for e in rest]
            if any(bool(x.any()) for x in direction.values()):
                tangents = tangent_of.along(direction, basis)
                of_part = list(token_first_order(scores, tangents, E.group).total)
                if basis is not None:
                    psi = basis.sampled(E)
                    Z = control_variates(scores, tangents, psi, E.group, earlier).means(scores, E.group)
                    of_part = [e - z for e, z in zip(of_part, Z, strict=True)]
            rest = [all_ - part for all_, part in zip(rest, of_part, strict=True)]
            values |= part_values(name, of_part, prediction)
        return values | part_values("gradient", rest, prediction)

    # ---------------------------------------------------------------- values

    def _values(
        self,
        before: Before,
        prediction: Prediction,
        truth: GroundTruth,
        scores: TokenScores,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> dict[str, Any]:
        """The mapping of names to numbers."""
        E = before.E
        flags = [*E.bias_flags, *(["half_precision"] if self.policy.half_precision else [])]
        return {
            **changes(prediction, truth).as_mapping(),
            **levels(entropies(scores, E)),
            "learning_rate": self._learning_rate(optimizers),
            "B_E": len(E),
            "avg_generation_length": float(E.lengths.double().mean()),
            "diagnostics": {
                **batch_diagnostics(E),
                **ground_truth_diagnostics(truth),
                **derivative_diagnostics(prediction),
                "bias_flags": flags,
            },
        }


class _Tangents:
    """Derivatives of E's scores along directions at one point, by the way that this model allows."""

    def __init__(self, policy: Policy, E: RolloutBatch, step: Mapping[str, Tensor], mode: str) -> None:
        """Args: `policy` at the old parameters, `E`, the optimizer's `step`, and `mode`."""
        self.policy, self.E, self._step, self._mode = policy, E, step, mode
        self.scale: float | None = None
        self.scale_error: float | None = None
        self.new_scores: TokenScores | None = None

    def kernels(self) -> Any:
        """The same kernels for all scores that are compared: forward mode has rules for only some."""
        return forward_mode_kernels(self.policy.model) if self._mode == "jvp" else nullcontext()

    def step(self, basis: FeatureBasis | None, now: Policy) -> tuple[TokenScores, TokenTangents]:
        """Scores, and derivatives along the step.

        Args:
            basis: of the control variates, or None.
            now: the policy at the new parameters, which differences at scale 1 need anyway.
        """
        if self._mode == "jvp":
            return scores_and_tangents(self.policy, self.E, self._step, basis)
        scores = score_tokens(self.policy, self.E, basis=basis)
        few = first_microbatch(self.E, self.policy.microbatch_size)
        self.scale, self.scale_error = choose_scale(self.policy, few, self._step)
        upper = now.point(self._step) if self.scale == 1.0 else None
        pair = difference_pair(self.policy, self.E, self._step, self.scale, self.scale_error, upper, basis)
        if upper is not None:
            self.new_scores = pair.plus
        return scores, pair.tangents

    def along(self, direction: Mapping[str, Tensor], basis: FeatureBasis | None) -> TokenTangents:
        """Derivatives along another direction; differences move as far as along the step."""
        if self._mode == "jvp":
            return scores_and_tangents(self.policy, self.E, direction, basis)[1]
        scale = (self.scale or 1.0) * norm(self._step) / norm(direction)
        return difference_pair(self.policy, self.E, direction, scale, basis=basis).tangents
