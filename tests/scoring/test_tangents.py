"""Derivatives of token scores: forward mode, nested forward mode and differences, against autograd token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from probe.errors.exceptions import NumericalError
from probe.estimators.forward_mode_check import forward_mode_check
from probe.loading import use_exact_4bit_layers
from probe.loading.quantization import find_4bit_layers
from probe.phases.passes import choose_way
from probe.scoring import Policy, score_tokens
from probe.scoring.differences import choose_scale, difference_pair
from probe.scoring.features import feature_basis
from probe.scoring.forward_mode import ForwardModeError, forward_tangents, second_order_tangents
from probe.snapshot import parameters_at
from tests.support import tiny_models
from tests.support.enumerable import all_sequences, as_batch, naive_scores, tiny_policy
from tests.support.exact import plain_scores, random_step


def by_autograd(policy, batch, v):
    """First and second derivatives of every score along `v`: double backward, one token at a time."""
    s = torch.zeros((), dtype=torch.float64, requires_grad=True)
    moved = {n: p.detach() + s * v[n] for n, p in policy.parameters.items()}
    found = []
    for scores in plain_scores(policy, batch, moved):
        first, second = torch.zeros(batch.mask.shape).double(), torch.zeros(batch.mask.shape).double()
        for i, t in batch.mask.nonzero().tolist():
            (slope,) = torch.autograd.grad(scores[i, t], s, create_graph=True)
            first[i, t] = slope.detach()
            (second[i, t],) = torch.autograd.grad(slope, s, retain_graph=True)
        found.append((first, second))
    return found


@pytest.mark.parametrize(("lora", "layers"), [(True, 2), (False, 1)])
def test_derivatives_of_every_token_equal_autograd(monkeypatch, lora, layers):
    policy = tiny_policy(monkeypatch, lora=lora, layers=layers, microbatch_size=4, head_chunk_tokens=3)
    batch = all_sequences(cap=2)
    v = random_step(policy, 0.1)
    (dl, ddl), (dh, ddh) = by_autograd(policy, batch, v)
    assert min(float(x.abs().max()) for x in (dl, ddl, dh, ddh)) > 0.1
    forward = forward_tangents(policy, batch, v)
    first, second = second_order_tangents(policy, batch, v)
    for found, expected in (
        (forward.logprob, dl),
        (forward.entropy, dh),
        (first.logprob, dl),
        (first.entropy, dh),
        (second.logprob, ddl),
        (second.entropy, ddh),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    differences = difference_pair(policy, batch, v, 1e-5).tangents
    torch.testing.assert_close(differences.logprob, dl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(differences.entropy, dh, rtol=1e-5, atol=1e-6)


def test_expected_features_move_as_their_differences_say(monkeypatch):
    policy, batch = tiny_policy(monkeypatch, layers=2), all_sequences(cap=3)
    basis = feature_basis(policy.model, batch)
    v = random_step(policy, 0.1)
    scores = score_tokens(policy, batch, basis=basis)
    forward = forward_tangents(policy, batch, v, basis)
    differences = difference_pair(policy, batch, v, 1e-4, basis=basis).tangents
    K = basis.tokens.shape[1]
    assert scores.expected_features.shape == (*batch.mask.shape, K)
    torch.testing.assert_close(forward.expected_features, differences.expected_features, rtol=1e-5, atol=1e-5)
    assert float(forward.expected_features[..., 0].abs().max()) < 1e-12  # probabilities add up to 1
    assert float(forward.expected_features[..., 1:].abs().max()) > 0.01
    # E_pi[psi] written out, from the plain model
    ids = torch.cat([torch.tensor(batch.prompt_ids), batch.completion_ids], dim=1)
    with torch.no_grad():
        p = (policy.model(input_ids=ids).logits / policy.temperature).softmax(-1)[:, 1:-1]
    expected = (p @ basis.tokens.double()) * batch.mask.unsqueeze(-1)
    torch.testing.assert_close(scores.expected_features, expected, rtol=0, atol=1e-12)
    plain = score_tokens(policy, batch)
    assert torch.equal(plain.logprob, scores.logprob)
    assert torch.equal(plain.entropy, scores.entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("adapter", [True, False])
def test_an_ordinary_model_of_several_prompt_lengths(dtype, attention, adapter):
    """Forward mode against differences at the scale that is chosen, in padded microbatches; and nested against both."""
    model = tiny_models.tiny_model(tied=False)
    model = (tiny_models.add_lora(model) if adapter else model).to(dtype).eval()
    (model.get_base_model() if adapter else model).set_attn_implementation(attention)
    policy = Policy(model, temperature=0.9, microbatch_size=3)
    g = torch.Generator().manual_seed(4)
    batch = as_batch([tuple(torch.randint(104, (n,), generator=g).tolist()) for n in (6, 3, 7, 1, 5)])
    batch = replace(batch, prompt_ids=((4, 5), (7,), (8, 9, 10), (11, 12, 13, 14), (20, 21)))
    v = random_step(policy, 0.01 if adapter else 0.003)
    scale, error = choose_scale(policy, batch, v)
    assert error < 0.05
    pair = difference_pair(policy, batch, v, scale, error)
    forward = forward_tangents(policy, batch, v)
    first, second = second_order_tangents(policy, batch, v)
    both, by_differences = (
        torch.stack([tangents.logprob, tangents.entropy]) for tangents in (forward, pair.tangents)
    )
    assert float((both - by_differences).norm()) < 2 * error * float(both.norm())
    for name in ("logprob", "entropy"):
        found = getattr(forward, name)
        size = float(found.norm())
        assert float((found - getattr(first, name)).norm()) < 1e-5 * size
        middle = getattr(score_tokens(policy, batch), name)
        upper, lower = (getattr(difference_pair(policy, batch, v, 0.3), side) for side in ("plus", "minus"))
        bent = (getattr(upper, name) + getattr(lower, name) - 2 * middle) / 0.09
        assert float((bent - getattr(second, name)).norm()) < 0.05 * float(bent.norm())


def test_values_reach_both_uses_of_a_tied_embedding():
    """Full fine-tuning of tied embeddings: one name, two places."""
    model = tiny_models.tiny_model(tied=True).double().eval()
    policy = Policy(model, microbatch_size=2)
    batch = replace(as_batch([(5, 6, 7), (9, 3), (30, 31, 32)]), prompt_ids=((4, 8), (4,), (11, 12)))
    names = [n for n in policy.parameters if "embed" in n or "head" in n]
    assert names == ["model.embed_tokens.weight"]
    v = {names[0]: random_step(policy, 0.02)[names[0]]}
    moved = {names[0]: model.get_parameter(names[0]).detach() + v[names[0]]}
    found = score_tokens(policy.at(moved), batch)
    before = score_tokens(policy, batch)
    with parameters_at({names[0]: model.get_parameter(names[0])}, moved):
        expected = score_tokens(policy, batch)
        l, h = (x.detach() for x in naive_scores(policy, batch))
    assert float((expected.logprob - before.logprob).abs().max()) > 1e-2
    assert torch.equal(found.logprob, expected.logprob)
    assert torch.equal(found.entropy, expected.entropy)
    torch.testing.assert_close(found.logprob, l, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.entropy, h, rtol=0, atol=1e-6)
    forward = forward_tangents(policy, batch, v)
    differences = difference_pair(policy, batch, v, 1e-3).tangents
    torch.testing.assert_close(forward.logprob, differences.logprob, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(forward.entropy, differences.entropy, rtol=1e-3, atol=1e-4)


class HookError(Exception):
    pass


@pytest.mark.parametrize(
    "use",
    [
        lambda policy, batch, v: forward_tangents(policy, batch, v),
        lambda policy, batch, v: second_order_tangents(policy, batch, v),
        lambda policy, batch, v: difference_pair(policy, batch, v, 1.0),
        lambda policy, batch, v: choose_scale(policy, batch, v),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_untouched_also_after_an_exception(use, tied):
    model = tiny_models.tiny_model(tied=tied).eval()
    policy = Policy(model, microbatch_size=1)
    batch = as_batch([(5, 6, 7), (9, 3), (30, 31, 32)])
    v = random_step(policy, 0.01)
    before = {n: (p, p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    def check():
        now = dict(model.named_parameters())
        assert now.keys() == before.keys()
        for name, (parameter, pointer, value) in before.items():
            assert now[name] is parameter
            assert parameter.data_ptr() == pointer
            assert parameter.requires_grad
            assert parameter.grad is None
            assert torch.equal(parameter, value)
        assert model.get_output_embeddings().weight is now.get(
            "lm_head.weight", now["model.embed_tokens.weight"]
        )
        assert hooks == sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
        assert torch.is_grad_enabled()

    expected = score_tokens(policy, batch)
    use(policy, batch, v)
    check()
    calls = []

    def fail(module, args, output):
        calls.append(1)
        if len(calls) == 2:  # inside the second microbatch
            raise HookError

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(HookError):
        use(policy, batch, v)
    handle.remove()
    check()
    assert torch.equal(score_tokens(policy, batch).logprob, expected.logprob)


def test_values_of_unknown_parameters_are_refused(monkeypatch):
    policy = tiny_policy(monkeypatch)
    with pytest.raises(ValueError, match=r"values for parameters of the model, found \['nonsense'\]"):
        policy.at({"nonsense": torch.zeros(1)})


@pytest.mark.parametrize("head", [False, True])
def test_four_bit_layers_are_differentiated(head):
    """A LoRA adapter on layers whose frozen weights are in 4 bits."""
    model = tiny_models.tiny_model(hidden=64, tied=False)
    tiny_models.quantize_linear_layers(model)
    model = model.to("cpu")
    targets = [*tiny_models.LINEAR_LAYERS, "lm_head"] if head else tiny_models.LINEAR_LAYERS
    model = tiny_models.add_lora(model, target_modules=targets).eval()
    use_exact_4bit_layers(model)
    assert len(find_4bit_layers(model)) == 14
    policy = Policy(model, microbatch_size=2)
    batch = as_batch([(5, 6, 7, 8), (9, 3, 4), (30, 31, 32)])
    v = random_step(policy, 0.03)
    forward = forward_tangents(policy, batch, v)
    first, second = second_order_tangents(policy, batch, v)
    differences = difference_pair(policy, batch, v, choose_scale(policy, batch, v)[0]).tangents
    for name in ("logprob", "entropy"):
        found = getattr(forward, name)
        assert float((found - getattr(differences, name)).norm()) < 0.02 * float(found.norm())
        assert float((found - getattr(first, name)).norm()) < 1e-4 * float(found.norm())
        assert float(getattr(second, name).norm()) > 0
    assert forward_mode_check(policy, batch).usable


class Opaque(torch.autograd.Function):
    """An operation with a backward and without a forward-mode derivative, like many kernels."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class OpaqueNewStyle(torch.autograd.Function):
    """The same, the way torch.func wants it."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("kind", [Opaque, OpaqueNewStyle])
def test_an_operation_without_forward_mode_is_named(monkeypatch, kind):
    policy, batch = tiny_policy(monkeypatch), all_sequences(cap=2)
    layer = policy.model.get_base_model().model.layers[0]
    layer.register_forward_hook(lambda module, args, output: kind.apply(output))
    v = random_step(policy, 0.1)
    for use in (forward_tangents, second_order_tangents):
        with pytest.raises(ForwardModeError, match="no forward-mode derivative: "):
            use(policy, batch, v)
    check = forward_mode_check(policy, batch)
    assert not check.usable
    assert "no forward-mode derivative" in check.reason
    difference_pair(policy, batch, v, 1e-3)  # runs on whatever a forward runs


def test_an_ordinary_error_is_not_taken_for_a_missing_derivative(monkeypatch):
    policy, batch = tiny_policy(monkeypatch), all_sequences(cap=2)

    def broken(module, args, output):
        raise RuntimeError("shape '[2]' is invalid for input of size 3")

    policy.model.get_base_model().model.layers[0].register_forward_hook(broken)
    for use in (forward_tangents, second_order_tangents):
        with pytest.raises(RuntimeError, match="is invalid for input") as caught:
            use(policy, batch, random_step(policy, 0.1))
        assert not isinstance(caught.value, NumericalError)


class Dropped(torch.autograd.Function):
    """Identity with a right backward and a forward-mode derivative that loses most of the tangent."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def jvp(ctx, tangent):
        return 0.3 * tangent

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("kind", [Opaque, Dropped, None])
def test_auto_falls_back_to_backward(monkeypatch, kind):
    """Where forward mode does not run, or where it is wrong."""
    policy, batch = tiny_policy(monkeypatch, layers=2), all_sequences(cap=2)
    if kind is not None:
        layer = policy.model.get_base_model().model.layers[0].self_attn.v_proj
        layer.register_forward_hook(lambda module, args, output: kind.apply(output))
    for wanted in ("auto", "jvp", "reverse", "finite_difference"):
        if wanted == "jvp" and kind is not None:
            with pytest.raises(NumericalError, match="expected a model that allows jvp"):
                choose_way(policy, batch, wanted)
            continue
        way = choose_way(policy, batch, wanted)
        if wanted == "auto":
            assert way.mode == ("jvp" if kind is None else "reverse")
            assert {Opaque: "no forward-mode", Dropped: "differ by", None: "agrees"}[kind] in way.reason
        else:
            assert way.mode == wanted


