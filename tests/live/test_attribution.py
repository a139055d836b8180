"""Which tokens of a training's own batch did it: the numbers of an attribution, and what is said otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from probe.attribution.token_classes import token_labels
from probe.errors.exceptions import ConfigError, DataError
from probe.estimators.entropy_gradient import entropy_gradient
from probe.estimators.loss_settings import LossSettings
from probe.estimators.step_parts import StepParts, step_parts
from probe.live import HostUpdate
from probe.live.attribution import CLASSES, joined, token_changes, token_entropy_gradient
from probe.scoring import score_tokens
from tests.support.attributed import attributed, batches, with_history
from tests.support.enumerable import tiny_policy
from tests.support.helpers import char_tokenizer
from tests.support.live_loops import attach, plain_step, small_loop

SETTINGS = LossSettings(loss="grpo", kl_coef=0.1, entropy_coef=0.05)


def made(monkeypatch):
    policy = tiny_policy(monkeypatch)
    E, U = batches(policy)
    scores = score_tokens(policy, U)
    g = torch.Generator().manual_seed(0)
    noise = [0.2 * torch.randn(U.mask.shape, generator=g, dtype=torch.float64) for _ in range(2)]
    U = replace(U, old_logprobs=scores.logprob + noise[0])
    reference = scores.logprob + noise[1]
    step = attributed(policy, E, U, SETTINGS, reference=reference)
    clip = step.update.clip_factor
    closed = step.taker.closed
    parts = StepParts(
        closed.momentum, closed.decay, 0.0, {n: P / clip for n, P in closed.gradient_map.items()}
    )
    return step, parts, reference


def changes(step, parts, update_of, policy=None):
    X = token_entropy_gradient(step.policy, step.E)
    return token_changes(
        policy or step.policy, X, parts, step.update.step, step.taker.passes, update_of, char_tokenizer()
    )


def test_the_gradient_is_that_of_the_token_entropy(monkeypatch):
    step, _, _ = made(monkeypatch)
    X = entropy_gradient(step.policy, step.E, step.E_scores)
    found = token_entropy_gradient(step.policy, step.E)
    for name in found:
        assert torch.allclose(found[name], X.token(name), rtol=1e-9, atol=1e-12)


def test_the_numbers_are_those_of_an_attribution(monkeypatch):
    """And the scale is the factor by which the gradient was clipped, which nobody has told."""
    step, parts, reference = made(monkeypatch)
    found = changes(step, parts, lambda policy: HostUpdate(step.U, SETTINGS, reference))
    assert not found.reason
    assert found.scale == pytest.approx(step.update.clip_factor, rel=1e-9)
    assert step.update.clip_factor < 0.9
    by_token = step.found.by_token()[1]
    labels = token_labels(step.U, step.update.scores.entropy, None)
    label, names = labels["advantage"]
    for name, of in (("positive", "positive advantage"), ("negative", "negative advantage")):
        expected = float(by_token[label == names.index(of)].sum())
        assert found.numbers[f"deltaH1_{name}"].token.value == pytest.approx(expected, rel=1e-9)
    assert found.numbers["deltaH1_right"].token.value + found.numbers[
        "deltaH1_wrong"
    ].token.value == pytest.approx(float(by_token.sum()), rel=1e-9)
    assert {name.removeprefix("deltaH1_") for name in found.numbers} <= set(CLASSES)


def test_another_batch_than_the_steps_is_found_out(monkeypatch):
    step, parts, _ = made(monkeypatch)
    other = replace(step.U, advantages=-step.U.advantages, old_logprobs=None)
    found = changes(step, parts, lambda policy: HostUpdate(other, LossSettings(loss="grpo")))
    assert "it is not the batch that the step was made from" in found.reason
    assert found.as_mapping() == {"attribution_reason": found.reason}


def test_a_batch_without_a_signal_adds_nothing(monkeypatch):
    """All rewards equal: no token has a weight, and what the step has in it is momentum's and rounding."""
    step, parts, _ = made(monkeypatch)
    flat = replace(step.U, advantages=torch.zeros(len(step.U)), old_logprobs=None)
    found = changes(step, parts, lambda policy: HostUpdate(flat, LossSettings(loss="grpo")))
    assert found.scale is None
    assert {one.token.value for one in found.numbers.values()} == {0.0}


