"""Phase 4: what every token of U adds to deltaH1 and to the expected reward, and whose doing a state's change is."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from probe.attribution.contributions import Contributions, Sensitivities, contributions
from probe.attribution.coupling import Coupling, Row, coupling, split_row
from probe.attribution.league import LeagueRow, league
from probe.attribution.objectives import Objectives, blocks_of, objectives
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
from probe.attribution.update_spread import preconditioned, spread
from probe.config.losses import TOKEN_MEANS
from probe.data.batch import RolloutBatch
from probe.errors.exceptions import ConfigError, NumericalError
from probe.estimand import PerEstimand
from probe.estimators.adam import ClosedFormStep
from probe.estimators.groups import index_groups, sum_per_group
from probe.estimators.losses import LossWeights, loss_weight_parts
from probe.loading.optimizer import LoadedOptimizer
from probe.loading.tokenizer import token_decoder
from probe.parameters import inner_product, inner_products, norm
from probe.phases.passes import AlongStep, tangents_of
from probe.phases.prediction import Predicted
from probe.phases.sample import BatchSource, Sample, evaluation_rewards
from probe.phases.update import Update, closed_form
from probe.rollouts.draw import stream_seed
from probe.scoring.collector import MakeProgress, Progress, no_progress
from probe.scoring.differentiable import as_trained, whole_gradients
from probe.scoring.distribution import expected_discriminator
from probe.scoring.forward_mode import forward_tangents
from probe.scoring.gradients import token_gradients
from probe.scoring.last_layer import last_layer_gradient, last_layer_tangents
from probe.scoring.policy import Policy
from probe.scoring.scores import TokenTangents

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
    check_attributable(loaded, config.probe_rework.predicts_a_step)
    if predicted.passes is None:
        raise NumericalError(
            "attribution: expected derivatives of forwards, found that the arithmetic allows none; take float32 weights"
        )
    rewards, reason = None, "attribution.reward is off"
    if config.attribution.reward:
        rewards, reason = evaluation_rewards(source, sample.E)
    rework = config.probe_rework
    on = objectives(sample.E_scores, rewards, rework.weighting, rework.baseline)
    taker = StepInParts(
        policy, sample.E, sample.U, update, closed_form(policy, loaded, update), predicted.passes
    )
    weights = loss_weight_parts(update.loss, update.inputs)
    found = contributions(taker.sensitivities(on, config.attribution.blocks, progress), weights)
    exact = predicted.passes.way.mode == "jvp"
    if exact and not (policy.half_precision or found.completeness <= COMPLETENESS_LIMIT):
        raise NumericalError(
            f"attribution: expected the tokens of U to add up to the gradient's part of deltaH1, found a relative "
            f"error of {found.completeness:.2g}; some layer drops derivatives (try probe_rework.derivative_mode: "
            "finite_difference)"
        )
    seed = stream_seed(source.seed, "attribution")
    states = taker.drawn_states(config.attribution.states, seed)
    responses = taker.drawn_responses(config.attribution.responses, seed)
    influence, rows = taker.influence(config.attribution.responses, seed, progress("influence of U"))
    U = sample.U
    labels = token_labels(U, update.scores.entropy, token_decoder(source.tokenizer))
    coupled = taker.coupled(states, weights, progress("coupling of states of U"))
    tokens = taker.tokens(class_masks(labels), config.attribution.league, progress)
    return Attribution(
        contributions=found,
        tokens=tokens,
        labels=labels,
        sums={**sums_by_label(found, labels), **sums_by_parameter(found)},
        by_response=sums_by_response(found, U.mask),
        by_prompt=sums_by_prompt(found, U.mask, U.group),
        league=league(found, tokens, coupled, PREDICTORS) if config.attribution.league else [],
        agreement=_agreement(found, predicted, rework.weighting),
        rewards=rewards,
        without_reward="" if rewards is not None else reason,
        states=coupled,
        responses=taker.coupled(responses, weights, progress("coupling of responses of U")),
        influence=influence,
        influence_rows=rows,
        sd_U=update_spread_of(found, sample.U, rework.loss in TOKEN_MEANS),
    )


def check_attributable(loaded: LoadedOptimizer, predicts_a_step: bool) -> None:
    """Refuse steps that are no sum over U's tokens.

    Raises:
        ConfigError: the optimizer is not Adam or AdamW, or deltaH1 is not of its step.
    """
    if not isinstance(loaded.optimizer, torch.optim.Adam):
        raise ConfigError(
            "attribution.enabled: expected an Adam or AdamW step, which is linear in the gradient once its denominator "
            f"is held, found {type(loaded.optimizer).__name__}; switch the attribution off"
        )
    if not predicts_a_step:
        raise ConfigError(
            "attribution.enabled: expected probe_rework.step: optimizer or closed_form, found preconditioned, which is "
            "no step that an optimizer takes"
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
    terms = found.sensitivities.changes(
        weights.policy + weights.kl, labels, len(size), entropy_weights=weights.bonus
    )
    spreads = [
        spread(torch.tensor([getattr(one.deltaH1, name).value for one in terms], dtype=torch.float64), sizes)
        for name in ("sequence", "token")
    ]
    sequence, token = spreads
    return None if sequence is None or token is None else PerEstimand(sequence, token)


def _agreement(found: Contributions, predicted: Predicted, weighting: str) -> float:
    """Relative difference of the two ways to deltaH1 per response, relative to the larger of its parts."""
    prediction = predicted.prediction
    here, there = found.total.deltaH1.sequence.value, prediction.estimates[weighting].sequence.value
    parts = (prediction.pathwise.sequence, there - prediction.pathwise.sequence, here)
    return abs(here - there) / max(*map(abs, parts), 1e-300)


@dataclass(frozen=True)
class StepInParts:
    """A step from U, and the passes that take the effects of its parts.

    Attributes:
        policy: at `theta`.
        E: the evaluation batch.
        U: the update batch.
        update: the step from it.
        closed: the same in its parts.
        passes: over E along the step: by what way derivatives are taken.
    """

    policy: Policy
    E: RolloutBatch
    U: RolloutBatch
    update: Update
    closed: ClosedFormStep
    passes: AlongStep

    @cached_property
    def vectors(self) -> dict[str, Mapping[str, Tensor]]:
        """The vectors that the step is the sum of, and of these the load-balancing loss's part of the gradient."""
        found = {
            "momentum": self.closed.momentum,
            "decay": self.closed.decay,
            "gradient": self.closed.gradient,
        }
        if self.update.router is not None:
            found["router"] = preconditioned(self.closed.gradient_map, self.update.router)
        return found

    def sensitivities(
        self, on: Objectives, count: int, progress: MakeProgress = no_progress
    ) -> Sensitivities:
        """How the objectives change with the weight of each token of U.

        Part of E by part, so that no more than two gradients of each objective are held at a time. The errors of
        differences in the parts do not matter; what is exact is taken once more, along the sum.

        Args:
            on: objectives on E.
            count: parts of E.
            progress: makes a progress callback from the name of a pass.
        """
        E, U, names = self.E, self.U, tuple(self.policy.parameters)
        blocks = blocks_of(on, E.group, count)
        K, P, shape = len(on), len(blocks), U.mask.shape
        of_blocks = torch.zeros(2, K, P, *shape)
        products = {name: torch.zeros(K, P, len(names), dtype=torch.float64) for name in self.vectors}
        sums: list[dict[str, Tensor]] = [{} for _ in range(K)]
        told = _Steps(progress("gradient on E for all objectives"), len(E))
        for p, rows in enumerate(blocks.rows):
            gradients = self._gradients(on, rows, told)
            for k, gradient in enumerate(gradients):
                for name, vector in self.vectors.items():
                    by_name = inner_products(gradient, vector)
                    products[name][k, p] = torch.tensor([by_name[n] for n in names], dtype=torch.float64)
                sums[k] = {n: sums[k][n] + g if sums[k] else g for n, g in gradient.items()}
                found = self.along(gradient, progress, exact=False)
                of_blocks[0, k, p], of_blocks[1, k, p] = found.logprob, found.entropy
        whole = [self.along(total, progress) for total in sums]
        return Sensitivities(
            logprob=torch.stack([one.logprob for one in whole]),
            entropy=torch.stack([one.entropy for one in whole]),
            block_logprob=of_blocks[0],
            block_entropy=of_blocks[1],
            vectors=products,
            names=names,
            blocks=blocks,
        )

    def _gradients(self, on: Objectives, rows: Tensor, progress: Progress) -> list[dict[str, Tensor]]:
        """The gradients of the objectives from a part of E: `1 / B` times the sum over its tokens."""

        def weights(i: Tensor, t: Tensor, l: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return on.of_logprob[:, rows[i], t] / B, on.of_entropy[:, rows[i], t] / B

        B = len(self.E)
        part = self.E.subset(rows)
        if not bool(part.mask.any()):
            return [
                {n: torch.zeros_like(p) for n, p in self.policy.parameters.items()} for _ in range(len(on))
            ]
        with whole_gradients(self.policy.model):
            return token_gradients(self.policy, part, weights, len(on), progress)[0]

    def along(
        self, gradient: Mapping[str, Tensor], progress: MakeProgress = no_progress, *, exact: bool = True
    ) -> TokenTangents:
        """Derivatives of U's scores along `P` times a gradient.

        Args:
            gradient: by parameter name.
            progress: makes a progress callback from the name of a pass.
            exact: by forward mode, where the model has it; otherwise by what is cheapest and holds.
        """
        U, u = self.U, preconditioned(self.closed.gradient_map, gradient)
        if norm(u) == 0.0:
            zero = torch.zeros(U.mask.shape, dtype=torch.float64)
            return TokenTangents(zero, zero)
        with as_trained(self.policy.model):
            if exact and self.passes.way.mode == "jvp":
                return forward_tangents(self.policy, U, u, progress=progress("forward mode on U"))
            move = norm(self.update.step)
            return tangents_of(self.policy, U, u, self.passes, move, progress, here=self.update.scores)

    def tokens(
        self, classes: Mapping[str, Tensor], last_layer: bool, progress: MakeProgress = no_progress
    ) -> UpdateTokens:
        """U as the formulas of the literature see it.

        Args:
            classes: see `class_masks`.
            last_layer: take derivatives through the output layer too.
            progress: makes a progress callback from the name of a pass.
        """
        U, scores = self.U, self.update.scores
        assert U.advantages is not None
        old, along = U.old_logprobs, None
        if last_layer:
            G = last_layer_gradient(self.policy, self.E, progress("score the output layer on E"))
            along = last_layer_tangents(self.policy, U, G, progress("score U along the output layer"))
        return UpdateTokens(
            mask=U.mask,
            logprob=scores.logprob,
            entropy=scores.entropy,
            old_logprob=scores.logprob if old is None else torch.where(U.mask, old, 0.0),
            advantages=U.advantages,
            expected_discriminator=expected_discriminator(
                self.policy, U, progress("score distributions of U")
            ),
            group=U.group,
            rewards=U.rewards,
            last_layer=along,
            classes=classes,
        )

    # ---------------------------------------------------------------- coupling

    def drawn_states(self, count: int, seed: int) -> list[tuple[int, int | None]]:
        """States of U drawn at random without replacement, as `(sequence, position)`."""
        places = self.U.mask.nonzero()
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:count]
        return [(int(i), int(t)) for i, t in places[order]]

    def drawn_responses(self, count: int, seed: int) -> list[tuple[int, int | None]]:
        """Responses of U drawn at random without replacement, as `(sequence, None)`."""
        return [(i, None) for i in _drawn(self.U, count, seed)]

    def coupled(
        self, places: Sequence[tuple[int, int | None]], weights: LossWeights, progress: Progress
    ) -> Coupling | None:
        """Split the entropy change at some places of U; None where there are none.

        Args:
            places: states, or whole responses.
            weights: of the loss.
            progress: called after each, with the responses of U that were gone over.
        """
        rows: list[Row] = []
        for n, (sequence, position) in enumerate(places):
            X = self._entropy_gradient(self.U, sequence, position)
            of = {name: inner_product(X.__getitem__, vector) for name, vector in self.vectors.items()}
            total = of.pop("gradient") + of["momentum"] + of["decay"]
            rows.append(split_row(sequence, position, self.along(X), weights, self.U.group, of, total))
            progress((n + 1) * len(self.U), len(places) * len(self.U))
        return coupling(rows, self.U.group) if rows else None

    def influence(self, count: int, seed: int, progress: Progress) -> tuple[Tensor | None, Tensor | None]:
        """What each response of U does to the entropy at the states of sampled responses of E.

        Args:
            count: responses of E.
            seed: of the draw.
            progress: called after each, with the responses of U that were gone over.

        Returns:
            `(n, B_U)` nats, and the responses `(n,)`; None where there are none.
        """
        rows = _drawn(self.E, count, seed)
        if not rows:
            return None, None
        weights, found = loss_weight_parts(self.update.loss, self.update.inputs), []
        for n, row in enumerate(rows):
            tangents = self.along(self._entropy_gradient(self.E, row, None))
            found.append((weights.policy * tangents.logprob).sum(1))
            progress((n + 1) * len(self.U), len(rows) * len(self.U))
        return torch.stack(found), torch.tensor(rows)

    def _entropy_gradient(
        self, batch: RolloutBatch, sequence: int, position: int | None
    ) -> dict[str, Tensor]:
        """`grad h` at one state of a batch, or its sum over the states of a response."""

        def weights(i: Tensor, t: Tensor, l: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            here = torch.ones_like(h) if position is None else (t == position).to(h)
            return torch.zeros_like(h).unsqueeze(0), here.unsqueeze(0)

        alone = replace(self.policy, tokens_per_microbatch=None, microbatch_size=1)
        with whole_gradients(self.policy.model):
            (gradient,), _ = token_gradients(alone, batch.subset(torch.tensor([sequence])), weights, 1)
        return gradient


class _Steps:
    """Progress of a pass that is made part by part."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.before, self.last = progress, total, 0, 0

    def __call__(self, done: int, total: int) -> None:
        """Report `done` of `total` of the present part."""
        if done < self.last:
            self.before += self.last
        self.last = done
        self.progress(self.before + done, self.total)


def _drawn(batch: RolloutBatch, count: int, seed: int) -> list[int]:
    """Responses that are not empty, at random without replacement."""
    some = (batch.lengths > 0).nonzero().flatten()
    order = torch.randperm(len(some), generator=torch.Generator().manual_seed(seed))[:count]
    return [int(i) for i in some[order]]
