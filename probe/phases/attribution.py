"""Phase 4: what the tokens of U add to deltaH1; so far its spread over update batches."""

from __future__ import annotations

import logging

import torch

from probe.attribution.update_spread import preconditioned, prompt_contributions, spread
from probe.config.estimation import ProbeReworkConfig
from probe.config.losses import TOKEN_MEANS
from probe.data.batch import RolloutBatch
from probe.errors.exceptions import NumericalError
from probe.estimand import PerEstimand
from probe.estimators.entropy_gradient import EntropyGradient
from probe.estimators.groups import index_groups, sum_per_group
from probe.loading.optimizer import LoadedOptimizer
from probe.parameters import norm
from probe.phases.passes import Way, few_responses
from probe.phases.update import Update, closed_form
from probe.scoring.collector import MakeProgress
from probe.scoring.differences import choose_scale, difference_pair
from probe.scoring.forward_mode import forward_tangents
from probe.scoring.policy import Policy

logger = logging.getLogger(__name__)


def update_spread(
    policy: Policy,
    U: RolloutBatch,
    X: EntropyGradient | None,
    update: Update,
    loaded: LoadedOptimizer,
    rework: ProbeReworkConfig,
    way: Way,
    progress: MakeProgress,
) -> PerEstimand[float] | None:
    """Standard deviation of deltaH1 over update batches, nats; None where there is none.

    Args:
        policy: at the checkpoint's weights.
        U: the update batch.
        X: the entropy's gradient on E.
        update: the step from U.
        loaded: the optimizer; the spread is known for Adam's rule.
        rework: the section `probe_rework`.
        way: to differentiate.
        progress: makes a progress callback from the name of a pass.
    """
    adam = isinstance(loaded.optimizer, torch.optim.Adam)
    if not rework.update_spread or X is None or not adam or rework.step == "preconditioned":
        return None
    linear = closed_form(policy, loaded, update).gradient_map
    sizes = sum_per_group(U.lengths.double(), *index_groups(U.group)) if rework.loss in TOKEN_MEANS else None
    found = []
    for of in (X.sequence, X.token):
        u = preconditioned(linear, {name: of(name) for name in linear})
        factor = 1.0
        if way.mode == "jvp":
            tangents = forward_tangents(policy, U, u, progress=progress("forward mode on U"))
        else:  # the difference starts at a move as long as the step
            factor = norm(update.step) / max(norm(u), 1e-300)
            along = {name: factor * direction for name, direction in u.items()}
            try:
                scale, _ = choose_scale(policy, few_responses(U, policy.microbatch_size), along)
            except NumericalError as error:
                logger.warning("deltaH1_sd_U is left out: %s", error)
                return None
            tangents = difference_pair(policy, U, along, scale).tangents
        contributions = prompt_contributions(tangents, update.loss_weights, update.entropy_weights, U.group)
        found.append(spread(contributions / factor, sizes))
    sequence, token = found
    return None if sequence is None or token is None else PerEstimand(sequence, token)
