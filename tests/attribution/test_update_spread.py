"""deltaH1 as a constant and a sum over the prompts of U."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from probe.attribution.update_spread import preconditioned, prompt_contributions, spread
from probe.estimators.adam import adam_closed_form
from probe.estimators.entropy_gradient import entropy_gradient
from probe.estimators.loss_settings import LossSettings
from probe.estimators.update import loss_gradient
from probe.parameters import inner_product
from probe.phases.update import optimizer_step
from probe.scoring import score_tokens
from probe.scoring.forward_mode import forward_tangents
from tests.support.enumerable import all_sequences, tiny_policy

RULES = ["adam", "adam_decay", "adamw", "adamw_groups", "maximize", "maximize_decay", "amsgrad"]


def make_optimizer(rule, parameters):
    settings = {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-6}
    if rule == "adamw_groups":
        groups = [
            {"params": parameters[:3], "weight_decay": 0.2, "lr": 3e-3, "betas": (0.5, 0.9)},
            {"params": parameters[3:], "eps": 1e-4},
        ]
        return torch.optim.AdamW(groups, **settings)
    kind = (
        torch.optim.Adam if rule.startswith(("adam_", "maximize_")) or rule == "adam" else torch.optim.AdamW
    )
    return kind(
        parameters,
        **settings,
        weight_decay=0.0 if rule == "adam" else 0.1,
        maximize=rule.startswith("maximize"),
        amsgrad=rule == "amsgrad",
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_the_parts_add_up_to_the_prediction(monkeypatch, rule, loss):
    """Completeness: `<X, step> = momentum + decay + sum over prompts`, with clipping, KL, ratios, entropy bonus."""
    policy, U = tiny_policy(monkeypatch), all_sequences(cap=3)
    g = torch.Generator().manual_seed(4)
    B, shape = len(U), U.mask.shape
    scores = score_tokens(policy, U)
    U = replace(
        U,
        group=torch.arange(B) % 7,
        advantages=torch.randn(B, generator=g, dtype=torch.float64),
        old_logprobs=scores.logprob + 0.2 * torch.randn(shape, generator=g, dtype=torch.float64),
    )
    reference = scores.logprob + 0.3 * torch.randn(shape, generator=g, dtype=torch.float64)
    optimizer = make_optimizer(rule, list(policy.parameters.values()))
    for _ in range(3):  # moments with a history
        for p in policy.parameters.values():
            p.grad = 0.02 * torch.randn(p.shape, generator=g, dtype=p.dtype)
        optimizer.step()
    optimizer.zero_grad()
    settings = LossSettings(loss=loss, kl_coef=0.3, entropy_coef=0.2)
    update = loss_gradient(policy, U, settings, reference)
    taken = optimizer_step(optimizer, policy.parameters, update.gradient, max_grad_norm=0.02)
    step, norm, factor = taken.step, taken.gradient_norm, taken.clip_factor
    assert factor < 0.9
    parts = adam_closed_form(optimizer, policy.parameters, update.gradient, factor)
    X = entropy_gradient(policy, U, score_tokens(policy, U))
    for of in (X.sequence, X.token):
        deltaH1 = inner_product(of, step)
        u = preconditioned(parts.gradient_map, {name: of(name) for name in step})
        tangents = forward_tangents(policy, U, u)
        by_prompt = prompt_contributions(tangents, update.weights, update.entropy_weights, U.group)
        momentum, decay = inner_product(of, parts.momentum), inner_product(of, parts.decay)
        total = momentum + decay + float(by_prompt.sum())
        assert len(by_prompt) == 7
        size = max(abs(momentum), abs(decay), float(by_prompt.abs().max()))
        assert abs(total - deltaH1) < 1e-10 * size
        # nothing is there by accident
        assert float(by_prompt.abs().max()) > 1e-3 * size
        assert (decay != 0.0) == (rule != "adam")
        without_bonus = prompt_contributions(tangents, update.weights, 0 * update.weights, U.group)
        assert float((without_bonus - by_prompt).abs().max()) > 1e-3 * float(by_prompt.abs().max())
    assert norm > 0.02


def test_contributions_are_by_prompt_and_depend_on_its_own_tokens_only(monkeypatch):
    policy, U = tiny_policy(monkeypatch), all_sequences(cap=2)
    group = torch.tensor([40, 7, 7, 40, 7, 9, 9, 9, 40, 7, 9, 9, 40])
    g = torch.Generator().manual_seed(0)
    tangents = forward_tangents(
        policy, U, {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in policy.parameters.items()}
    )
    a, b = (torch.randn(U.mask.shape, generator=g, dtype=torch.float64) * U.mask for _ in range(2))
    found = prompt_contributions(tangents, a, b, group)
    for k, p in enumerate((7, 9, 40)):
        own = group == p
        expected = float((a * tangents.logprob + b * tangents.entropy)[own].sum())
        assert float(found[k]) == pytest.approx(expected, rel=1e-12)


def test_the_spread_is_that_of_sums_over_fresh_prompts():
    """Batches of 6 prompts: the standard deviation of their sums, and its estimate from a single batch, on average."""
    g = torch.Generator().manual_seed(0)
    c = 0.5 + torch.randn(20_000, 6, generator=g, dtype=torch.float64)
    of_sums = float(c.sum(1).std())
    estimates = torch.tensor([spread(row) for row in c[:4000]], dtype=torch.float64)
    assert float(estimates.square().mean().sqrt()) == pytest.approx(of_sums, rel=0.03)
    assert of_sums == pytest.approx(math.sqrt(6), rel=0.03)


def test_one_prompt_has_no_spread():
    assert spread(torch.ones(1, dtype=torch.float64)) is None
    assert spread(torch.full((5,), 0.3, dtype=torch.float64)) == pytest.approx(0.0, abs=1e-15)
