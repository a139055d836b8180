"""Temporary state is bitwise restored, also after an exception."""

from __future__ import annotations

import copy
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from probe.phases.update import optimizer_step
from probe.snapshot import (
    evaluation_mode,
    exact_float32,
    isolated_rng,
    parameters_at,
    preserved,
    standing_in,
)


def trained():
    """A model with every kind of state: moments, a grad, a learning rate as a tensor, mixed train/eval flags."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2), amsgrad=True)
    for _ in range(3):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(torch.randn(5, 3)).square().sum().backward()
    model[2].bias.grad = None
    return model, optimizer


def everything(model, optimizer):
    return copy.deepcopy(
        (
            {n: p.detach().clone() for n, p in model.named_parameters()},
            {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
            optimizer.state_dict(),
            {n: m.training for n, m in model.named_modules()},
        )
    )


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
def test_preserved_restores_everything(failure):
    model, optimizer = trained()
    parameters = dict(model.named_parameters())
    before, moments = everything(model, optimizer), optimizer.state[model[0].weight]["exp_avg"]
    grad = model[0].weight.grad

    def work():
        with preserved(parameters, optimizer):
            for p in parameters.values():
                p.grad = torch.full_like(p, 7.0)
            optimizer.param_groups[0]["weight_decay"] = 0.5
            optimizer.param_groups[0]["extra"] = 1
            optimizer.step()
            optimizer.state[model[0].weight]["new"] = torch.ones(1)
            grad.fill_(3.0)
            assert not equal(everything(model, optimizer), before)
            if failure:
                raise failure("boom")

    if failure:
        with pytest.raises(failure):
            work()
    else:
        work()
    assert equal(everything(model, optimizer), before)
    assert optimizer.state[model[0].weight]["exp_avg"] is moments  # references to the state hold
    assert model[0].weight.grad is grad


def test_preserved_drops_state_that_a_fresh_optimizer_made():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    with preserved(dict(model.named_parameters()), optimizer):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert len(optimizer.state) == 0
    assert model.weight.grad is None


class Nested(torch.optim.Optimizer):
    """Keeps its moment inside a list inside a dictionary, as second-order optimizers do."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "history": [torch.zeros(1)]})

    def step(self, closure=None):
        for group in self.param_groups:
            group["history"][0] += 1
            for p in group["params"]:
                moments = self.state[p].setdefault("factors", {"left": [torch.zeros_like(p)]})["left"]
                moments[0] += p.grad
                p.data -= group["lr"] * moments[0]


def test_nested_state_is_restored():
    model = nn.Linear(2, 1)
    parameters = dict(model.named_parameters())
    optimizer = Nested(model.parameters())
    gradient = {n: torch.ones_like(p) for n, p in parameters.items()}
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    moment = optimizer.state[model.weight]["factors"]["left"][0]
    before = everything(model, optimizer)
    first, second = (optimizer_step(optimizer, parameters, gradient, None) for _ in range(2))
    assert equal(first.step, second.step)
    assert equal(everything(model, optimizer), before)
    assert optimizer.state[model.weight]["factors"]["left"][0] is moment


def test_parameters_that_only_the_optimizer_knows_are_restored():
    model, optimizer = trained()
    before = everything(model, optimizer)
    some = {n: p for n, p in model.named_parameters() if n.startswith("2.")}
    optimizer_step(optimizer, some, {n: torch.ones_like(p) for n, p in some.items()}, 1.0)
    assert equal(everything(model, optimizer), before)


def test_a_second_step_equals_the_first():
    """Moments that were only shallowly copied would drift from one step to the next."""
    model, optimizer = trained()
    parameters = dict(model.named_parameters())
    gradient = {n: torch.ones_like(p) for n, p in parameters.items()}
    first = optimizer_step(optimizer, parameters, gradient, 1.0)
    second = optimizer_step(optimizer, parameters, gradient, 1.0)
    assert equal(first.step, second.step)
    assert equal(first.new_parameters, second.new_parameters)


def test_parameters_at_restores_after_an_exception():
    model, optimizer = trained()
    before = everything(model, optimizer)
    parameters = dict(model.named_parameters())
    values = {n: torch.zeros_like(p) for n, p in parameters.items()}
    seen = []

    def work():
        with parameters_at(parameters, values):
            seen.append(float(model[0].weight.detach().abs().sum()))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        work()
    assert seen == [0.0]
    assert equal(everything(model, optimizer), before)
    with pytest.raises(ValueError, match="one value per parameter"), parameters_at(parameters, {}):
        pass


