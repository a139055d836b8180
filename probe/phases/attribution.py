"""Phase 4: what every token of U adds to deltaH1 and to the expected reward, and whose doing a state's change is."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.attribution.contributions import Contributions, contributions
from probe.attribution.coupling import Coupling
from probe.attribution.league import LeagueRow, league
from probe.attribution.objectives import combined, objectives
from probe.attribution.predictors import PREDICTORS
from probe.attribution.sums import (
    Sum,
    sums_by_label,
    sums_by_parameter,
    sums_by_prompt,
    sums_by_response,
)
from probe.attribution.token_classes import class_masks, token_labels
from probe.attribution.tokens import UpdateTokens
from probe.attribution.update_spread import spread
from probe.config.losses import TOKEN_MEANS
from probe.data.batch import RolloutBatch
from probe.errors.exceptions import ConfigError, DataError, NumericalError
from probe.estimand import PerEstimand
from probe.estimators.groups import index_groups, sum_per_group
from probe.estimators.losses import loss_weight_parts
from probe.loading.optimizer import LoadedOptimizer
from probe.loading.tokenizer import token_decoder
from probe.phases.coupling import coupled, drawn_responses, drawn_states, influence
from probe.phases.prediction import Predicted
from probe.phases.sample import BatchSource, Sample, evaluation_rewards
from probe.phases.step_in_parts import StepInParts
from probe.phases.update import Update, closed_form
from probe.rollouts.draw import stream_seed
from probe.scoring.collector import MakeProgress, no_progress
from probe.scoring.distribution import expected_discriminator
from probe.scoring.last_layer import last_layer_gradient, last_layer_tangents

logger = logging.getLogger(__name__)

COMPLETENESS_LIMIT = 1e-2
"""Largest relative error of the identity that contributions are checked by, where derivatives are forward mode's; what
differences of forwards leave is reported."""


@dataclass(frozen=True)
class Attribution:
    """What phase 4 found.

    Attributes:
        contributions: of every token of U.
        tokens: U as formulas of the literature see it, with the classes of its tokens.
        labels: the ways to sort U's tokens, see `token_labels`.
        sums: contributions by class, layer and matrix; by response and prompt in `by_response`, `by_prompt`.
        by_response: of every response of U, in its order.
        by_prompt: of every prompt.
        league: predictors of the literature against the exact contributions; empty where nobody asked.
        agreement: relative difference of its deltaH1 and of that of phase 3 with the same weights on the same E.
        rewards: of E, `(B,)`; None where the reward has no part.
        without_reward: why it has none; empty where it has.
        states: coupling of sampled states; None where none were asked for.
        responses: coupling of whole sampled responses of U; None likewise.
        influence: what the tokens of each response of U do to the entropy at the states of sampled responses of E,
            `(n, B_U)` nats; None likewise.
        influence_rows: the responses of E, `(n,)`.
        sd_U: the standard deviation of deltaH1 over update batches, nats; None for a single prompt.
    """

    contributions: Contributions
    tokens: UpdateTokens
    labels: Mapping[str, tuple[Tensor, tuple[str, ...]]]
    sums: Mapping[str, Sequence[Sum]]
    by_response: Sequence[Sum]
    by_prompt: Sequence[Sum]
    league: Sequence[LeagueRow]
    agreement: float
    rewards: Tensor | None
    without_reward: str
    states: Coupling | None
    responses: Coupling | None
    influence: Tensor | None
    influence_rows: Tensor | None
    sd_U: PerEstimand[float] | None


def attribution(
    source: BatchSource,
    sample: Sample,
    update: Update,
    loaded: LoadedOptimizer,
    predicted: Predicted,
    progress: MakeProgress = no_progress,
) -> Attribution:
    """Attribute deltaH1 of the optimizer's step to the tokens of U.

    Args:
        source: policy, configuration, rewards.
        sample: E with its scores, and U.
        update: the step from U.
        loaded: the optimizer at its saved state.
        predicted: deltaH1 with the passes over E along the step.
        progress: makes a progress callback from the name of a pass.

    Raises:
        ConfigError: deltaH1 is not that of a step which is linear in U's tokens.
        NumericalError: a derivative is not finite, or contributions do not add up.
        DataError: a reward of E cannot be computed.
    """
    config, policy = source.config, source.policy
    check_attributable(loaded)
    if predicted.passes is None:
        raise NumericalError(
            "attribution: expected derivatives of forwards, found that the arithmetic allows none; take float32 weights"
        )
    rewards, reason = None, "attribution.reward is off"
    if config.attribution.reward:
        try:
            rewards, reason = evaluation_rewards(source, sample.E)
        except DataError as error:
            raise DataError(f"{error}; or set attribution.reward: false (these are rewards of E)") from error
        if rewards is not None and len(rewards[~rewards.isnan()].unique()) < 2:
            rewards, reason = None, "all rewards of E are equal: which responses are better is not known"
    rework = config.probe_rework
    on = objectives(sample.E_scores, rewards, rework.weighting, rework.baseline)
    step = StepInParts(
        policy, sample.E, sample.U, update, closed_form(policy, loaded, update), predicted.passes
    )
    weights = loss_weight_parts(update.loss, update.inputs)
    keep = config.whatif.enabled and config.whatif.steps
    found = contributions(step.sensitivities(on, config.attribution.blocks, progress, keep=keep), weights)
    exact = predicted.passes.way.mode == "jvp"
    if exact and not (policy.half_precision or found.completeness <= COMPLETENESS_LIMIT):
        raise NumericalError(
            f"attribution: expected the tokens of U to add up to the gradient's part of deltaH1, found a relative "
            f"error of {found.completeness:.2g}; some layer drops derivatives (try probe_rework.derivative_mode: "
            "finite_difference)"
        )
    seed = stream_seed(source.seed, "attribution")
    states = drawn_states(sample.U, config.attribution.states, seed)
    responses = drawn_responses(sample.U, config.attribution.responses, seed)
    matrix, rows = influence(step, config.attribution.responses, seed, weights, progress("influence of U"))
    U = sample.U
    labels = token_labels(U, update.scores.entropy, token_decoder(source.tokenizer))
    own_states = coupled(step, states, weights, progress("coupling of states of U"))
    tokens = update_tokens(step, class_masks(labels), config.attribution.league, progress)
    return Attribution(
        contributions=found,
        tokens=tokens,
        labels=labels,
        sums={**sums_by_label(found, labels), **sums_by_parameter(found)},
        by_response=sums_by_response(found, U.mask),
        by_prompt=sums_by_prompt(found, U.mask, U.group),
        league=league(found, tokens, own_states, PREDICTORS) if config.attribution.league else [],
        agreement=_agreement(found, predicted, rework.weighting),
        rewards=rewards,
        without_reward="" if rewards is not None else reason,
        states=own_states,
        responses=coupled(step, responses, weights, progress("coupling of responses of U")),
        influence=matrix,
        influence_rows=rows,
        sd_U=update_spread_of(found, sample.U, rework.loss in TOKEN_MEANS),
    )


def check_attributable(loaded: LoadedOptimizer) -> None:
    """Refuse steps that are no sum over U's tokens.

    Raises:
        ConfigError: the optimizer is not Adam or AdamW.
    """
    if not isinstance(loaded.optimizer, torch.optim.Adam):
        raise ConfigError(
            "attribution.enabled: expected an Adam or AdamW step, which is linear in the gradient once its denominator "
            f"is held, found {type(loaded.optimizer).__name__}; switch the attribution off"
        )


def update_spread_of(found: Contributions, U: RolloutBatch, token_mean: bool) -> PerEstimand[float] | None:
    """The standard deviation of deltaH1 over update batches as a sum of contributions; see `spread`.

    Args:
        found: contributions of U's tokens.
        U: the update batch.
        token_mean: the loss is divided by the tokens of the batch.
    """
    member, size = index_groups(U.group)
    sizes = sum_per_group(U.lengths.double(), member, size) if token_mean else None
    weights = found.weights
    labels = member.unsqueeze(1).expand_as(U.mask)
    totals, _ = found.sensitivities.of_tokens(
        weights.policy + weights.kl, labels, len(size), entropy_weights=weights.bonus
    )
    sequence, token = (spread(own, sizes) for own in combined(totals, found.sensitivities.blocks)[:2])
    return None if sequence is None or token is None else PerEstimand(sequence, token)


def _agreement(found: Contributions, predicted: Predicted, weighting: str) -> float:
    """Relative difference of the two ways to deltaH1 per response, relative to the larger of its parts."""
    prediction = predicted.prediction
    here, there = found.total.deltaH1.sequence.value, prediction.estimates[weighting].sequence.value
    parts = (prediction.pathwise.sequence, there - prediction.pathwise.sequence, here)
    return abs(here - there) / max(*map(abs, parts), 1e-300)


def update_tokens(
    step: StepInParts, classes: Mapping[str, Tensor], last_layer: bool, progress: MakeProgress = no_progress
) -> UpdateTokens:
    """U as the formulas of the literature see it.

    Args:
        step: from U.
        classes: see `class_masks`.
        last_layer: take derivatives through the output layer too.
        progress: makes a progress callback from the name of a pass.
    """
    U, scores = step.U, step.update.scores
    assert U.advantages is not None
    old, along = U.old_logprobs, None
    if last_layer:
        G = last_layer_gradient(step.policy, step.E, progress("score the output layer on E"))
        along = last_layer_tangents(step.policy, U, G, progress("score U along the output layer"))
    return UpdateTokens(
        mask=U.mask,
        logprob=scores.logprob,
        entropy=scores.entropy,
        old_logprob=scores.logprob if old is None else torch.where(U.mask, old, 0.0),
        advantages=U.advantages,
        expected_discriminator=expected_discriminator(step.policy, U, progress("score distributions of U")),
        group=U.group,
        rewards=U.rewards,
        last_layer=along,
        classes=classes,
    )
