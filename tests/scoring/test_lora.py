"""LoRA layers in fewer passes over memory: peft's own numbers and derivatives, and peft's own forward for the rest."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from probe.scoring.lora import added_in_place
from probe.snapshot import replaced, standing_in


def adapted(dtype=torch.float64, bias=True, **options):
    """A small network with LoRA on both of its layers."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 3, bias=bias)).to(dtype)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"], **options)
    model = peft.get_peft_model(network, config).to(dtype).eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    return model


def both_ways(run, model):
    """What a run gives by peft's forward and by the other one."""
    own = run()
    with replaced(added_in_place(model)):
        return own, run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("moved", ["lora_A", "lora_B", "lora_"])
def test_values_and_derivatives_are_those_of_peft(dtype, bias, moved):
    model = adapted(dtype, bias)
    x = torch.randn(4, 6, 5, dtype=dtype)
    duals = {n: p for n, p in model.named_parameters() if moved in n}
    assert len(duals) == (4 if moved == "lora_" else 2)
    generator = torch.Generator().manual_seed(1)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=dtype) for n, p in duals.items()}

    def run():
        with torch.no_grad(), forward_ad.dual_level():
            values = {n: forward_ad.make_dual(p.detach(), direction[n]) for n, p in duals.items()}
            with standing_in(model, values):
                return [t.clone() for t in forward_ad.unpack_dual(model(x))]

    own, found = both_ways(run, model)
    assert float(own[1].abs().max()) > 0.1
    for a, b in zip(own, found, strict=True):
        torch.testing.assert_close(a, b)

    with torch.no_grad():
        torch.testing.assert_close(*both_ways(lambda: model(x), model))


def test_every_plain_layer_is_taken_and_given_back():
    model = adapted()
    before = [dict(vars(module)) for module in model.modules()]
    places = added_in_place(model)
    assert len(places) == 2
    with replaced(places):
        assert all("forward" in holder for holder, _, _ in places)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_gradients_go_by_pefts_own_forward():
    model = adapted()
    x = torch.randn(4, 5, dtype=torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    own, found = both_ways(lambda: torch.autograd.grad(model(x).square().sum(), trained), model)
    assert all(torch.equal(a, b) for a, b in zip(own, found, strict=True))


def with_second_adapter():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0", "2"]))
    model.base_model.set_adapter(["default", "other"])
    return model.eval().double()


def with_hook():
    model = adapted()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda module, args, out: 2 * out)
    return model


UNLIKE = {
    "DoRA": lambda: adapted(use_dora=True),
    "bias in B": lambda: adapted(lora_bias=True),
    "dropout": lambda: adapted(lora_dropout=0.5).train(),
    "16 bits": lambda: adapted(torch.bfloat16),
    "two adapters": with_second_adapter,
    "hooks": with_hook,
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_what_is_not_plain_is_left_alone(kind):
    assert not added_in_place(UNLIKE[kind]())


@pytest.mark.parametrize("state", ["switched off", "merged"])
def test_an_adapter_that_has_no_part_has_none(state):
    model = adapted()
    x = torch.randn(4, 5, dtype=torch.float64)
    places = added_in_place(model)  # before the state is as it is
    if state == "merged":
        model.merge_adapter()
        expected = model(x)
        with torch.no_grad(), replaced(places):
            assert torch.equal(model(x), expected)
    else:
        with model.disable_adapter(), torch.no_grad():
            expected = model(x)
            with replaced(places):
                assert torch.equal(model(x), expected)
        assert not torch.equal(model(x), expected)
