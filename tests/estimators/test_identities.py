"""The identities every implementation must pass, on a policy that can be enumerated, in float64."""

from __future__ import annotations

import operator
from dataclasses import replace

import pytest
import torch

from probe.errors.exceptions import OptimizerStateError
from probe.estimators.adam import adam_closed_form, preconditioned_direction
from probe.estimators.entropy_change import entropy_change, reweighted_entropy
from probe.estimators.entropy_gradient import entropy_gradient
from probe.estimators.ground_truth import reweighted_change
from probe.estimators.loss_settings import LossSettings
from probe.estimators.prediction import first_order, from_tokens, token_first_order
from probe.estimators.update import loss_gradient
from probe.parameters import inner_product
from probe.phases.update import optimizer_step
from probe.scoring import Policy, TokenScores, score_tokens
from probe.scoring.differences import difference_pair
from probe.scoring.forward_mode import forward_tangents
from probe.scoring.scores import TokenTangents
from probe.snapshot import parameters_at
from tests.support import tiny_models
from tests.support.enumerable import all_sequences, as_batch, exact_entropies, naive_scores, tiny_policy
from tests.support.exact import first_derivative

NUMBERS = ("deltaH1", "pathwise", "score")


def flat(gradient) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradient.values()])


def exact_gradients(policy, batch):
    H_seq, H_tok, probability = exact_entropies(policy, batch)
    parameters = policy.parameters
    out = []
    for value in (H_seq, H_tok):
        found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        out.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(parameters.values(), found, strict=True)
                ]
            )
        )
    return out[0], out[1], probability.detach()


def sampled(probability, batch, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return batch.subset(torch.multinomial(probability, count, replacement=True, generator=generator))


@pytest.mark.parametrize("lora", [True, False])
def test_scores_equal_a_naive_reference(monkeypatch, lora):
    policy, batch = tiny_policy(monkeypatch, lora=lora), all_sequences()
    scores = score_tokens(policy, batch)
    l, h = (x.detach() for x in naive_scores(policy, batch))
    torch.testing.assert_close(scores.logprob, l, rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.entropy, h, rtol=0, atol=1e-12)
    assert scores.sequence_logprob.exp().sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(("weighting", "baseline"), [("causal", "none"), ("matched", "none")])
def test_mean_of_x_is_the_exact_gradient(monkeypatch, lora, weighting, baseline):
    policy, batch = tiny_policy(monkeypatch, lora=lora), all_sequences()
    exact_seq, exact_tok, probability = exact_gradients(policy, batch)
    x = entropy_gradient(policy, batch, score_tokens(policy, batch), weighting, baseline, probability)
    names = policy.parameters
    found_seq, found_tok = (torch.cat([of(n).flatten() for n in names]) for of in (x.sequence, x.token))
    assert exact_seq.norm() > 0.1
    torch.testing.assert_close(found_seq, exact_seq, rtol=0, atol=1e-10)
    torch.testing.assert_close(found_tok, exact_tok, rtol=0, atol=1e-10)


@pytest.mark.parametrize("baseline", ["loo_position", "ridge"])
def test_baselines_from_other_sequences_leave_the_gradient_unbiased(monkeypatch, baseline):
    """Over all pairs of sequences, weighted by their probability, the mean of X is the exact gradient.

    Of E[N] and of E[T]; those of the token estimand are made of both.
    """
    policy, batch = tiny_policy(monkeypatch, seed=1), all_sequences(cap=2)
    exact_seq, _, probability = exact_gradients(policy, batch)
    scores = score_tokens(policy, batch)
    lengths = (naive_scores(policy, batch)[0].sum(1).exp() * batch.mask.sum(1)).sum()
    of_length = torch.autograd.grad(lengths, list(policy.parameters.values()), allow_unused=True)
    exact_length = flat(
        {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(policy.parameters.items(), of_length, strict=True)
        }
    )
    mean, mean_length = torch.zeros_like(exact_seq), torch.zeros_like(exact_seq)
    for i in range(len(batch)):
        for j in range(len(batch)):
            pair = torch.tensor([i, j])
            pair_scores = replace(
                scores, logprob=scores.logprob[pair], entropy=scores.entropy[pair], mask=scores.mask[pair]
            )
            x = entropy_gradient(policy, batch.subset(pair), pair_scores, "causal", baseline)
            weight = probability[i] * probability[j]
            mean += weight * torch.cat([x.sequence(n).flatten() for n in policy.parameters])
            mean_length += weight * flat(x.length)
    assert exact_length.norm() > 1e-2
    torch.testing.assert_close(mean, exact_seq, rtol=0, atol=1e-10)
    torch.testing.assert_close(mean_length, exact_length, rtol=0, atol=1e-10)


def test_reverse_mode_equals_a_finite_difference_of_the_objective(monkeypatch):
    """<X, v> against differences of the sum whose gradient X is, score weights held."""
    policy, batch = tiny_policy(monkeypatch), all_sequences()
    scores = score_tokens(policy, batch)
    x = entropy_gradient(policy, batch, scores, "causal", "loo_position")
    generator = torch.Generator().manual_seed(3)
    v = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in policy.parameters.items()}

    def objective(eps):
        shifted = {n: p.detach() + eps * v[n] for n, p in policy.parameters.items()}
        with parameters_at(policy.parameters, shifted):
            s = score_tokens(policy, batch)
        return float((s.entropy + x.weights.entropy * s.logprob).sum() / len(batch))

    eps = 1e-5
    difference = (objective(eps) - objective(-eps)) / (2 * eps)
    assert inner_product(x.sequence, v) == pytest.approx(difference, rel=1e-6)