def test_the_upper_point_can_be_given(monkeypatch):
    """The optimizer's own result, which is the ground truth's, stands for theta + step."""
    policy, batch = tiny_policy(monkeypatch), all_sequences(cap=3)
    v = random_step(policy, 0.02)
    upper = {n: p.detach() + v[n] for n, p in policy.parameters.items()}
    pair = difference_pair(policy, batch, v, 1.0, upper=upper)
    assert torch.equal(pair.plus.logprob, score_tokens(policy.at(upper), batch).logprob)
    other = {n: x + 0.1 for n, x in upper.items()}
    shifted = difference_pair(policy, batch, v, 1.0, upper=other)
    assert not torch.equal(shifted.plus.logprob, pair.plus.logprob)
    assert torch.equal(shifted.minus.logprob, pair.minus.logprob)


@pytest.mark.parametrize("size", [1e-9, 1e-4, 1e-2, 1.0])
def test_the_scale_of_differences_suits_the_direction(monkeypatch, size):
    """From steps lost in rounding to steps far too large, the chosen scale is right to about its error."""
    policy, batch = tiny_policy(monkeypatch), all_sequences(cap=3)
    v = random_step(policy, size)
    scale, error = choose_scale(policy, batch, v)
    exact_one = forward_tangents(policy, batch, v)
    found = difference_pair(policy, batch, v, scale).tangents
    both = [torch.cat([x.logprob.flatten(), x.entropy.flatten()]) for x in (found, exact_one)]
    assert error < 0.02
    assert float((both[0] - both[1]).norm() / both[1].norm()) <= 1.2 * max(error, 1e-9)
    assert (scale == 1.0) == (size <= 1e-4)


