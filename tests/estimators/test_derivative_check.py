"""Gradients that are wrong without an error are caught before they are used."""

from __future__ import annotations

import pytest
import torch

from probe.errors.exceptions import NumericalError
from probe.estimators.derivative_check import derivative_check
from probe.estimators.forward_mode_check import forward_mode_check
from probe.scoring import score_tokens
from tests.support.enumerable import all_sequences, tiny_policy


class Distort(torch.autograd.Function):
    """Identity forward; backward drops most of the gradient, as some quantised kernels do."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.3


def test_right_gradients_pass_and_parameters_are_untouched(monkeypatch):
    policy = tiny_policy(monkeypatch)
    before = {n: p.detach().clone() for n, p in policy.parameters.items()}
    check = derivative_check(policy, all_sequences(cap=3))
    assert check.relative_error < 0.01
    assert all(torch.equal(before[n], p) for n, p in policy.parameters.items())


def test_distorted_gradients_are_refused(monkeypatch):
    policy = tiny_policy(monkeypatch)
    layer = policy.model.get_base_model().model.layers[0]
    layer.register_forward_hook(lambda module, args, output: Distort.apply(output))
    with pytest.raises(NumericalError, match="by backward and by finite differences disagree"):
        derivative_check(policy, all_sequences(cap=3))


class Detach(torch.autograd.Function):
    """Identity forward; backward keeps a share of the gradient."""

    @staticmethod
    def forward(ctx, x, share):
        ctx.share = share
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.share, None


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize(
    "place", ["layers.0", "layers.0.mlp", "layers.1.self_attn.v_proj", "layers.0.self_attn.v_proj"]
)
def test_a_part_of_the_gradient_that_is_lost_is_noticed(monkeypatch, place, share):
    """What is left agrees with itself along its own direction over all parameters; blocks and zeros tell."""
    policy = tiny_policy(monkeypatch, layers=2)
    module = policy.model.get_base_model().model.get_submodule(place)
    module.register_forward_hook(lambda m, args, output: Detach.apply(output, share))
    with pytest.raises(NumericalError, match=r"disagree|no influence"):
        derivative_check(policy, all_sequences(cap=3))


@pytest.mark.parametrize("sharpness", [1.0, 5.0, 20.0])
def test_a_sharp_full_model_passes(monkeypatch, sharpness):
    """Entropies that turn within a tiny part of the parameters' norm are not a wrong gradient."""
    policy = tiny_policy(monkeypatch, lora=False, layers=2)
    policy.model.lm_head.weight.data *= sharpness
    assert derivative_check(policy, all_sequences(cap=3)).relative_error < 0.05


def test_a_fresh_adapter_passes(monkeypatch):
    """While LoRA's B is zero, A has no gradient, rightly."""
    policy = tiny_policy(monkeypatch, layers=2)
    for name, p in policy.parameters.items():
        if "lora_B" in name:
            p.data.zero_()
    assert derivative_check(policy, all_sequences(cap=3)).relative_error < 0.01


def test_a_parameter_without_influence_is_refused(monkeypatch):
    policy = tiny_policy(monkeypatch)
    layer = policy.model.get_base_model().model.layers[0]
    layer.register_forward_hook(lambda module, args, output: output * 0.0)
    with pytest.raises(NumericalError, match="exactly zero"):
        derivative_check(policy, all_sequences(cap=3))


def test_a_policy_without_any_choice_left_has_nothing_to_compare(monkeypatch):
    policy = tiny_policy(monkeypatch)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(1e9)
    certain = all_sequences(cap=3)
    assert not bool(score_tokens(policy, certain).undecided.any())
    assert derivative_check(policy, certain).blocks == 0
    check = forward_mode_check(policy, certain)
    assert check.usable
    assert "no choice left" in check.reason
