"""The spread of deltaH1 over update batches, where no attribution of all tokens is asked for."""

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
from probe.phases.passes import AlongStep, tangents_of
from probe.phases.update import Update, closed_form
from probe.scoring.collector import MakeProgress
from probe.scoring.differentiable import as_trained
from probe.scoring.policy import Policy

logger = logging.getLogger(__name__)


def has_update_spread(loaded: LoadedOptimizer, rework: ProbeReworkConfig) -> bool:
    """Whether the spread over update batches is asked for, and known: for Adam's rule, of a step that it takes.

    An attribution of all tokens gives it too, from all of E.
    """
    return rework.update_spread and isinstance(loaded.optimizer, torch.optim.Adam) and rework.predicts_a_step


def update_spread(
    policy: Policy,
    U: RolloutBatch,
    X: EntropyGradient | None,
    update: Update,
    loaded: LoadedOptimizer,
    rework: ProbeReworkConfig,
    passes: AlongStep,
    progress: MakeProgress,
) -> PerEstimand[float] | None:
    """Standard deviation of deltaH1 over update batches, nats; None where there is none.

    Args:
        policy: at the checkpoint's weights.
        U: the update batch.
        X: the entropy's gradient on E, or on a part of it.
        update: the step from U.
        loaded: the optimizer, see `has_update_spread`.
        rework: the section `probe_rework`.
        passes: over E along the step.
        progress: makes a progress callback from the name of a pass.
    """
    if X is None or not has_update_spread(loaded, rework):
        return None
    linear = closed_form(policy, loaded, update).gradient_map
    sizes = sum_per_group(U.lengths.double(), *index_groups(U.group)) if rework.loss in TOKEN_MEANS else None
    found, binding = [], rework.derivative_mode != "auto"
    for of in (X.sequence, X.token):
        u = preconditioned(linear, {name: of(name) for name in linear})
        try:
            with as_trained(policy.model, policy.values):
                tangents = tangents_of(
                    policy, U, u, passes, norm(update.step), progress, here=update.scores, binding=binding
                )
        except NumericalError as error:
            if passes.way.mode == "jvp" and passes.difference_scale is None:
                raise
            logger.warning("deltaH1_sd_U is left out: %s", error)
            return None
        contributions = prompt_contributions(tangents, update.loss_weights, update.entropy_weights, U.group)
        found.append(spread(contributions, sizes))
    sequence, token = found
    return None if sequence is None or token is None else PerEstimand(sequence, token)
