"""A step on the enumerable policy, in float64, taken apart: what tests of attribution begin with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probe.attribution.contributions import Contributions, contributions
from probe.attribution.objectives import Objectives, objectives
from probe.attribution.tokens import UpdateTokens
from probe.data.batch import RolloutBatch
from probe.estimators.adam import adam_closed_form
from probe.estimators.loss_settings import LossSettings
from probe.estimators.losses import LossWeights, loss_weight_parts
from probe.estimators.update import loss_gradient
from probe.phases.attribution import update_tokens
from probe.phases.passes import AlongStep, Way
from probe.phases.step_in_parts import StepInParts
from probe.phases.update import Update, optimizer_step
from probe.scoring import Policy, score_tokens
from probe.scoring.forward_mode import scores_and_tangents
from probe.scoring.scores import TokenScores
from tests.support.exact import enumerate_prompts, sample_rows


@dataclass(frozen=True)
class Attributed:
    """A step and its parts.

    Attributes:
        policy: at `theta`.
        optimizer: that took the step, at its state before it.
        E: evaluation batch, with rewards.
        U: update batch.
        E_scores: scores of E.
        update: the step.
        taker: the passes.
        on: objectives on E.
        weights: of the loss.
        found: contributions of U's tokens.
    """

    policy: Policy
    optimizer: torch.optim.Optimizer
    E: RolloutBatch
    U: RolloutBatch
    E_scores: TokenScores
    update: Update
    taker: StepInParts
    on: Objectives
    weights: LossWeights
    found: Contributions

    @property
    def tokens(self) -> UpdateTokens:
        """U as formulas see it."""
        return replace(update_tokens(self.taker, {}, last_layer=True))


def batches(
    policy: Policy, prompts: int = 12, G: int = 4, E: int = 60, seed: int = 3
) -> tuple[RolloutBatch, RolloutBatch]:
    """`(E, U)` sampled from the policy on prompts of two tokens; U in groups with advantages, both with rewards."""
    whole = enumerate_prompts([(0, 1), (1, 2), (2, 2), (0, 0)], cap=4)
    probability = score_tokens(policy, whole).sequence_logprob.exp()
    g = torch.Generator().manual_seed(seed)
    groups = whole.group
    of_E, group_E = sample_rows(probability, E, 1, groups, g)
    of_U, group_U = sample_rows(probability, prompts, G, groups, g)
    E_batch, U_batch = (
        replace(whole.subset(rows), group=group) for rows, group in ((of_E, group_E), (of_U, group_U))
    )
    E_batch, U_batch = (replace(one, rewards=reward_of(one)) for one in (E_batch, U_batch))
    assert U_batch.rewards is not None
    means = torch.zeros(prompts, dtype=torch.float64).index_add_(0, group_U, U_batch.rewards) / G
    return E_batch, replace(U_batch, advantages=U_batch.rewards - means[group_U])


def reward_of(batch: RolloutBatch) -> Tensor:
    """A reward between 0 and 1 that depends on all of a response: its share of the token 1, and whether it ends."""
    ones = ((batch.completion_ids == 1) & batch.mask).sum(1) / batch.lengths.clamp_min(1)
    return 0.5 * ones.double() + 0.5 * (~batch.truncated).double()


def with_history(
    policy: Policy, rule: str = "adamw", seed: int = 4, lr: float = 1e-2
) -> torch.optim.Optimizer:
    """Adam(W) with the moments of three random gradients; the parameters stay where they are."""
    kind = torch.optim.AdamW if rule == "adamw" else torch.optim.Adam
    decay = 0.0 if rule == "adam" else 0.1
    parameters = list(policy.parameters.values())
    optimizer = kind(parameters, lr=lr, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    g, before = torch.Generator().manual_seed(seed), [p.detach().clone() for p in parameters]
    for _ in range(3):
        for p in parameters:
            p.grad = 0.02 * torch.randn(p.shape, generator=g, dtype=p.dtype)
        optimizer.step()
    optimizer.zero_grad()
    for p, value in zip(parameters, before, strict=True):
        p.data.copy_(value)
    return optimizer


def attributed(
    policy: Policy,
    E: RolloutBatch,
    U: RolloutBatch,
    settings: LossSettings = LossSettings(loss="dapo"),  # noqa: B008
    rule: str = "adamw",
    max_grad_norm: float | None = 0.05,
    reference: Tensor | None = None,
    blocks: int = 6,
    way: str = "jvp",
    optimizer: torch.optim.Optimizer | None = None,
) -> Attributed:
    """Take a step from U, and take it apart."""
    optimizer = with_history(policy, rule) if optimizer is None else optimizer
    gradient = loss_gradient(policy, U, settings, reference)
    taken = optimizer_step(optimizer, policy.parameters, gradient.gradient, max_grad_norm)
    closed = adam_closed_form(optimizer, policy.parameters, gradient.gradient, taken.clip_factor)
    update = Update(
        step=taken.step,
        new_parameters=taken.new_parameters,
        gradient=gradient.gradient,
        gradient_norm=taken.gradient_norm,
        clip_factor=taken.clip_factor,
        learning_rate=float(optimizer.param_groups[0]["lr"]),
        loss_weights=gradient.weights,
        entropy_weights=gradient.entropy_weights,
        scores=gradient.scores,
        loss=settings,
        inputs=gradient.inputs,
        router=gradient.router,
    )
    scores, tangents = scores_and_tangents(policy, E, taken.step)
    passes = AlongStep(scores, tangents, Way(way, "asked for"))  # type: ignore[arg-type]
    taker = StepInParts(policy, E, U, update, closed, passes)
    on = objectives(scores, E.rewards, "causal", "loo_position")
    weights = loss_weight_parts(settings, update.inputs)
    found = contributions(taker.sensitivities(on, blocks), weights)
    return Attributed(policy, optimizer, E, U, scores, update, taker, on, weights, found)