@pytest.mark.parametrize("size", [0.0, 1e3])
def test_a_direction_without_influence_or_far_too_large_has_no_scale(monkeypatch, size):
    policy, batch = tiny_policy(monkeypatch), all_sequences(cap=2)
    with pytest.raises(NumericalError, match="step size at which central differences settle"):
        choose_scale(policy, batch, random_step(policy, size))


def test_empty_responses_are_left_out_of_second_derivatives(monkeypatch):
    policy, batch = tiny_policy(monkeypatch, microbatch_size=3), all_sequences(cap=2)
    v = random_step(policy, 0.1)
    mask = batch.mask.clone()
    mask[4] = False
    first, second = second_order_tangents(policy, replace(batch, mask=mask), v)
    whole_first, whole_second = second_order_tangents(policy, batch, v)
    for found, whole in ((first, whole_first), (second, whole_second)):
        assert float(found.logprob[4].abs().max()) == 0.0
        rest = torch.arange(len(batch)) != 4
        torch.testing.assert_close(found.logprob[rest], whole.logprob[rest], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.entropy[rest], whole.entropy[rest], rtol=1e-10, atol=1e-12)


def test_derivatives_that_are_not_finite_are_refused(monkeypatch):
    policy, batch = tiny_policy(monkeypatch), all_sequences(cap=2)
    v = random_step(policy, 0.1)
    name = next(iter(v))
    v[name] = v[name] * float("nan")
    with pytest.raises(NumericalError, match="expected finite scores"):
        forward_tangents(policy, batch, v)
