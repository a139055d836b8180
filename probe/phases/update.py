"""Phase 2: the loss's gradient on U, and the optimizer's real step taken on a snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from probe.config.losses import LOSS_OPTIONS
from probe.config.schema import ProbeConfig
from probe.errors.exceptions import NumericalError
from probe.estimators.adam import ClosedFormStep, adam_closed_form, preconditioned_direction
from probe.estimators.advantages import count_zero_advantage_groups
from probe.estimators.loss_settings import LossSettings
from probe.estimators.losses import LossInputs
from probe.estimators.rounding import Rounding, rounded_step
from probe.estimators.router_loss import router_coefficient
from probe.estimators.update import loss_gradient
from probe.loading.optimizer import LoadedOptimizer
from probe.phases.sample import Sample
from probe.rollouts.sampling import check_sampling
from probe.scoring.collector import MakeProgress, no_progress
from probe.scoring.policy import Policy
from probe.scoring.reference import as_reference
from probe.scoring.score import score_tokens
from probe.scoring.scores import TokenScores
from probe.shards import first_nonfinite, whole
from probe.snapshot import copied, preserved


@dataclass(frozen=True)
class Update:
    """One optimizer step.

    Attributes:
        step: `theta_new - theta_old` by parameter name, on the snapshot device.
        new_parameters: `theta_new`, bitwise what the optimizer left; where the training keeps its weights in 16 bits,
            what they are rounded to there, which is not `theta_old + step` then.
        gradient: the loss's gradient before clipping.
        gradient_norm: its Euclidean norm over all parameters.
        clip_factor: what clipping multiplied it by (1 when it did nothing).
        learning_rate: `eta`, the reference learning rate of the optimizer's groups.
        loss_weights: `d loss / d l[i, t]`, `(B, T)`.
        entropy_weights: `d loss / d h[i, t]`, `(B, T)`.
        scores: scores of U.
        loss: what fixes the loss.
        inputs: what the loss is a function of, with the scores of U.
        router: the part of the gradient that a load-balancing loss has; None without one.
        rounding: what rounding to the training's type leaves of the step; None where there is none.
        zero_advantage_groups: groups of U with equal rewards throughout.
    """

    step: Mapping[str, Tensor]
    new_parameters: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]
    gradient_norm: float
    clip_factor: float
    learning_rate: float
    loss_weights: Tensor
    entropy_weights: Tensor
    scores: TokenScores
    loss: LossSettings
    inputs: LossInputs
    router: Mapping[str, Tensor] | None = None
    rounding: Rounding | None = None
    zero_advantage_groups: int = 0


def update(
    policy: Policy,
    sample: Sample,
    loaded: LoadedOptimizer,
    config: ProbeConfig,
    order_seed: int,
    progress: MakeProgress = no_progress,
) -> Update:
    """The loss's gradient on U and the optimizer's real step, taken on a snapshot.

    Args:
        policy: at the checkpoint's weights.
        sample: U with advantages.
        loaded: the optimizer at its saved state.
        config: loss, clipping and where the snapshot is kept.
        order_seed: of the order in which a U that was sampled is cut into microbatches.
        progress: makes a progress callback from the name of a pass.

    Raises:
        NumericalError: a score or the step is not finite.
        RolloutError: sampling does not match scoring.
        ConfigError: there is a KL penalty and nothing says what its reference is.
    """
    U, reference, order = sample.U, None, None
    if U.advantages is None:
        raise RuntimeError("expected U with advantages, found none; the phase `sample` gives it them")
    if config.probe_rework.kl_coef > 0:
        with as_reference(policy.model):
            reference = score_tokens(policy, U, progress("score U under the reference")).logprob
    if sample.U_seen is not None:
        # sampled prompt by prompt; trainers shuffle before they cut it into microbatches
        order = torch.randperm(len(U), generator=torch.Generator().manual_seed(order_seed))
    settings = loss_settings(policy, config)
    found = loss_gradient(policy, U, settings, reference, progress("gradient on U"), order)
    if sample.U_seen is not None:
        check_sampling(policy, sample.U_seen, found.scores)
    taken = take_step(policy, loaded, found.gradient, config)
    return Update(
        step=taken.step,
        new_parameters=taken.new_parameters,
        gradient=found.gradient,
        gradient_norm=taken.gradient_norm,
        clip_factor=taken.clip_factor,
        learning_rate=loaded.learning_rate,
        loss_weights=found.weights,
        entropy_weights=found.entropy_weights,
        scores=found.scores,
        loss=settings,
        inputs=found.inputs,
        router=found.router,
        rounding=taken.rounding,
        zero_advantage_groups=count_zero_advantage_groups(U.advantages, U.group),
    )


def loss_settings(policy: Policy, config: ProbeConfig) -> LossSettings:
    """The loss of the update, from the section `probe_rework`."""
    rework = config.probe_rework
    return LossSettings(
        loss=rework.loss,
        max_new_tokens=config.generation.max_new_tokens,
        clip_low=rework.clip_range,
        clip_high=rework.clip_range if rework.clip_range_high is None else rework.clip_range_high,
        kl_coef=rework.kl_coef,
        entropy_coef=rework.entropy_coef,
        router_aux_loss_coef=router_coefficient(policy.model, rework.router_aux_loss_coef),
        **{name: getattr(rework, name) for name in LOSS_OPTIONS},
    )


@dataclass(frozen=True)
class TakenStep:
    """What the optimizer does with a gradient; see `Update`."""

    step: Mapping[str, Tensor]
    new_parameters: Mapping[str, Tensor]
    gradient_norm: float
    clip_factor: float
    rounding: Rounding | None = None


def take_step(
    policy: Policy,
    loaded: LoadedOptimizer,
    gradient: Mapping[str, Tensor],
    config: ProbeConfig,
    lr_factor: float = 1.0,
) -> TakenStep:
    """The exact step, and the weights that the training has after it: rounded, where it keeps them in 16 bits.

    Args:
        policy: whose trainable parameters are moved on the snapshot.
        loaded: the optimizer at its saved state.
        gradient: by parameter name.
        config: clipping, and where the snapshot is kept.
        lr_factor: multiplies the learning rate of every group.

    Raises:
        NumericalError: the step is not finite.
    """
    taken = optimizer_step(
        loaded.optimizer,
        policy.parameters,
        gradient,
        config.probe_rework.max_grad_norm,
        config.importance.snapshot_device,
        lr_factor,
    )
    if not loaded.rounded:
        return taken
    new, rounding = rounded_step(
        loaded.optimizer,
        policy.parameters,
        gradient,
        loaded.rounded,
        taken.new_parameters,
        taken.clip_factor,
        lr_factor,
        loaded.fused,
    )
    return replace(taken, new_parameters=new, rounding=rounding)


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    gradient: Mapping[str, Tensor],
    max_grad_norm: float | None,
    snapshot_device: torch.device | str = "cpu",
    lr_factor: float = 1.0,
) -> TakenStep:
    """What `optimizer.step()` would do with `gradient`; parameters, grads and optimizer are bitwise restored.

    Args:
        optimizer: any torch optimizer over `parameters`, with its state.
        parameters: by name.
        gradient: by the same names.
        max_grad_norm: clip the total norm to this first, as training does; None does not clip.
        snapshot_device: where the snapshot and the results are kept.
        lr_factor: multiplies the learning rate of every group.

    Raises:
        NumericalError: the step is not finite.
    """
    with preserved(parameters, optimizer, snapshot_device):
        before = copied(parameters, snapshot_device)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * lr_factor
        for name, p in parameters.items():
            p.grad = gradient[name].clone()
        size = whole(nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None]))
        factor = 1.0
        if max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(list(parameters.values()), max_grad_norm, size)
            factor = min(1.0, max_grad_norm / (float(size) + 1e-6))  # torch's own formula
        optimizer.step()
        new = copied(parameters, snapshot_device)
    step = {name: new[name] - before[name] for name in new}
    if (bad := first_nonfinite(step)) is not None:
        raise NumericalError(f"expected a finite optimizer step, found NaN or infinity in that of {bad}")
    return TakenStep(step, new, float(size), factor)


def predicted_step(
    policy: Policy, loaded: LoadedOptimizer, update: Update, kind: str
) -> Mapping[str, Tensor]:
    """The step that deltaH1 is for, by parameter name.

    Args:
        policy: at the checkpoint's weights.
        loaded: the optimizer.
        update: its step.
        kind: `probe_rework.step`: `optimizer` (the step itself), `closed_form` (Adam's rule written out) or
            `preconditioned` (the preconditioned gradient times the learning rate).
    """
    if kind == "closed_form":
        return closed_form(policy, loaded, update).total()
    if kind == "preconditioned":
        direction = preconditioned_direction(loaded.optimizer, policy.parameters, update.gradient)
        return {name: update.learning_rate * y for name, y in direction.items()}
    return update.step


def closed_form(policy: Policy, loaded: LoadedOptimizer, update: Update) -> ClosedFormStep:
    """The optimizer's step in its parts."""
    return adam_closed_form(loaded.optimizer, policy.parameters, update.gradient, update.clip_factor)
