"""When an update begins and ends, with one optimizer and with several."""

from __future__ import annotations

import pytest

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