def broken(policy):
    raise KeyError("completion_ids")


def refused(policy):
    raise DataError("expected rollouts, found none")


def without_advantages(step):
    return lambda policy: HostUpdate(replace(step.U, advantages=None), SETTINGS)


def test_what_cannot_be_read_is_said(monkeypatch):
    step, parts, _ = made(monkeypatch)
    assert changes(step, "no parts", broken).reason == "no parts"
    assert "the training's batch cannot be read" in changes(step, parts, broken).reason
    assert changes(step, parts, refused).reason == "DataError: expected rollouts, found none"
    assert changes(step, parts, without_advantages(step)).reason == "the training's batch has no advantages"
    lacking = changes(step, parts, lambda policy: HostUpdate(step.U, SETTINGS))
    assert "expected reference log-probs, found none" in lacking.reason
    experts = LossSettings(router_aux_loss_coef=0.1)
    assert "load-balancing loss" in changes(step, parts, lambda policy: HostUpdate(step.U, experts)).reason


def test_the_parts_of_several_processes_are_one_batch(monkeypatch):
    step, _, reference = made(monkeypatch)
    U = step.U
    rows = torch.arange(len(U)).chunk(3)
    short = int(U.lengths[rows[0]].max())

    def part(k):
        own = U.subset(rows[k])
        if k == 0:  # padded to its own longest response
            own = replace(
                own,
                completion_ids=own.completion_ids[:, :short],
                mask=own.mask[:, :short],
                old_logprobs=own.old_logprobs[:, :short],
            )
        return HostUpdate(own, SETTINGS, reference[rows[k]][:, : own.mask.shape[1]])

    whole = joined([part(k) for k in range(3)])
    assert torch.equal(whole.batch.mask, U.mask)
    assert torch.equal(whole.batch.completion_ids[U.mask], U.completion_ids[U.mask])
    assert torch.equal(whole.batch.advantages, U.advantages)
    assert torch.equal(whole.batch.old_logprobs[U.mask], U.old_logprobs[U.mask])
    assert torch.equal(whole.ref_logprobs[U.mask], reference[U.mask])
    assert len(whole.batch.prompt_ids) == len(U)
    one = HostUpdate(U, SETTINGS)
    assert joined([one]) is one
    with pytest.raises(DataError, match="the same columns of the batch on all processes"):
        joined([part(0), replace(part(1), ref_logprobs=None)])


@pytest.mark.parametrize("rule", ["adam", "adam_decay", "adamw", "sgd"])
def test_the_map_from_gradient_to_step_is_kept_where_it_is_asked_for(monkeypatch, rule):
    policy = tiny_policy(monkeypatch)
    parameters = policy.parameters
    optimizer = (
        torch.optim.SGD(list(parameters.values()), lr=0.1, momentum=0.5)
        if rule == "sgd"
        else with_history(policy, rule)
    )
    g = torch.Generator().manual_seed(1)
    gradient = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in parameters.items()}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    for n, p in parameters.items():
        p.grad = gradient[n].clone()
    optimizer.step()
    step = {n: p.detach() - before[n] for n, p in parameters.items()}
    parts = step_parts([optimizer], parameters, before, step, keep_map=True)
    for n in parameters:
        rest = step[n] - parts.momentum[n] - (parts.decay[n] if parts.decay else 0)
        assert torch.allclose(parts.gradient_map[n] * gradient[n], rest, rtol=1e-6, atol=1e-12)
    assert step_parts([optimizer], parameters, before, step).gradient_map == {}


def test_a_loop_of_ones_own_gives_its_batch():
    """A reward of nothing but length: the update of a loop, told to the probe, is taken apart at every step."""
    loop = small_loop()
    with pytest.raises(ConfigError, match="attribution: expected `update`"):
        attach(loop.model, loop.optimizers, attribution=True)
    watch = attach(loop.model, loop.optimizers, update=broken)
    for k in range(2):
        plain_step(loop, k)
    watch.detach()
    assert [entry["step"] for entry in watch.history] == [1, 2]
    assert all("cannot be read" in entry["attribution_reason"] for entry in watch.history)
    assert watch.update_of is broken
