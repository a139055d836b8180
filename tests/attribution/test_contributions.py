"""What every token of U adds to deltaH1: an identity, and the same as one backward per token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from probe.attribution.contributions import PARTS
from probe.attribution.objectives import OBJECTIVES, blocks_of, changes, objectives
from probe.estimators.entropy_gradient import entropy_gradient
from probe.estimators.loss_settings import LossSettings
from probe.estimators.prediction import token_first_order
from probe.estimators.reward_gradient import reward_weights
from probe.parameters import inner_product
from probe.phases.update import optimizer_step
from probe.scoring import score_tokens
from probe.scoring.forward_mode import forward_tangents
from probe.scoring.gradients import token_gradients
from tests.support.attributed import attributed, batches, reward_of, with_history
from tests.support.enumerable import all_sequences, naive_scores, tiny_policy
from tests.support.exact import enumerate_prompts, exact, sample_rows

EVERYTHING = LossSettings(loss="grpo", kl_coef=0.3, entropy_coef=0.2)


def off_policy(policy, U, seed=4):
    """U with old log-probs, and log-probs of a reference."""
    g = torch.Generator().manual_seed(seed)
    scores, shape = score_tokens(policy, U), U.mask.shape
    old = scores.logprob + 0.2 * torch.randn(shape, generator=g, dtype=torch.float64)
    return replace(U, old_logprobs=old), scores.logprob + 0.3 * torch.randn(
        shape, generator=g, dtype=torch.float64
    )


@pytest.mark.parametrize("rule", ["adam", "adam_decay", "adamw"])
@pytest.mark.parametrize("loss", ["grpo", "dapo", "reinforce", "cispo", "sapo"])
@pytest.mark.parametrize("lora", [True, False])
def test_the_parts_add_up_to_the_prediction(monkeypatch, rule, loss, lora):
    """Identity 6: with clipping, ratios, KL, entropy bonus, momentum and decay, for both estimands."""
    policy = tiny_policy(monkeypatch, lora=lora)
    E, U = batches(policy)
    U, reference = off_policy(policy, U)
    settings = LossSettings(
        loss=loss, kl_coef=0.3, entropy_coef=0.2, clip_high=3.0 if loss == "cispo" else 0.2
    )
    made = attributed(policy, E, U, settings, rule, reference=reference)
    X = entropy_gradient(policy, E, made.E_scores)
    assert made.update.clip_factor < 0.9
    for estimand, of in (("sequence", X.sequence), ("token", X.token)):
        parts = {name: getattr(one.deltaH1, estimand).value for name, one in made.found.parts.items()}
        size = max(map(abs, parts.values()))
        assert set(parts) == set(PARTS) - {"router"}
        assert abs(sum(parts.values()) - inner_product(of, made.update.step)) < 1e-12 * max(size, 1e-3)
        assert abs(getattr(made.found.total.deltaH1, estimand).value - sum(parts.values())) < 1e-15
        assert all(abs(value) > 1e-9 for name, value in parts.items() if name != "decay")
        assert (parts["decay"] != 0) == (rule != "adam")
    assert made.found.completeness < 1e-12


def test_it_is_the_prediction_made_of_derivatives_of_the_other_batch(monkeypatch):
    """Derivatives of U along P X, and derivatives of E along the step: two ways around to one number."""
    policy = tiny_policy(monkeypatch)
    E, U = batches(policy)
    made = attributed(policy, E, U)
    by_tokens = token_first_order(made.taker.passes.scores, made.taker.passes.tangents, E.group)
    for mine, other in zip(made.found.total.deltaH1, by_tokens.total, strict=True):
        assert mine.value == pytest.approx(other.value, rel=1e-10)
    for mine, other in zip(made.found.total.state_fixed, by_tokens.pathwise, strict=True):
        assert mine.value == pytest.approx(other.value, rel=1e-10)


def test_a_contribution_is_a_backward_of_that_token_alone(monkeypatch):
    policy = tiny_policy(monkeypatch)
    E, U = batches(policy, prompts=4, G=3)
    U, reference = off_policy(policy, U)
    made = attributed(policy, E, U, EVERYTHING, reference=reference)
    X = entropy_gradient(policy, E, made.E_scores)
    by_token = made.found.by_token()
    l, _ = naive_scores(policy, U)
    parameters = list(policy.parameters.items())
    names = [name for name, _ in parameters]
    for i, t in U.mask.nonzero().tolist():
        gradient = torch.autograd.grad(l[i, t], [p for _, p in parameters], retain_graph=True)
        part = {
            name: made.taker.closed.gradient_map[name] * made.weights.policy[i, t] * g.double()
            for name, g in zip(names, gradient, strict=True)
        }
        assert float(by_token[0, i, t]) == pytest.approx(inner_product(X.sequence, part), rel=1e-9, abs=1e-15)
        assert float(by_token[1, i, t]) == pytest.approx(inner_product(X.token, part), rel=1e-9, abs=1e-15)
    assert int((by_token[0] != 0).sum()) == int((made.weights.policy != 0).sum())


def test_a_token_whose_weight_is_doubled_changes_the_prediction_by_its_contribution(monkeypatch):
    """With the preconditioner held, exactly; with it free, by less or more: the step then knows the token twice."""
    policy = tiny_policy(monkeypatch)
    E, U = batches(policy)
    made = attributed(policy, E, U, max_grad_norm=None)
    X = entropy_gradient(policy, E, made.E_scores)
    c = made.found.by_token()[0]
    i, t = (int(x) for x in (c.abs() == c.abs().max()).nonzero()[0])
    doubled = made.weights.policy.clone()
    doubled[i, t] *= 2

    def constants(sequence, position, l, h):
        return doubled[sequence, position].unsqueeze(0), torch.zeros_like(h).unsqueeze(0)

    (gradient,), _ = token_gradients(policy, U, constants, 1)
    before = inner_product(X.sequence, made.update.step)
    closed = made.taker.closed
    held = {n: closed.momentum[n] + closed.decay[n] + closed.gradient_map[n] * g for n, g in gradient.items()}
    free = optimizer_step(made.optimizer, policy.parameters, gradient, None).step
    with_held = inner_product(X.sequence, held) - before
    with_free = inner_product(X.sequence, free) - before
    assert with_held == pytest.approx(float(c[i, t]), rel=1e-9)
    assert with_free != pytest.approx(float(c[i, t]), rel=1e-3)
    assert abs(with_free - float(c[i, t])) < abs(float(c[i, t]))  # of its order all the same


def test_the_reward_is_attributed_by_the_exact_gradient_of_its_expectation(monkeypatch):
    """The mean over all samples of E, which are enumerated, is the derivative of the exact expected reward."""
    policy = tiny_policy(monkeypatch)
    whole = all_sequences(cap=3)
    rewards, probability = reward_of(whole), score_tokens(policy, whole).sequence_logprob.exp()
    l, _ = naive_scores(policy, whole)
    exact = torch.autograd.grad(
        (l.sum(1).exp() * rewards).sum(), list(policy.parameters.values()), retain_graph=True
    )
    # over all pairs of responses: the baseline of each is the other's reward
    total = [torch.zeros_like(g) for g in exact]
    per_row = []
    for i in range(len(whole)):
        found = torch.autograd.grad(l[i].sum(), list(policy.parameters.values()), retain_graph=True)
        per_row.append(found)
    for i in range(len(whole)):
        for j in range(len(whole)):
            pair = torch.stack([rewards[i], rewards[j]])
            weights = reward_weights(pair, torch.ones(2, 1, dtype=torch.bool))[:, 0]
            for k, g in enumerate(total):
                g += (
                    float(probability[i] * probability[j])
                    * sum(float(weights[a]) * per_row[row][k] for a, row in enumerate((i, j)))
                    / 2
                )
    for mine, other in zip(total, exact, strict=True):
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-12)


def test_blocks_add_up_and_their_number_changes_no_value(monkeypatch):
    policy = tiny_policy(monkeypatch)
    E, U = batches(policy)
    few, many = (attributed(policy, E, U, blocks=n) for n in (3, 40))
    for mine, other in zip(few.found.total.parts, many.found.total.parts, strict=True):
        assert mine.value == pytest.approx(other.value, rel=1e-9)
    for made in (few, many):
        held = made.found.sensitivities
        assert len(held.logprob) == len(OBJECTIVES)
        summed = held.block_logprob.double().sum(1)
        assert torch.allclose(summed, held.logprob, rtol=1e-2, atol=1e-3 * float(held.logprob.abs().max()))
    # one part per prompt: the error is the jackknife's over prompts, which phase 3 gives deltaH1
    each = attributed(policy, E, U, blocks=len(E))
    by_tokens = token_first_order(each.taker.passes.scores, each.taker.passes.tangents, E.group).total
    for mine, other in zip(each.found.total.deltaH1, by_tokens, strict=True):
        assert mine.se == pytest.approx(other.se, rel=0.1)


def test_without_rewards_there_is_no_reward(monkeypatch):
    policy = tiny_policy(monkeypatch)
    E, U = batches(policy)
    made = attributed(policy, replace(E, rewards=None), U)
    assert made.found.total.deltaR1 is None
    assert len(made.found.by_token()) == 4


def test_differences_of_forwards_take_the_place_of_forward_mode(monkeypatch):
    policy = tiny_policy(monkeypatch)
    E, U = batches(policy)
    exact, differences = (attributed(policy, E, U, way=way) for way in ("jvp", "finite_difference"))
    assert 0 < differences.found.completeness < 2e-2
    for mine, other in zip(differences.found.total.parts, exact.found.total.parts, strict=True):
        assert mine.value == pytest.approx(other.value, rel=2e-2)


@pytest.mark.slow
def test_intervals_cover_the_exact_change(monkeypatch):
    """Intervals over E of momentum's and the tokens' parts, and of the reward, against the exact gradients."""
    policy = tiny_policy(monkeypatch)
    E, U = batches(policy, prompts=6)
    made = attributed(policy, E, U)
    whole = enumerate_prompts([(0, 1), (1, 2), (2, 2), (0, 0)], cap=4)
    rewards = reward_of(whole)
    H, p = exact(policy, whole)
    parameters = list(policy.parameters.values())
    names = list(policy.parameters)

    def by_name(value):
        found = torch.autograd.grad(value, parameters, retain_graph=True)
        return dict(zip(names, found, strict=True))

    gradients = [by_name(H[0]), by_name(H[1]), by_name((p * rewards).sum())]
    closed = made.taker.closed
    truth = torch.tensor(
        [
            [inner_product(g.__getitem__, part) for g in gradients]
            for part in (closed.momentum, closed.gradient)
        ]
    )
    # what a response of E adds to each objective along either part, once for all of the sample space
    scores = score_tokens(policy, whole)
    along = [forward_tangents(policy, whole, part) for part in (closed.momentum, closed.gradient)]
    g, covered, repetitions = torch.Generator().manual_seed(0), torch.zeros(2, 3), 600
    for _ in range(repetitions):
        rows, group = sample_rows(p.detach(), 128, 1, whole.group, g)
        on = objectives(scores.rows(rows), rewards[rows], "causal", "loo_position")
        blocks = blocks_of(on, group, 8)
        terms = torch.stack(
            [
                (on.of_logprob * one.logprob[rows] + on.of_entropy * one.entropy[rows]).sum(-1) / len(rows)
                for one in along
            ]
        )  # (2, K, B)
        by_block = torch.stack([terms[:, :, r].sum(-1) for r in blocks.rows], -1)  # (2, K, P)
        of = by_block.transpose(0, 1)
        for part, change in enumerate(changes(of.sum(-1), of.contiguous(), blocks)):
            found = (*change.deltaH1, change.deltaR1)
            for k, one in enumerate(found):
                low, high = one.ci95
                covered[part, k] += float(low <= float(truth[part, k]) <= high)
    share = covered / repetitions
    error = (0.95 * 0.05 / repetitions) ** 0.5
    assert bool((share > 0.93 - 2 * error).all()), share
    assert bool((share < 0.97 + 2 * error).all()), share


def test_the_history_is_what_momentum_is_made_of(monkeypatch):
    policy = tiny_policy(monkeypatch)
    E, U = batches(policy)
    fresh = torch.optim.AdamW(list(policy.parameters.values()), lr=1e-2, weight_decay=0.0)
    made = attributed(policy, E, U, optimizer=fresh)
    assert made.found.parts["momentum"].deltaH1.token.value == 0.0
    assert (
        attributed(policy, E, U, optimizer=with_history(policy)).found.parts["momentum"].deltaH1.token.value
        != 0
    )
