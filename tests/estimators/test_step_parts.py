"""Momentum's, decay's and the gradient's part of a step that was taken, against formulas written out here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probe.estimators.step_parts import CODED_TOLERANCE, StepParts, step_parts
from probe.loading import quiet_libraries
from probe.loading.moments import read_moments

NAMES = ("weight", "bias")


class Taken:
    """An optimizer's step on a small layer, with everything from before it."""

    def __init__(
        self, build: Any, steps: int, dtype: torch.dtype = torch.float64, shape: tuple[int, int] = (5, 4)
    ) -> None:
        g = torch.Generator().manual_seed(steps)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.layer = nn.Linear(*shape).to(dtype)
        self.parameters = dict(self.layer.named_parameters())
        self.optimizer = build(list(self.parameters.values()))
        for _ in range(steps):
            self.set_gradients(g)
            self.optimizer.step()
        self.set_gradients(g)
        self.old = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.state = {
            n: copy.deepcopy(dict(self.optimizer.state.get(p, {}))) for n, p in self.parameters.items()
        }
        self.g = {n: p.grad.double() for n, p in self.parameters.items()}
        self.optimizer.step()

    def set_gradients(self, g: torch.Generator) -> None:
        for p in self.parameters.values():
            p.grad = torch.randn(p.shape, generator=g).to(p)

    @property
    def step(self) -> dict[str, Tensor]:
        return {n: p.detach() - self.old[n] for n, p in self.parameters.items()}

    def parts(self) -> StepParts | str:
        return step_parts([self.optimizer], self.parameters, self.old, self.step)

    def group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[0]


