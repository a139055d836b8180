"""When an update begins and ends, with one optimizer and with several."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from probe.distributed.ranks import ALONE
from probe.live.hooks import StepHooks
from probe.live.ranks import Company
from tests.support.live_loops import attach, gradients, moved, named, seeded, small_loop, two_optimizers


def test_a_second_watch_is_pointed_out(caplog):
    loop = small_loop(steps=1)
    attach(loop.model, loop.optimizers[0])
    attach(loop.model, loop.optimizers[0])
    assert sum("watched already" in record.message for record in caplog.records) == 1


def test_two_optimizers_make_one_update():
    with seeded():
        model, (first, second) = two_optimizers()
        watch = attach(model, [first, second])
        for k in range(3):
            old = {n: p.detach().clone() for n, p in named(model)}
            gradients(model, k)
            for optimizer in (first, second) if k % 2 == 0 else (second, first):
                optimizer.step()
            assert watch.last["step"] == watch.step == k + 1
            assert watch.last["step_norm"] == pytest.approx(moved(old, model), rel=1e-5)
            assert "momentum_share_tok" in watch.last


def test_an_optimizer_that_steps_twice_ends_the_update():
    """Its gradients are those of the next step by then, so that nothing is said about its parts."""
    with seeded():
        model, (first, second) = two_optimizers()
        watch = attach(model, [first, second])
        old = {n: p.detach().clone() for n, p in named(model)}
        gradients(model, 0)
        first.step()
        assert watch.history == []  # the second one may still come
        distance = moved(old, model)
        gradients(model, 1)
        middle = {n: p.detach().clone() for n, p in named(model)}
        first.step()
        assert [e["step"] for e in watch.history] == [1]
        assert watch.last["step_norm"] == pytest.approx(distance, rel=1e-5)
        assert "only when the next one began" in watch.last["shares_reason"]
        second.step()
        assert [e["step"] for e in watch.history] == [1, 2]
        assert watch.last["step_norm"] == pytest.approx(moved(middle, model), rel=1e-5)
        assert "shares_reason" not in watch.last


def test_detaching_and_the_context_manager():
    with seeded():
        loop = small_loop()
        optimizer = loop.optimizers[0]
        with attach(loop.model, optimizer) as watch:
            assert watch.active
            loop.run(2)
        assert not watch.active
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        loop.run(2)
        assert len(watch.history) == watch.step == 2
        watch.detach()  # again
        with pytest.raises(LookupError), attach(loop.model, optimizer) as other:
            raise LookupError
        assert not other.active
        assert not optimizer._optimizer_step_pre_hooks


def test_two_watches_on_one_optimizer():
    with seeded():
        loop = small_loop()
        one = attach(loop.model, loop.optimizers[0])
        two = attach(loop.model, loop.optimizers[0], every=2)
        loop.run(3)
        one.detach()
        loop.run()
    assert [e["step"] for e in one.history] == [1, 2, 3]
    assert [e["step"] for e in two.history] == [1, 3, 5]
    assert one.history[0]["deltaH_true_tok"] == two.history[0]["deltaH_true_tok"]


# ---------------------------------------------------------------- the hooks alone


class Told:
    """Notes what the hooks say."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.error: BaseException | None = None
        self.probe, self.early = SimpleNamespace(parameters={}, ranks=ALONE), False
        self.company = Company(self.probe)
        self.at_end: Callable[[], None] = lambda: None

    def begin(self) -> None:
        self.events.append("begin")

    def end(self, late: bool) -> None:
        self.events.append("end late" if late else "end")
        self.at_end()

    def between(self) -> None:
        self.events.append("between")

    def forget(self) -> None:
        self.events.append("forget")


def hooked(count: int) -> tuple[Any, StepHooks, list[torch.optim.Optimizer]]:
    told: Any = Told()
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1) for _ in range(count)
    ]
    hooks = StepHooks(optimizers, told)
    hooks.register()
    return told, hooks, optimizers


@pytest.mark.parametrize(
    ("steps", "events"),
    [
        ("a", ["begin"]),
        ("ab", ["begin", "end", "between"]),
        ("ba", ["begin", "end", "between"]),
        ("aa", ["begin", "end late", "begin"]),
        ("aab", ["begin", "end late", "begin", "end", "between"]),
    ],
)
def test_an_update_is_one_step_of_every_optimizer(steps, events):
    told, hooks, (a, b) = hooked(2)
    for name in steps:
        {"a": a, "b": b}[name].step()
    hooks.detach()
    assert told.events == [*events, "forget"]


@pytest.mark.parametrize("how", ["detached", "error"])
def test_nothing_is_told_after_the_end(how):
    told, hooks, (one,) = hooked(1)

    def fails() -> None:
        told.error = ValueError()

    told.at_end = hooks.detach if how == "detached" else fails
    one.step()
    assert told.events == ["begin", "end", "forget"]
    assert not hooks.active
    one.step()
    assert told.events == ["begin", "end", "forget"]
