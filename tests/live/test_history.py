"""The history of a watch, and what goes on from a checkpoint or from a log."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from probe.live.names import scalars
from tests.support.live_loops import adamw, attach, full_model, numbers, seeded, small_loop


@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_watch_gives_the_history_of_an_uninterrupted_one(every):
    settings = {"every": every, "collapse_fraction": 0.99, "horizon": 5}
    with seeded():
        loop = small_loop(steps=10)
        whole = attach(loop.model, loop.optimizers[0], **settings)
        loop.run()
    with seeded():
        loop = small_loop(steps=10)
        first = attach(loop.model, loop.optimizers[0], **settings)
        loop.run(4)
        saved = json.loads(json.dumps(first.state_dict()))
        first.detach()
        second = attach(loop.model, loop.optimizers[0], **settings)
        second.load_state_dict(saved)
        assert second.step == 4
        assert second.history == first.history
        assert second.history[0] is not saved["run"]["history"][0]
        loop.run()
    assert numbers(second.history) == numbers(whole.history)
    again, uninterrupted = second.state_dict(), whole.state_dict()
    for name in ("readings", "threshold", "sums", "step"):
        assert again["run"][name] == uninterrupted["run"][name]
    assert again["alarm"] == uninterrupted["alarm"]
    assert again["explosion_alarm"] == uninterrupted["explosion_alarm"]


def test_a_state_of_an_older_version_is_read():
    """It knows of no explosion and no logged entropies, and its alarm holds the horizon."""
    with seeded():
        loop = small_loop(steps=4)
        watch = attach(loop.model, loop.optimizers[0], every=1)
        loop.run()
    state = json.loads(json.dumps(watch.state_dict()))
    del state["explosion_alarm"], state["run"]["ceiling"], state["run"]["logged"]
    for reading in state["run"]["readings"]:
        del reading["logged"]
    state["alarm"]["horizon"] = 50
    watch.load_state_dict(state)
    assert watch.step == 4
    assert watch.state_dict()["run"]["readings"][0]["logged"] is False


def test_a_state_of_something_else_is_refused():
    model = full_model()
    watch = attach(model, adamw(model))
    with pytest.raises(
        ValueError, match="state: expected one of the format entropy-probe/watch/1, found None"
    ):
        watch.load_state_dict({"run": {}})


def test_a_first_step_that_is_not_1():
    with seeded():
        loop = small_loop(steps=5)
        watch = attach(loop.model, loop.optimizers[0], every=2, first_step=100)
        loop.run()
    assert [entry["step"] for entry in watch.history] == [101, 103, 105]
    assert watch.step == 105


def test_replaying_a_log_goes_on_as_if_nothing_had_happened():
    """But for the sizes of errors, which weigh levels: what the log has of these is pooled already."""
    settings = {"control_variates": False}  # what they learned is not in the log
    with seeded():
        one = small_loop(steps=6)
        whole = attach(one.model, one.optimizers[0], **settings)
        one.run()
    with seeded():
        two = small_loop(steps=6)
        first = attach(two.model, two.optimizers[0], **settings)
        two.run(4)
        first.detach()
        names = [{k.partition("/")[2]: v for k, v in scalars(e).items()} for e in first.history]
        second = attach(two.model, two.optimizers[0], first_step=4, **settings)
        second.replay({"step": e["step"], **own} for e, own in zip(first.history, names, strict=True))
        two.run()
    assert [e["step"] for e in second.history] == [1, 2, 3, 4, 5, 6]
    for name in (
        "cumulative_deltaH1_tok",
        "cumulative_deltaH_true_se",
        "cumulative_H_tok",
        "H_predicted_tok",
    ):
        close = {"cumulative_deltaH_true_se": 0.1, "H_predicted_tok": 1e-3}.get(name, 1e-9)
        assert second.last[name] == pytest.approx(whole.last[name], rel=close), name
    assert second.last["steps_to_collapse"] == pytest.approx(whole.last["steps_to_collapse"], rel=0.1)
    assert second.last["collapse_entropy"] == whole.last["collapse_entropy"]


def replayed(entries: list[dict[str, Any]], **settings: Any) -> Any:
    with seeded():
        model = full_model()
        watch = attach(model, adamw(model), **settings)
        watch.replay(entries)
        watch.detach()
    return watch


def logged_entry(step: int, H: float, change: float = -0.01, **more: Any) -> dict[str, Any]:
    values = {"H_orig_tok": H, "H_orig_tok_se": 0.01, "deltaH_true_tok": change, "deltaH_true_tok_se": 0.001}
    return {
        "step": step,
        **values,
        "H_orig": 4 * H,
        "collapse_entropy": 0.2,
        "explosion_entropy": 6.0,
        **more,
    }


def test_a_replayed_entropy_of_0_is_no_error():
    watch = replayed([logged_entry(k, 0.0, change=0.0) for k in (1, 2, 3)])
    assert watch._history.look_ahead(0.9).collapse.reached


def test_a_replayed_step_of_exactly_0_counts_in_the_sums():
    first = logged_entry(1, 2.0, change=0.0)
    del first["deltaH_true_tok_se"]
    watch = replayed([first, logged_entry(11, 2.0), logged_entry(21, 1.9)])
    # interpolated from 0 to -0.01 over the first ten steps, -0.01 in each of the next ten
    assert watch._history.run.sums["deltaH_true_tok"].total == pytest.approx(-0.045 - 0.1)


def test_no_explosion_is_forecast_beyond_the_vocabulary():
    model = full_model()
    most = math.log(model.get_input_embeddings().weight.shape[0])
    entries = []
    for k, H in enumerate(most * x for x in (0.5, 0.6, 0.7, 0.8, 0.9)):
        entries.append(
            {"step": k + 1, "H_orig_tok": H, "H_orig_tok_se": 0.01, "H_orig": H, "H_orig_se": 0.01}
            | {
                "deltaH_true_tok": 0.1 * most,
                "deltaH_true_tok_se": 0.01,
                "collapse_entropy": 0.1,
                "verdict_code": 1,
            }
        )
    for factor, forecast in ((1.5, True), (2.5, False)):
        watch = replayed([{**one, "explosion_entropy": factor * 0.5 * most} for one in entries])
        ahead = watch._history.look_ahead(0.9)
        assert ahead.collapse is not None
        assert (ahead.explosion is not None) is forecast


def test_a_start_outside_the_band_is_said(caplog):
    with seeded(), caplog.at_level("WARNING"):
        loop = small_loop(steps=5)
        watch = attach(loop.model, loop.optimizers[0], entropy_band=(0.1, 0.5))
        loop.run()
    assert "at or above explosion_entropy = 0.5: an alarm of that will say no more than this" in caplog.text
    assert watch.history[0]["explosion_entropy"] == 0.5


def test_what_the_settings_say_of_the_band_goes_before_the_log():
    entries = [logged_entry(k, 2.0) for k in (1, 2, 3)]
    run = replayed(entries)._history.run
    assert (run.threshold, run.ceiling) == (0.2, 6.0)
    run = replayed(entries, collapse_entropy=0.5, explosion_factor=None)._history.run
    assert (run.threshold, run.ceiling) == (0.5, None)
    run = replayed(entries, entropy_band=(0.3, 3.0))._history.run
    assert (run.threshold, run.ceiling) == (0.3, 3.0)
    for entry in entries:
        del entry["explosion_entropy"]  # as an older version logs
    assert replayed(entries)._history.run.ceiling == pytest.approx(6.0)


def test_entries_out_of_order_are_refused():
    with pytest.raises(ValueError, match="entries: expected increasing steps, found 2 after 3"):
        replayed([logged_entry(3, 2.0), logged_entry(2, 2.0)])