def close(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> bool:
    return float((one.double() - other.double()).norm()) <= tolerance * max(
        float(other.double().norm()), 1e-12
    )


def adam_reference(
    taken: Taken,
    name: str,
    m: Tensor | float,
    v: Tensor | float,
    largest: Tensor | float,
    k: int,
    coupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Section 4 of theory.md, from the moments before the step."""
    group, theta, g = taken.group(), taken.old[name].double(), taken.g[name]
    (b1, b2), lr, decay = group["betas"], float(group["lr"]), group["weight_decay"]
    g = -g if group.get("maximize") else g
    in_moments = g + decay * theta if coupled else g
    v_new = b2 * v + (1 - b2) * in_moments**2
    if group.get("amsgrad"):
        v_new = torch.maximum(v_new, torch.as_tensor(largest, dtype=v_new.dtype))
    P = -lr / (1 - b1 ** (k + 1)) / ((v_new / (1 - b2 ** (k + 1))).sqrt() + group["eps"])
    of_decay = P * (1 - b1) * decay * theta if coupled else -lr * decay * theta
    return P * b1 * m, of_decay, P * (1 - b1) * g


ADAMS = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AdamW without decay": (torch.optim.AdamW, {"weight_decay": 0.0}),
    "AdamW, amsgrad": (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
    "AdamW, maximize": (torch.optim.AdamW, {"weight_decay": 0.1, "maximize": True}),
    "AdamW, betas": (torch.optim.AdamW, {"betas": (0.5, 0.9), "eps": 1e-2}),
    "AdamW, foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW, fused": (torch.optim.AdamW, {"fused": True}),
    "Adam": (torch.optim.Adam, {}),
    "Adam, coupled": (torch.optim.Adam, {"weight_decay": 0.3}),
    "Adam, coupled, all": (torch.optim.Adam, {"weight_decay": 0.3, "maximize": True, "amsgrad": True}),
}


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("name", ADAMS)
def test_adam(name, steps):
    kind, options = ADAMS[name]
    taken = Taken(lambda p: kind(p, lr=0.03, **options), steps)
    parts = taken.parts()
    assert isinstance(parts, StepParts)
    assert parts.error < 1e-12
    coupled = kind is torch.optim.Adam
    for n in NAMES:
        state = taken.state[n]
        m, v = state.get("exp_avg", 0.0), state.get("exp_avg_sq", 0.0)
        reference = adam_reference(taken, n, m, v, state.get("max_exp_avg_sq", 0.0), steps, coupled)
        assert close(sum(reference), taken.step[n], 1e-10)
        if steps:
            assert close(parts.momentum[n], reference[0], 1e-10)
        else:
            assert not parts.momentum[n].any()
        if taken.group()["weight_decay"]:
            assert close(parts.decay[n], reference[1])
        else:
            assert not parts.decay
        rest = taken.step[n] - parts.momentum[n] - (parts.decay[n] if parts.decay else 0)
        assert close(rest, reference[2], 1e-10)


SGDS = {
    "plain": {},
    "decay": {"weight_decay": 0.2},
    "maximize": {"maximize": True, "weight_decay": 0.2},
    "momentum": {"momentum": 0.9},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.2},
    "dampening": {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.2},
    "all": {"momentum": 0.8, "dampening": 0.4, "weight_decay": 0.2, "maximize": True, "foreach": True},
}


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", SGDS)
def test_sgd_is_linear_so_its_parts_are_its_step_without_a_gradient(name, steps):
    build = lambda p: torch.optim.SGD(p, lr=0.05, **SGDS[name])  # noqa: E731
    taken = Taken(build, steps)
    parts = taken.parts()
    assert isinstance(parts, StepParts)
    assert parts.error < 1e-12
    without = {}
    for decay in (SGDS[name].get("weight_decay", 0.0), 0.0):
        twin = nn.Linear(5, 4).double()
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, **{**SGDS[name], "weight_decay": decay})
        for n, p in twin.named_parameters():
            p.data.copy_(taken.old[n])
            p.grad = torch.zeros_like(p)
            if taken.state[n].get("momentum_buffer") is not None:
                optimizer.state[p]["momentum_buffer"] = taken.state[n]["momentum_buffer"].clone()
        optimizer.step()
        without[decay] = {n: p.detach() - taken.old[n] for n, p in twin.named_parameters()}
    decay = SGDS[name].get("weight_decay", 0.0)
    for n in NAMES:
        of_decay = parts.decay[n] if parts.decay else torch.zeros_like(taken.old[n])
        torch.testing.assert_close(parts.momentum[n] + of_decay, without[decay][n], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(parts.momentum[n], without[0.0][n], rtol=1e-10, atol=1e-14)
        assert bool(of_decay.any()) == bool(decay)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind", ["AdamW", "Adam", "AdamW32bit", "AdamW8bit", "Adam8bit"])
def test_bitsandbytes(kind, steps):
    with quiet_libraries():
        bnb = pytest.importorskip("bitsandbytes")
    coded = "8bit" in kind
    options = {"weight_decay": 0.1, "lr": 0.03, **({"min_8bit_size": 1} if coded else {})}
    build = lambda p: getattr(bnb.optim, kind)(p, **options)  # noqa: E731
    taken = Taken(build, steps, torch.float32, (40, 30))
    parts = taken.parts()
    assert isinstance(parts, StepParts), parts
    assert parts.error < (CODED_TOLERANCE if coded else 1e-5)
    for n in NAMES:
        m = v = 0.0
        if steps:
            before = read_moments({n: taken.state[n]}, {n: False})[n]
            m, v = before.exp_avg.double(), before.exp_avg_sq.double()
        of_momentum, of_decay, of_gradient = adam_reference(taken, n, m, v, 0.0, steps, False)
        length = float(taken.step[n].double().norm())
        tolerance = (CODED_TOLERANCE if coded else 1e-4) * length
        assert float((parts.momentum[n] - of_momentum).norm()) < tolerance
        assert float((parts.decay[n] - of_decay).norm()) < 1e-6 * length
        rest = taken.step[n] - parts.momentum[n] - parts.decay[n]
        assert float((rest - of_gradient).norm()) < tolerance
        if steps:
            assert float(of_momentum.norm()) > 0.2 * length  # the comparison is of something
        else:
            assert not parts.momentum[n].any()


def lion(p: Any) -> torch.optim.Optimizer:
    with quiet_libraries():
        bnb = pytest.importorskip("bitsandbytes")
    return bnb.optim.Lion(p, lr=1e-3)


def muon(p: Any) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    return torch.optim.Muon([x for x in p if x.ndim == 2], lr=1e-3)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lion, "Lion"),
        (muon, "Muon"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), "SGD"),
        (lambda p: torch.optim.RMSprop(p, lr=0.01), "RMSprop"),
        (lambda p: torch.optim.NAdam(p, lr=0.01), "NAdam"),
    ],
)
def test_other_rules_say_that_they_have_no_parts(build, name):
    taken = Taken(build, 2, torch.float32)
    parameters = {n: p for n, p in taken.parameters.items() if p in taken.optimizer.state}
    step = {n: taken.step[n] for n in parameters}
    assert (
        step_parts([taken.optimizer], parameters, taken.old, step) == f"{name} is not linear in the gradient"
    )


class Doubled(torch.optim.AdamW):
    """A rule that is not the one it inherits from."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step(closure)


def test_what_the_parts_do_not_explain_is_said():
    taken = Taken(lambda p: Doubled(p, lr=0.1), 2)
    assert "of the step unexplained" in str(taken.parts())

    taken = Taken(lambda p: torch.optim.AdamW(p, lr=0.1), 2)
    taken.group()["lr"] = 0.05
    assert str(taken.parts()) == "momentum, decay and gradient leave 0.5 of the step unexplained"

    taken = Taken(lambda p: torch.optim.SGD(p, lr=0.1), 2)
    taken.parameters["bias"].grad *= 2
    assert "of the step unexplained" in str(taken.parts())


@pytest.mark.parametrize("steps", [0, 5])
def test_a_gradient_that_adam_cannot_have_seen_is_found(steps):
    """Momentum and gradient add up to the step whatever the gradient is; the second moment tells."""
    taken = Taken(lambda p: torch.optim.AdamW(p, lr=0.1), steps)
    taken.parameters["bias"].grad *= 100
    assert taken.parts() == "the gradient of bias is not the one that the step was taken with"


def test_gradients_that_are_gone():
    taken = Taken(lambda p: torch.optim.AdamW(p, lr=0.1), 2)
    taken.parameters["weight"].grad = None
    assert taken.parts() == "the gradient or the optimizer's state of weight is gone"

    taken = Taken(lambda p: torch.optim.AdamW(p, lr=0.1), 2)
    taken.optimizer.state.clear()
    assert taken.parts() == "the gradient or the optimizer's state of weight is gone"


def test_a_parameter_without_a_gradient_has_no_part_in_the_step():
    taken = Taken(lambda p: torch.optim.AdamW(p, lr=0.1), 2)
    taken.parameters["bias"].grad = None
    taken.old["bias"] = taken.parameters["bias"].detach().clone()
    parts = taken.parts()
    assert isinstance(parts, StepParts)
    assert not parts.momentum["bias"].any()
    assert not parts.decay["bias"].any()
    assert parts.momentum["weight"].any()


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled_after_a_step_of_a_gradient_scaler(fused):
    """A fused AdamW takes scaled gradients and unscales them itself."""
    layer = nn.Linear(5, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    parameters = dict(layer.named_parameters())
    m: dict[str, Any] = {}
    for k in range(3):
        optimizer.zero_grad()
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(k))
        scaler.scale(layer(x).square().sum()).backward()
        old = {n: p.detach().clone() for n, p in parameters.items()}
        m = {n: optimizer.state[p]["exp_avg"].clone() for n, p in parameters.items()} if k else {}
        scaler.step(optimizer)
        scaler.update()
    step = {n: p.detach() - old[n] for n, p in parameters.items()}
    parts = step_parts([optimizer], parameters, old, step)
    assert isinstance(parts, StepParts)
    for n, p in parameters.items():
        v = optimizer.state[p]["exp_avg_sq"].double()
        expected = -0.1 * 0.9 * m[n] / (1 - 0.9**3) / ((v / (1 - 0.999**3)).sqrt() + 1e-8)
        assert close(parts.momentum[n], expected, 1e-5)


def test_groups_and_optimizers_of_their_own_and_precision():
    """Each parameter is split with the settings of its own group; bf16 weights round the step beyond use."""
    layer = nn.Linear(5, 4)
    parameters = dict(layer.named_parameters())
    optimizers = [
        torch.optim.SGD([{"params": [layer.weight], "lr": 0.1}], lr=1.0, momentum=0.5),
        torch.optim.AdamW([layer.bias], lr=0.01, weight_decay=0.3),
    ]
    for k in range(2):
        g = torch.Generator().manual_seed(k)
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=g)
        old = {n: p.detach().clone() for n, p in parameters.items()}
        buffer = optimizers[0].state[layer.weight].get("momentum_buffer", torch.zeros(1)).clone()
        for optimizer in optimizers:
            optimizer.step()
    step = {n: p.detach() - old[n] for n, p in parameters.items()}
    parts = step_parts(optimizers, parameters, old, step)
    assert isinstance(parts, StepParts)
    assert close(parts.momentum["weight"], -0.1 * 0.5 * buffer, 1e-5)
    assert not parts.decay["weight"].any()
    assert close(parts.decay["bias"], -0.01 * 0.3 * old["bias"], 1e-6)

    rounded = Taken(lambda p: torch.optim.AdamW(p, lr=1e-3), 2, torch.bfloat16)
    assert "of the step unexplained" in str(rounded.parts())