def test_evaluation_mode_restores_each_modules_flag():
    model, _ = trained()
    flags = [m.training for m in model.modules()]
    assert len(set(flags)) == 2
    seen = []

    def work():
        with evaluation_mode(model):
            seen.extend(m.training for m in model.modules())
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        work()
    assert not any(seen)
    assert [m.training for m in model.modules()] == flags


def test_isolated_rng_restores_after_an_exception():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()

    def work():
        with isolated_rng():
            random.random(), np.random.rand(), torch.rand(1)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        work()
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_exact_float32_restores_the_users_setting():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with exact_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


class Shared(nn.Module):
    """One layer by two paths, and its weight once more under another name and as a plain attribute."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.again = nn.ModuleList([self.first])
        self.tied = nn.Linear(2, 2, bias=False)
        self.tied.weight = self.first.weight
        object.__setattr__(self, "kept", self.first.weight)
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x):
        return self.tied(self.again[0](self.first(x))) @ self.kept + self.shift


def slots(module):
    """Every place of a module that holds a tensor, with the object that is in it."""
    return [
        (id(part), key, id(tensor), tensor.requires_grad)
        for part in module.modules()
        for holder in (part._parameters, part._buffers, vars(part))
        for key, tensor in holder.items()
        if isinstance(tensor, torch.Tensor)
    ]


def test_standing_in_reaches_every_place_and_leaves_the_same_objects():
    module, x, value = Shared(), torch.randn(3, 2), torch.randn(2, 2)
    before, own = slots(module), module.first.weight.detach().clone()
    for name in ("first.weight", "again.0.weight", "tied.weight"):
        with standing_in(module, {name: value, "shift": torch.zeros(2)}):
            found = module(x)
        torch.testing.assert_close(found, x @ value.T @ value.T @ value.T @ value)
        assert slots(module) == before
    with pytest.raises(KeyError), standing_in(module, {"first.weight": value}):
        raise KeyError
    assert slots(module) == before
    assert torch.equal(module.first.weight, own)
    assert module.first.weight.grad is None
    with (
        pytest.raises(ValueError, match=r"found \['second.weight'\]"),
        standing_in(module, {"second.weight": x}),
    ):
        pass


def test_standing_in_is_differentiated_in_every_mode():
    module, x = Shared().double(), torch.randn(3, 2, dtype=torch.float64)
    here, along = module.first.weight.detach(), torch.randn(2, 2, dtype=torch.float64)

    def total(weight):
        with standing_in(module, {"first.weight": weight}):
            return module(x).square().sum()

    leaf = here.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    forward = torch.func.jvp(total, (here,), (along,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = total(torch.autograd.forward_ad.make_dual(here, along))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    expected = (gradient * along).sum()
    torch.testing.assert_close(forward, expected)
    torch.testing.assert_close(tangent, expected)
    nested = torch.func.jvp(lambda w: torch.func.jvp(total, (w,), (along,))[1], (here,), (along,))[1]
    eps = 1e-4  # rounding and the fourth order are both of the order of 1e-8
    second = (total(here + eps * along) - 2 * total(here) + total(here - eps * along)) / eps**2
    torch.testing.assert_close(nested, second.detach(), rtol=1e-4, atol=1e-6)


def test_an_interrupt_in_the_restoring_leaves_nothing_changed():
    """Struck at every line of this module that runs while things are put back."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    parameters = dict(model.named_parameters())
    zeros = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def facts() -> Any:
        moments = [x.tolist() for state in optimizer.state.values() for x in state.values()]
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        tensors = [(id(p), p.tolist(), id(p.grad), p.grad.tolist()) for p in parameters.values()]
        return tensors, moments, groups, model.training, torch.get_rng_state().tolist()

    def struck_at(n: int) -> int:
        lines, putting_back = 0, False

        def tracer(frame: Any, event: str, arg: Any) -> Any:
            nonlocal lines
            if not frame.f_code.co_filename.endswith("snapshot.py"):
                return None
            if event == "line" and putting_back:
                lines += 1
                if lines == n:
                    raise KeyboardInterrupt
            return tracer

        own = sys.gettrace()
        sys.settrace(tracer)
        try:
            with (
                preserved(parameters, optimizer),
                isolated_rng(),
                evaluation_mode(model),
                parameters_at(parameters, zeros),
            ):
                torch.rand(1)
                optimizer.step()
                optimizer.zero_grad()
                putting_back = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(own)
        return lines

    before = facts()
    total = struck_at(0)
    assert total > 50
    for n in range(1, total + 1):
        struck_at(n)
        assert facts() == before, n
