"""A pass whose derivatives are those of its forward: experts, padding rows, and layers that stop gradients."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from probe.estimators.derivative_check import DerivativeMismatchError, derivative_check
from probe.estimators.entropy_gradient import entropy_gradient
from probe.estimators.estimate import Estimate
from probe.estimators.forward_mode_check import forward_mode_check
from probe.estimators.loss_settings import LossSettings
from probe.estimators.step_check import agreement_check, step_check
from probe.estimators.update import loss_gradient
from probe.scoring.differences import difference_pair
from probe.scoring.differentiable import as_trained, forward_mode_kernels, whole_gradients
from probe.scoring.forward_mode import forward_tangents
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from tests.support.enumerable import EOS, all_sequences, as_batch, naive_scores, tiny_policy
from tests.support.exact import random_step

SHAPE = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 3,
}
EXPERTS = {
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def mixture(name):
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SHAPE, **EXPERTS[name])
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_experts_are_differentiated_in_forward_mode(name):
    """Grouped products have no forward mode, and their difference quotients jump where a router changes its mind."""
    model = mixture(name)
    model.set_experts_implementation("grouped_mm")
    policy, batch = Policy(model, microbatch_size=64), all_sequences(cap=3)
    direction = random_step(policy, 1e-3)
    config = model.config
    assert forward_mode_check(policy, batch).usable
    found = forward_tangents(policy, batch, direction)
    assert model.config is config
    assert config._experts_implementation == "grouped_mm"

    eager = copy.deepcopy(model).double()
    eager.set_experts_implementation("eager")
    named = dict(eager.named_parameters())
    l, h = naive_scores(Policy(eager), batch)
    pick = torch.Generator().manual_seed(0)
    for scores, tangent in ((l, found.logprob), (h, found.entropy)):
        weights = torch.randn(scores.shape, generator=pick, dtype=torch.float64) * batch.mask
        grads = torch.autograd.grad(
            (weights * scores).sum(), list(named.values()), retain_graph=True, allow_unused=True
        )
        products = [
            float((g * direction[n].double()).sum())
            for n, g in zip(named, grads, strict=True)
            if g is not None
        ]
        size = sum(map(abs, products))
        assert float((weights * tangent).sum()) == pytest.approx(sum(products), abs=1e-4 * size)


def test_the_same_experts_give_the_same_scores_by_every_kernel():
    model = mixture("Qwen3Moe")
    model.set_experts_implementation("grouped_mm")
    policy, batch = Policy(model, microbatch_size=8), all_sequences(cap=2)
    own = score_tokens(policy, batch)
    with forward_mode_kernels(model):
        assert model.model.layers[0].mlp.experts.config._experts_implementation == "eager"
        eager = score_tokens(policy, batch)
    torch.testing.assert_close(own.logprob, eager.logprob, rtol=0, atol=1e-5)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_kernels_and_padding_rows_are_put_back(error):
    model = mixture("Qwen3Moe")
    held = [(m, dict(vars(m))) for m in model.modules()]
    expected = pytest.raises(error) if error else contextlib.nullcontext()
    with expected, forward_mode_kernels(model), whole_gradients(model):
        assert model.get_input_embeddings().padding_idx is None
        if error:
            raise error
    for module, before in held:
        assert vars(module).keys() == before.keys()
        assert all(vars(module)[name] is value for name, value in before.items())
    assert model.get_input_embeddings().padding_idx == 3


@pytest.mark.parametrize("tied", [False, True])
def test_the_padding_row_has_the_derivative_of_the_forward(monkeypatch, tied):
    """Where the model pads with EOS, and a chat holds EOS: the row moves, and its movement changes the entropies."""
    policy = tiny_policy(monkeypatch, lora=False)
    model = policy.model
    model.get_input_embeddings().padding_idx = EOS
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    batch = all_sequences(cap=2)
    batch = as_batch([(1, 2, EOS), (2, EOS), (0, 1, 1)])
    batch = type(batch)(**{**vars(batch), "prompt_ids": ((0, EOS, 1),) * len(batch)})
    scores = score_tokens(policy, batch)
    X = entropy_gradient(policy, batch, scores, "matched", "none")
    name = "model.embed_tokens.weight"
    rows = torch.zeros_like(model.get_input_embeddings().weight)
    rows[EOS] = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).double()
    N = scores.sequence_entropy

    def objective(eps):
        new = score_tokens(policy.moved({name: rows}, eps), batch)
        # the weights of the score part as the gradient takes them
        return float((new.entropy.sum(1) + (X.weights.entropy * new.logprob).sum(1)).mean())

    expected = (objective(1e-5) - objective(-1e-5)) / 2e-5
    assert abs(expected) > 1e-3 * float(N.mean())
    assert float((X.sequence(name) * rows).sum()) == pytest.approx(expected, rel=1e-6)
    assert derivative_check(policy, batch).relative_error < 0.01


def test_the_loss_leaves_the_padding_row_alone_as_training_does(monkeypatch):
    policy = tiny_policy(monkeypatch, lora=False)
    policy.model.get_input_embeddings().padding_idx = EOS
    batch = as_batch([(1, 2, EOS), (2, EOS), (0, 1, 1)])
    batch = type(batch)(
        **{
            **vars(batch),
            "prompt_ids": ((0, EOS, 1),) * len(batch),
            "rewards": torch.tensor([1.0, 0.0, 0.0]),
            "advantages": torch.tensor([1.0, -0.5, -0.5]),
            "group": torch.zeros(3, dtype=torch.int64),
        }
    )
    found = loss_gradient(policy, batch, LossSettings(loss="grpo", max_new_tokens=4))
    row = found.gradient["model.embed_tokens.weight"][EOS]
    assert bool((row == 0).all())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("by", ["forward mode", "differences"])
def test_forwards_can_have_the_derivatives_that_training_takes(monkeypatch, tied, by):
    """Along any direction, what the tokens of a batch add is the inner product with the loss's own gradient."""
    policy = tiny_policy(monkeypatch, lora=False)
    model = policy.model
    model.get_input_embeddings().padding_idx = EOS
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    batch = as_batch([(1, 2, EOS), (2, EOS), (0, 1, 1)])
    batch = replace(
        batch,
        prompt_ids=((0, EOS, 1),) * 3,
        advantages=torch.tensor([1.0, -0.5, -0.5]),
        group=torch.zeros(3).long(),
    )
    found = loss_gradient(policy, batch, LossSettings(loss="grpo", max_new_tokens=4))
    g = torch.Generator().manual_seed(3)
    direction = {n: torch.randn(p.shape, generator=g).double() for n, p in policy.parameters.items()}

    def along():
        if by == "forward mode":
            return forward_tangents(policy, batch, direction)
        return difference_pair(policy, batch, direction, 1e-6).tangents

    expected = sum(float((found.gradient[n] * direction[n]).sum()) for n in direction)
    before, plain = score_tokens(policy, batch), along()
    with as_trained(model):
        inside, trained = score_tokens(policy, batch), along()
    assert torch.equal(before.logprob, inside.logprob)
    assert float((found.weights * trained.logprob).sum()) == pytest.approx(expected, rel=1e-6)
    assert float((found.weights * plain.logprob).sum()) != pytest.approx(expected, rel=1e-3)
    assert not model.get_input_embeddings()._forward_hooks


