"""Exact entropies of the enumerable policy over several prompts, and everything the probe makes of each sequence, once.

A sample is then a choice of rows: a thousand repetitions of an experiment cost no pass through the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from probe.data.batch import RolloutBatch
from probe.estimators.entropy_change import Reweighting, reweighted_entropy
from probe.scoring import Policy, TokenScores, score_tokens
from probe.scoring.features import feature_basis
from probe.scoring.forward_mode import forward_tangents, second_order_tangents
from probe.scoring.scores import TokenTangents
from tests.support.enumerable import all_sequences


@dataclass(frozen=True)
class Enumeration:
    """A policy's whole sample space and an update of it.

    Attributes:
        policy: the policy before the update.
        batch: every response to every prompt, `n` rows; `group` is the number of the prompt.
        probability: of each row, the prompts being equally likely, `(n,)`.
        step: the update, by parameter name.
        old: scores before the update, with features.
        new: scores after it.
        first: derivatives of the scores along the step, with features.
        second: second derivatives.
        sampled_features: `psi(y)`, `(n, T, K)`.
        change: exact `[deltaH_seq, deltaH_tok]`, nats.
        slope: exact `[<grad H_seq, step>, <grad H_tok, step>]`, nats.
        curvature: exact `1/2 step' hess step` of both, nats.
        new_probability: of each row after the update.
    """

    policy: Policy
    batch: RolloutBatch
    probability: Tensor
    step: Mapping[str, Tensor]
    old: TokenScores
    new: TokenScores
    first: TokenTangents
    second: TokenTangents
    sampled_features: Tensor
    change: Tensor
    slope: Tensor
    curvature: Tensor
    new_probability: Tensor


def enumerate_prompts(prompts: Sequence[tuple[int, ...]], cap: int = 4) -> RolloutBatch:
    """Every response to each of some prompts of equal length."""
    one = all_sequences(cap)
    parts = torch.arange(len(one)).repeat(len(prompts))
    of = torch.arange(len(prompts)).repeat_interleave(len(one))
    return replace(one.subset(parts), prompt_ids=tuple(tuple(prompts[int(p)]) for p in of), group=of)


def plain_scores(
    policy: Policy, batch: RolloutBatch, values: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """`(l, h)`, `(n, T)`, by one plain forward of the model, differentiable twice.

    Prompts are of equal length; later tokens cannot reach earlier ones, so that padding is harmless.
    """
    prompt = torch.tensor(batch.prompt_ids)
    ids = torch.cat([prompt, batch.completion_ids], dim=1)
    arguments = {"input_ids": ids, "use_cache": False}
    with sdpa_kernel(SDPBackend.MATH):  # the kernel that can be differentiated twice
        logits = torch.func.functional_call(policy.model, dict(values or {}), (), arguments).logits
    logp = (logits / policy.temperature).log_softmax(-1)[:, prompt.shape[1] - 1 : -1]
    l = logp.gather(-1, batch.completion_ids.unsqueeze(-1)).squeeze(-1)
    h = -(logp.exp() * logp).sum(-1)
    return torch.where(batch.mask, l, 0.0), torch.where(batch.mask, h, 0.0)


def exact(
    policy: Policy, batch: RolloutBatch, values: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """`([H_seq, H_tok], probabilities)` of an enumeration of equally likely prompts, differentiable twice."""
    l, h = plain_scores(policy, batch, values)
    p = l.sum(1).exp() / len(set(batch.prompt_ids))
    N = (p * h.sum(1)).sum()
    return torch.stack([N, N / (p * batch.mask.sum(1)).sum()]), p


def exact_derivatives(
    policy: Policy, batch: RolloutBatch, step: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """`(slope, curvature)`, both `[seq, tok]`: `<grad H, step>` and `1/2 step' hess step`, by double backward."""
    s = torch.zeros((), dtype=torch.float64, requires_grad=True)
    moved = {n: p.detach() + s * step[n] for n, p in policy.parameters.items()}
    H, _ = exact(policy, batch, moved)
    slope = [torch.autograd.grad(x, s, create_graph=True)[0] for x in H]
    second = [torch.autograd.grad(x, s, retain_graph=True)[0] for x in slope]
    return torch.stack(slope).detach(), torch.stack(second) / 2


def take_scores(scores: TokenScores, rows: Tensor) -> TokenScores:
    """The scores of some sequences."""
    features, states = scores.expected_features, scores.state_features
    return TokenScores(
        scores.logprob[rows],
        scores.entropy[rows],
        scores.mask[rows],
        None if features is None else features[rows],
        None if states is None else states[rows],
    )


def take_tangents(tangents: TokenTangents, rows: Tensor) -> TokenTangents:
    """The derivatives of some sequences."""
    features = tangents.expected_features
    return TokenTangents(
        tangents.logprob[rows], tangents.entropy[rows], None if features is None else features[rows]
    )


def sample_rows(
    probability: Tensor, prompts: int, responses: int, groups: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw prompts with replacement and responses to each: `(rows, group)`."""
    number = int(groups.max()) + 1
    drawn = torch.randint(number, (prompts,), generator=generator)
    inside = torch.where(groups == drawn.unsqueeze(1), probability, 0.0)
    rows = torch.multinomial(inside, responses, replacement=True, generator=generator)
    return rows.flatten(), torch.arange(prompts).repeat_interleave(responses)


def random_step(policy: Policy, size: float, seed: int = 0) -> dict[str, Tensor]:
    """A random direction in parameter space."""
    g = torch.Generator().manual_seed(seed)
    return {
        n: size * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p)
        for n, p in policy.parameters.items()
    }


def enumeration(
    policy: Policy, batch: RolloutBatch, step: Mapping[str, Tensor], basis_from: Tensor | None = None
) -> Enumeration:
    """Make everything once.

    Args:
        policy: the policy.
        batch: all responses, see `enumerate_prompts`.
        step: the update.
        basis_from: rows of an independent sample that the feature basis is made of; by default all rows.
    """
    basis = feature_basis(policy.model, batch if basis_from is None else batch.subset(basis_from))
    assert basis is not None
    after = {n: p.detach() + step[n] for n, p in policy.parameters.items()}
    slope, curvature = exact_derivatives(policy, batch, step)
    with torch.no_grad():
        (H_old, p_old), (H_new, p_new) = exact(policy, batch), exact(policy, batch, after)
    _, second = second_order_tangents(policy, batch, step)
    return Enumeration(
        policy=policy,
        batch=batch,
        probability=p_old,
        step=step,
        old=score_tokens(policy, batch, basis=basis),
        new=score_tokens(policy.at(after), batch),
        first=forward_tangents(policy, batch, step, basis),
        second=second,
        sampled_features=basis.tokens[batch.completion_ids],
        change=H_new - H_old,
        slope=slope,
        curvature=curvature,
        new_probability=p_new,
    )


def first_derivative(
    q: Tensor, scores: TokenScores, tangents: TokenTangents, estimator: Reweighting
) -> Tensor:
    """`d/ds [H_seq, H_tok]` of an estimator at `s = 0` along the step the tangents belong to, nats.

    For `snis` this is the first-order prediction with `matched` weights, for `per_decision` the one with `causal`
    weights and the mean over all sequences as baseline.
    """

    def moved(log_ratio: Tensor, h: Tensor) -> Tensor:
        return reweighted_entropy(q, log_ratio, h, scores.mask, estimator)

    at = (torch.zeros_like(scores.logprob), scores.entropy)
    return torch.func.jvp(moved, at, (tangents.logprob, tangents.entropy))[1]  # type: ignore[no-any-return]
