"""4-bit layers against a dense float32 layer that holds the dequantised weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from probe.errors.exceptions import CheckpointError
from probe.loading import quiet_libraries, use_exact_4bit_layers
from probe.loading.quantization import dequantized_weight, find_4bit_layers

with quiet_libraries():
    bnb = pytest.importorskip("bitsandbytes")

# torch's own forward-mode rules are compiled with torch.jit.script on first use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


def make_pair(*, bias: bool = True, quant_type: str = "nf4", double: bool = True, square: bool = False):
    """A patched 4-bit layer and the dense layer with its weights."""
    inputs, outputs = (64, 64) if square else (64, 96)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer = bnb.nn.Linear4bit(
            inputs,
            outputs,
            bias=bias,
            compute_dtype=torch.float32,
            quant_type=quant_type,
            compress_statistics=double,
        ).to("cpu")
    # As on CPUs with AVX512-bf16, where bitsandbytes repacks.
    layer.support_avx512bf16_for_cpu = True
    assert use_exact_4bit_layers(nn.Sequential(layer)) == 1
    layer.requires_grad_(False)
    dense = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    dense.weight.copy_(dequantized_weight(layer, torch.float32))
    if bias:
        dense.bias.copy_(layer.bias)
    return layer, dense


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4", "double": False}, {"square": True}])
def test_forward_and_gradient_equal_the_dense_layer(bias, training, options):
    layer, dense = make_pair(bias=bias, **options)
    layer.train(training)
    with torch.no_grad():
        # The pass after which bitsandbytes' own layer is repacked.
        assert torch.equal(layer(draw(2, 3, 64)), dense(draw(2, 3, 64)))
    results = []
    for module in (layer, dense):
        x = draw(2, 3, 64, seed=1).requires_grad_()
        y = module(x)
        (gradient,) = torch.autograd.grad(y, x, draw(*y.shape, seed=2))
        results.append((y, gradient))
    (y, gradient), (dense_y, dense_gradient) = results
    assert torch.equal(y, dense_y)
    torch.testing.assert_close(gradient, dense_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_and_second_order(bias, training):
    layer, dense = make_pair(bias=bias)
    layer.train(training)
    x, tangent = draw(2, 3, 64), draw(2, 3, 64, seed=1)

    def functional(module):
        return torch.func.jvp(module, (x,), (tangent,))[1]

    def dual(module):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent))).tangent

    def hessian_vector(module):
        gradient = torch.func.grad(lambda value: (module(value) ** 4).sum())
        return torch.func.jvp(gradient, (x,), (tangent,))[1]

    def double_backward(module):
        return torch.autograd.functional.hvp(lambda value: (module(value) ** 4).sum(), x, tangent)[1]

    def several_tangents(module):
        tangents = torch.stack([tangent, 2 * tangent])
        return torch.func.vmap(lambda v: torch.func.jvp(module, (x,), (v,))[1])(tangents)

    for derivative in (functional, dual, hessian_vector, double_backward, several_tangents):
        found, expected = derivative(layer), derivative(dense)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_trainable_bias_gets_its_gradient_and_its_tangent():
    layer, dense = make_pair()
    for module in (layer, dense):
        module.bias.requires_grad_()
        (module(draw(2, 3, 64)) ** 2).sum().backward()
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    tangent = draw(96, seed=4)
    found, expected = (
        torch.func.jvp(
            lambda b, m=module: torch.func.functional_call(m, {"bias": b}, (draw(2, 3, 64),)),
            (module.bias.detach(),),
            (tangent,),
        )[1]
        for module in (layer, dense)
    )
    torch.testing.assert_close(found, expected)
    both = [
        torch.func.jvp(
            lambda b, x, m=module: torch.func.functional_call(m, {"bias": b}, (x,)),
            (module.bias.detach(), draw(2, 3, 64)),
            (tangent, draw(2, 3, 64, seed=5)),
        )[1]
        for module in (layer, dense)
    ]
    torch.testing.assert_close(*both)


def test_weights_and_state_dict_are_untouched():
    layer, _ = make_pair()
    packed, before = layer.weight.data.clone(), {k: v.clone() for k, v in layer.state_dict().items()}
    for training in (True, False):
        layer.train(training)
        layer(draw(2, 3, 64))
        with torch.no_grad():
            layer(draw(1, 64))
    assert torch.equal(layer.weight.data, packed)
    assert isinstance(layer, bnb.nn.Linear4bit)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_twice_is_once_and_copies_work():
    layer, dense = make_pair()
    kind = type(layer)
    assert use_exact_4bit_layers(layer) == 1
    assert type(layer) is kind
    assert torch.equal(copy.deepcopy(layer)(draw(2, 64)), dense(draw(2, 64)))


def test_the_graph_does_not_keep_dense_weights():
    layer, _ = make_pair()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(draw(2, 64).requires_grad_())
    assert sum(kept) < layer.in_features * layer.out_features


def test_compute_type_and_result_type():
    layer, dense = make_pair()
    layer.compute_dtype = torch.bfloat16
    y = layer(draw(2, 64))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, dense(draw(2, 64)), rtol=3e-2, atol=3e-2)
    assert layer.bias.dtype == torch.float32


def test_hooks_of_accelerate_keep_working():
    from accelerate.hooks import ModelHook, add_hook_to_module

    layer = bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32).to("cpu")
    add_hook_to_module(layer, ModelHook())
    use_exact_4bit_layers(layer)
    x = draw(2, 64).requires_grad_()
    assert "FrozenLinear" in str(layer(x).grad_fn) + str(layer(x).grad_fn.next_functions)


def test_a_model_without_4bit_layers_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4))
    assert find_4bit_layers(model) == {}
    assert use_exact_4bit_layers(model) == 0
    assert type(model[0]) is nn.Linear


def test_layer_that_was_never_quantised():
    with pytest.raises(CheckpointError, match="4-bit layer 0: expected a quantised weight, found none"):
        use_exact_4bit_layers(nn.Sequential(bnb.nn.Linear4bit(64, 96)))


def test_layer_that_was_repacked():
    layer = bnb.nn.Linear4bit(64, 96).to("cpu")
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(CheckpointError, match=r"4-bit layer 0: .* found it repacked .* load the model again"):
        use_exact_4bit_layers(nn.Sequential(layer))