def test_a_padding_row_is_that_of_the_values_that_stand_in(monkeypatch):
    policy = tiny_policy(monkeypatch, lora=False)
    policy.model.get_input_embeddings().padding_idx = EOS
    batch = replace(as_batch([(1, 2, EOS), (2, EOS), (0, 1, 1)]), prompt_ids=((0, EOS, 1),) * 3)
    name = "model.embed_tokens.weight"
    other = policy.at({name: 2.0 * policy.point([name])[name]})
    expected = score_tokens(other, batch)
    with as_trained(other.model, other.values):
        found = score_tokens(other, batch)
    assert torch.equal(found.logprob, expected.logprob)
    with as_trained(policy.model):
        assert not torch.equal(score_tokens(other, batch).logprob, expected.logprob)


# ---------------------------------------------------------------- stopped gradients


class PartlyConstant(nn.Module):
    """The identity, a share of which is taken as a constant."""

    def __init__(self, share=0.5):
        super().__init__()
        self.share = share

    def forward(self, module, args, output):
        return (1 - self.share) * output + (self.share * output).detach()


class Rounded(nn.Module):
    """Rounds to a grid, and passes gradients straight through."""

    def __init__(self, grid):
        super().__init__()
        self.grid = grid

    def forward(self, module, args, output):
        return output + (torch.round(output * self.grid) / self.grid - output).detach()