def random_direction(policy, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for n, p in policy.parameters.items()
    }


def assert_same_prediction(found, expected, rel):
    """All six numbers, each relative to the larger part of the `sequence` estimand: what they are sums of may
    cancel."""
    size = max(abs(expected.pathwise.sequence), abs(expected.score.sequence))
    per_token = expected.pathwise.token / expected.pathwise.sequence
    for name in NUMBERS:
        off = getattr(found, name).with_other(operator.sub, getattr(expected, name))
        assert abs(off.sequence) <= rel * size, name
        assert abs(off.token) <= rel * size * per_token, name


@pytest.mark.parametrize("weighting", ["causal", "matched"])
@pytest.mark.parametrize(
    ("lora", "layers", "attention"), [(True, 2, "sdpa"), (False, 1, "sdpa"), (True, 1, "eager")]
)
def test_forward_mode_reverse_mode_and_differences_are_one_number(
    monkeypatch, weighting, lora, layers, attention
):
    """Identity 2, in every part: 1e-9 between the first two, 1e-6 for the third."""
    policy, batch = tiny_policy(monkeypatch, lora=lora, layers=layers), all_sequences()
    (policy.model.get_base_model() if lora else policy.model).set_attn_implementation(attention)
    exactly = 1e-9 if attention == "sdpa" else 1e-6  # eager attention has its softmax in float32
    E = sampled(exact_entropies(policy, batch)[2].detach(), batch, 48, seed=3)
    scores, v = score_tokens(policy, E), random_direction(policy)
    reverse = first_order(entropy_gradient(policy, E, scores, weighting), v, 1.0)
    assert min(abs(value) for name in NUMBERS for value in getattr(reverse, name)) > 1e-3

    def per_token(tangents):
        return from_tokens(token_first_order(scores, tangents, E.group, weighting), 1.0)

    assert_same_prediction(per_token(forward_tangents(policy, E, v)), reverse, exactly)
    if attention == "sdpa":
        assert_same_prediction(per_token(difference_pair(policy, E, v, 5e-7).tangents), reverse, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("baseline", ["loo_position", "ridge"])
def test_forward_mode_equals_reverse_mode_on_an_ordinary_model(dtype, baseline):
    """A Qwen2 as the library has it, whose norms compute in float32: 1e-5."""
    policy = Policy(tiny_models.tiny_model().to(dtype).eval(), temperature=0.9, microbatch_size=5)
    generator = torch.Generator().manual_seed(4)
    rows = [
        tuple(torch.randint(3, tiny_models.VOCABULARY, (n,), generator=generator).tolist())
        for n in (9, 4, 7, 1, 9, 6, 5)
    ]
    # without the padding token: the embedding's backward leaves its row out, as in training
    E = replace(as_batch(rows), prompt_ids=((7, 5),) * len(rows))
    scores = score_tokens(policy, E)
    v = {n: 0.01 * d for n, d in random_direction(policy).items()}
    reverse = first_order(entropy_gradient(policy, E, scores, "causal", baseline), v, 1e-3)
    forward = from_tokens(
        token_first_order(scores, forward_tangents(policy, E, v), E.group, "causal", baseline), 1e-3
    )
    assert_same_prediction(forward, reverse, 1e-5)
    assert list(forward.bars_dot) == pytest.approx([1e3 * value for value in forward.deltaH1])


ESTIMATORS = ["snis", "per_decision"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_predictions_are_the_derivatives_of_the_measured_change(monkeypatch, estimator):
    """Identities 3 and 4: d/d eta deltaH(eta) at 0 equals the prediction on the same E: no sampling error at all.

    `snis` belongs to `matched` weights, `per_decision` to `causal` ones with the mean over all sequences at a position,
    the finished ones included, as the baseline.
    """
    policy, batch = tiny_policy(monkeypatch, layers=2), all_sequences()
    E = sampled(exact_entropies(policy, batch)[2].detach(), batch, 64, seed=5)
    scores, Y = score_tokens(policy, E), random_direction(policy)
    ones = torch.ones(len(E), dtype=torch.float64)
    tangents = forward_tangents(policy, E, Y)
    exact = first_derivative(ones, scores, tangents, estimator)
    if estimator == "snis":
        predicted = [e.value for e in token_first_order(scores, tangents, E.group, "matched").total]
        by_backward = first_order(entropy_gradient(policy, E, scores, "matched"), Y, 1.0)
        assert list(by_backward.deltaH1) == pytest.approx(exact.tolist(), rel=1e-9)
    else:
        predicted = causal_with_batch_mean(scores, tangents)
    assert predicted == pytest.approx(exact.tolist(), rel=1e-10)
    assert min(abs(x) for x in predicted) > 1e-2

    def measured(eta):
        new = score_tokens(policy.at({n: p.detach() + eta * Y[n] for n, p in policy.parameters.items()}), E)
        truth = reweighted_change(scores, new).estimates[estimator]
        return torch.tensor([e.value for e in truth], dtype=torch.float64)

    eta = 3e-6
    fourth_order = (8 * (measured(eta) - measured(-eta)) - (measured(2 * eta) - measured(-2 * eta))) / (
        12 * eta
    )
    assert fourth_order.tolist() == pytest.approx(predicted, rel=1e-8)


def causal_with_batch_mean(scores, tangents):
    """The causal prediction with position-wise batch means as baselines, as a loop over sequences and positions."""
    h, on = scores.entropy, scores.mask.double()
    B, T = h.shape
    slope = {}
    for name, x, dx in (("N", h, tangents.entropy), ("T", on, torch.zeros_like(h))):
        to_go = [[float(x[i, t + 1 :].sum()) for t in range(T)] for i in range(B)]
        baseline = [sum(to_go[i][t] for i in range(B)) / B for t in range(T)]
        slope[name] = (
            sum(
                float(dx[i, t]) + float(tangents.logprob[i, t]) * (to_go[i][t] - baseline[t])
                for i in range(B)
                for t in range(T)
            )
            / B
        )
    N, length = float(h.sum()) / B, float(on.sum()) / B
    return [slope["N"], (slope["N"] - N / length * slope["T"]) / length]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("lora", [True, False])
def test_reweighting_the_whole_space_gives_the_new_entropy(monkeypatch, estimator, lora):
    """With every sequence weighted by its probability, both estimators are exact, however large the update."""
    policy, batch = tiny_policy(monkeypatch, lora=lora), all_sequences()
    old = score_tokens(policy, batch)
    shifted = {
        n: p.detach() + 0.1 * d
        for (n, p), d in zip(policy.parameters.items(), random_direction(policy).values(), strict=True)
    }
    new = score_tokens(policy.at(shifted), batch)
    with torch.no_grad():
        *H_old, q = exact_entropies(policy, batch)
        with parameters_at(policy.parameters, shifted):
            *H_new, _ = exact_entropies(policy, batch)
    found = reweighted_entropy(q, new.logprob - old.logprob, new.entropy, batch.mask, estimator)
    change = entropy_change(7.0 * q, old, new, estimator)
    for k in range(2):
        assert abs(float(H_new[k] - H_old[k])) > 1e-2
        assert float(found[k]) == pytest.approx(float(H_new[k]), abs=1e-12)
        assert float(change[k]) == pytest.approx(float(H_new[k] - H_old[k]), abs=1e-12)


@pytest.mark.parametrize("weighting", ["causal", "matched"])
def test_predictions_per_token_follow_the_definition(weighting):
    """Against a loop over sequences, tokens and, for the baseline, the other sequences."""
    g = torch.Generator().manual_seed(2)
    mask = torch.arange(5) < torch.tensor([2, 5, 3, 1, 4, 3]).unsqueeze(1)
    h, l, dl, dh = (torch.randn(6, 5, generator=g, dtype=torch.float64) * mask for _ in range(4))
    found = token_first_order(TokenScores(l, h, mask), TokenTangents(dl, dh), torch.arange(6), weighting)
    on = mask.double()
    slope = {}
    for name, x in (("N", h), ("T", on)):
        total = 0.0
        for i in range(6):
            for t in range(int(on[i].sum())):
                if weighting == "matched":
                    weight = float(x[i].sum() - x.sum() / 6)
                else:
                    others = [float(x[j, t + 1 :].sum()) for j in range(6) if j != i and mask[j, t]]
                    weight = float(x[i, t + 1 :].sum()) - (sum(others) / len(others) if others else 0.0)
                total += weight * float(dl[i, t])
        slope[name] = total / 6
    N, length, path = float(h.sum()) / 6, float(on.sum()) / 6, float(dh.sum()) / 6
    score_tok = (slope["N"] - N / length * slope["T"]) / length
    assert [e.value for e in found.pathwise] == pytest.approx([path, path / length], abs=1e-13)
    assert [e.value for e in found.score] == pytest.approx([slope["N"], score_tok], abs=1e-13)
    assert [e.value for e in found.total] == pytest.approx(
        [path + slope["N"], path / length + score_tok], abs=1e-13
    )


def make_update(policy, E, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    U = replace(E, advantages=torch.randn(len(E), generator=generator, dtype=torch.float64))
    gradient = loss_gradient(policy, U, LossSettings()).gradient
    return gradient, optimizer_step(optimizer, policy.parameters, gradient, max_grad_norm=0.01)


@pytest.mark.parametrize("rule", ["adam", "adamw", "amsgrad", "maximize", "adam_decay"])
def test_the_closed_form_is_the_step(monkeypatch, rule):
    policy, batch = tiny_policy(monkeypatch), all_sequences(cap=3)
    parameters = list(policy.parameters.values())
    settings = {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizer = {
        "adam": lambda: torch.optim.Adam(parameters, **settings),
        "adam_decay": lambda: torch.optim.Adam(parameters, **settings, weight_decay=0.1),
        "adamw": lambda: torch.optim.AdamW(
            [{"params": parameters[:3], "weight_decay": 0.1, "lr": 3e-3}, {"params": parameters[3:]}],
            **settings,
        ),
        "amsgrad": lambda: torch.optim.AdamW(parameters, **settings, amsgrad=True),
        "maximize": lambda: torch.optim.AdamW(parameters, **settings, maximize=True),
    }[rule]()
    generator = torch.Generator().manual_seed(11)
    for _ in range(3):  # moments with a history
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    optimizer.zero_grad()
    gradient, taken = make_update(policy, batch, optimizer)
    step, norm, factor = taken.step, taken.gradient_norm, taken.clip_factor
    assert norm > 0.01 > norm * factor * 0.99  # clipping was at work
    closed = adam_closed_form(optimizer, policy.parameters, gradient, factor).total()
    torch.testing.assert_close(flat(step), flat(closed), rtol=1e-9, atol=1e-15)


def test_numbers_do_not_depend_on_the_microbatch_size(monkeypatch):
    batch = all_sequences()
    results = []
    for size, chunk in ((1, 1), (7, 3), (200, 10_000)):
        policy = tiny_policy(monkeypatch, microbatch_size=size, head_chunk_tokens=chunk)
        scores = score_tokens(policy, batch)
        x = entropy_gradient(policy, batch, scores, "causal", "loo_position")
        U = replace(batch, advantages=torch.linspace(-1, 1, len(batch), dtype=torch.float64))
        g = loss_gradient(policy, U, LossSettings(loss="dapo")).gradient
        results.append(
            torch.cat([flat(x.total), flat(x.length), flat(x.pathwise), flat(g), scores.logprob.flatten()])
        )
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-12)


def test_the_preconditioned_direction_is_the_gradient_over_the_saved_second_moment(monkeypatch):
    policy = tiny_policy(monkeypatch)
    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=1e-3, betas=(0.9, 0.95), eps=1e-6)
    generator = torch.Generator().manual_seed(1)
    history = []
    for _ in range(3):
        for p in policy.parameters.values():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        history.append({n: p.grad.clone() for n, p in policy.parameters.items()})
        optimizer.step()
    gradient = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in policy.parameters.items()
    }
    found = preconditioned_direction(optimizer, policy.parameters, gradient)
    for name in policy.parameters:
        v_hat = sum(0.05 * 0.95 ** (2 - k) * history[k][name] ** 2 for k in range(3)) / (1 - 0.95**3)
        torch.testing.assert_close(found[name], -gradient[name] / (v_hat.sqrt() + 1e-6))
    with pytest.raises(OptimizerStateError, match="and AdamW, found SGD"):
        preconditioned_direction(
            torch.optim.SGD(policy.parameters.values(), lr=1.0), policy.parameters, gradient
        )
    some = torch.optim.AdamW(list(policy.parameters.values())[1:])
    with pytest.raises(OptimizerStateError, match="every parameter in the optimizer"):
        adam_closed_form(some, policy.parameters, gradient)


def test_the_loss_gradient_is_that_of_the_loss_written_out(monkeypatch):
    """PPO ratios on both sides of an asymmetric clip range, per token, through the model; and the weights kept."""
    policy, batch = tiny_policy(monkeypatch), all_sequences(cap=3)
    generator = torch.Generator().manual_seed(2)
    l, h = naive_scores(policy, batch)
    old = l.detach() + 0.4 * torch.randn(l.shape, generator=generator, dtype=l.dtype)
    A = torch.randn(len(batch), generator=generator, dtype=l.dtype)
    settings = LossSettings(loss="dapo", clip_low=0.1, clip_high=0.4, entropy_coef=0.05)
    found = loss_gradient(policy, replace(batch, advantages=A, old_logprobs=old), settings)
    ratio, a = (l - old).exp(), A.unsqueeze(1)
    per_token = -torch.min(ratio * a, ratio.clamp(0.9, 1.4) * a) - 0.05 * h
    loss = per_token[batch.mask].mean()
    of_l = torch.autograd.grad(loss, l, retain_graph=True)[0] * batch.mask
    torch.testing.assert_close(found.weights, of_l, rtol=1e-9, atol=1e-12)
    expected = torch.autograd.grad(loss, list(policy.parameters.values()))
    for (name, _), e in zip(policy.parameters.items(), expected, strict=True):
        torch.testing.assert_close(found.gradient[name], e, rtol=1e-8, atol=1e-11)
    with pytest.raises(ValueError, match="with advantages"):
        loss_gradient(policy, batch, settings)


def test_first_order_refusals(monkeypatch):
    policy, batch = tiny_policy(monkeypatch), all_sequences(cap=2)
    x = entropy_gradient(policy, batch, score_tokens(policy, batch))
    step = {n: torch.zeros_like(p) for n, p in policy.parameters.items()}
    assert list(first_order(x, step, 1e-3).deltaH1) == [0.0, 0.0]
    with pytest.raises(ValueError, match="expected a step for the parameters of X"):
        first_order(x, {}, 1e-3)
    with pytest.raises(ValueError, match="learning_rate: expected a number above 0"):
        first_order(x, step, 0.0)