def hooked(monkeypatch, hook):
    policy = tiny_policy(monkeypatch, layers=2)
    policy.model.get_base_model().model.layers[0].mlp.register_forward_hook(hook)
    return policy


def test_derivatives_that_are_right_are_confirmed(monkeypatch):
    policy, batch = tiny_policy(monkeypatch, layers=2), all_sequences(cap=3)
    for size in (1e-6, 1e-2, 0.3):
        step = random_step(policy, size)
        found = step_check(
            policy, batch, score_tokens(policy, batch), step, forward_tangents(policy, batch, step)
        )
        assert found.difference <= max(found.rounding, 3 * found.error)
        assert not found.contradicted
        again = step_check(
            policy,
            batch,
            score_tokens(policy, batch),
            step,
            forward_tangents(policy, batch, step),
            start=found.scale,
        )
        assert abs(again.scale - found.scale) <= 1


def test_a_constant_part_deceives_backward_and_forward_mode_but_not_forwards(monkeypatch):
    policy, batch = hooked(monkeypatch, PartlyConstant().forward), all_sequences(cap=3)
    assert forward_mode_check(policy, batch).usable
    step = random_step(policy, 1e-2)
    found = step_check(
        policy, batch, score_tokens(policy, batch), step, forward_tangents(policy, batch, step)
    )
    assert found.contradicted
    assert found.difference > 0.05
    assert found.error < 0.02
    with pytest.raises(DerivativeMismatchError):
        derivative_check(policy, batch)


def test_a_small_constant_part_is_noticed_too(monkeypatch):
    """Too small for the check of a gradient along itself, and large beside what differences are known to."""
    policy, batch = hooked(monkeypatch, PartlyConstant(0.03).forward), all_sequences(cap=3)
    assert derivative_check(policy, batch).relative_error < 0.05
    step = random_step(policy, 1e-3)
    scores, tangents = score_tokens(policy, batch), forward_tangents(policy, batch, step)
    found = step_check(policy, batch, scores, step, tangents)
    assert found.contradicted
    assert found.difference < 0.05


def test_backward_is_compared_in_both_estimands():
    """Relative to deltaH1 or its error, and to what differences of its parts are known to."""

    def estimate(value, se):
        return Estimate(value, torch.tensor([0.5, -0.5], dtype=torch.float64) * se)

    tokens = (estimate(-0.1, 0.01), estimate(-0.01, 0.001))
    found = agreement_check((-0.1, -0.01), tokens, (0.2, 0.02), 1e-3)
    assert found.difference == 0.0
    assert not found.contradicted
    found = agreement_check((-0.1, -0.0108), tokens, (0.2, 0.02), 1e-3)
    assert found.difference == pytest.approx(0.08)
    assert found.error == pytest.approx(2e-3)
    assert found.contradicted
    assert not agreement_check((-0.1, -0.0108), tokens, (0.2, 0.02), 0.02).contradicted
    # deltaH1 of next to nothing: its error is what matters
    nothing = (estimate(1e-9, 0.01), estimate(1e-10, 0.001))
    assert not agreement_check((2e-9, 2e-10), nothing, (0.2, 0.02), 1e-4).contradicted


def test_a_forward_that_has_no_derivative_confirms_nothing(monkeypatch):
    """On a coarse grid differences neither settle nor agree with the straight-through gradient."""
    policy, batch = hooked(monkeypatch, Rounded(4.0).forward), all_sequences(cap=3)
    step = random_step(policy, 1e-2)
    found = step_check(
        policy, batch, score_tokens(policy, batch), step, forward_tangents(policy, batch, step)
    )
    assert found.difference > 0.05


def test_a_step_without_influence_is_no_contradiction(monkeypatch):
    policy, batch = tiny_policy(monkeypatch, layers=2), all_sequences(cap=3)
    step = {name: torch.zeros_like(p) for name, p in policy.parameters.items()}
    found = step_check(
        policy, batch, score_tokens(policy, batch), step, forward_tangents(policy, batch, step)
    )
    assert found.difference == 0.0
    assert not found.contradicted
