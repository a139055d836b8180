"""What a log gets beside numbers: alarms and verdicts in words, and pictures."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from probe.live.notes import DRAWN_EVERY, NoteTaker
from probe.live.settings import WatchSettings
from probe.report.summary import summary_of
from tests.live.test_alarm import logged_loop
from tests.support import trackers
from tests.support.helpers import rendered
from tests.support.live_loops import attach, seeded, small_loop
from tests.support.trackers import WandbRun, library, media_of


def entry(step: int, verdict: str = "caution") -> dict[str, Any]:
    curves = (
        "H_orig",
        "H_predicted",
        "H_tracked",
        "cumulative_H",
        "cumulative_deltaH1",
        "cumulative_deltaH_true",
    )
    numbers = {f"{name}_tok{part}": 0.5 for name in curves for part in ("", "_se")}
    return {"step": step, "verdict": verdict, "verdict_reasons": [f"because <b>{step}</b>"], **numbers}


def alarm(step: int) -> Any:
    return SimpleNamespace(step=step, message=f"collapse <i>ahead</i> of step {step}")


def test_a_changed_verdict_is_said_with_its_reasons():
    taker, history, said = NoteTaker(WatchSettings()), [], {}
    for step, verdict in enumerate(("caution", "caution", "invalid", "invalid", "caution"), 1):
        history.append(entry(step, verdict))
        notes = taker.of_probe(history, [])
        if notes is not None:
            said[step] = notes
    assert list(said) == [1, 3, 5]
    assert [one.facts["verdict"] for one in said.values()] == ["caution", "invalid", "caution"]
    assert "<li>because &lt;b&gt;3&lt;/b&gt;</li>" in rendered(said[3].texts["verdict"]).replace(
        "&#60;", "&lt;"
    ).replace("&#62;", "&gt;")
    assert "<td>temperature</td>" in rendered(said[1].texts["settings"])
    assert "settings" not in said[3].texts


def test_pictures_are_drawn_every_so_often_and_at_alarms():
    taker, history, drawn = NoteTaker(WatchSettings()), [], []
    for step in range(1, 36):
        history.append(entry(step))
        alarms = [alarm(step)] if step == 14 else []
        notes = taker.of_probe(history, alarms)
        if notes is not None and notes.history:
            drawn.append(step)
    assert drawn == [DRAWN_EVERY, 14, 14 + DRAWN_EVERY, 14 + 2 * DRAWN_EVERY]


def test_an_alarm_is_text_alert_and_fact():
    taker, history = NoteTaker(WatchSettings()), [entry(1)]
    taker.of_probe(history, [])
    notes = taker.of_alarms(history, [alarm(4)])
    assert notes is not None
    assert rendered(notes.texts["alarm"]).startswith("<p><strong>Alarm after step 4</strong>")
    assert "<i>" not in rendered(notes.texts["alarm"])
    assert notes.alerts == [alarm(4).message]
    second = taker.of_probe([*history, entry(9)], [alarm(9)])
    assert second is not None
    assert second.facts["alarms"] == "step 4, step 9"
    assert taker.of_alarms(history, []) is None


def test_the_end_is_said_once():
    taker, history = NoteTaker(WatchSettings(figures=False)), [entry(1), entry(2)]
    taker.of_probe(history, [])
    notes = taker.of_end(history, summary_of(history, 5, None))
    assert notes is not None
    assert "2 of 5 steps probed" in rendered(notes.texts["summary"])
    assert notes.pictures == {}
    assert taker.of_end(history, summary_of(history, 5, None)) is None
    assert NoteTaker(WatchSettings()).of_end([entry(1)], None) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_loop_with_a_tensorboard_writer(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer, seeded():
        loop = small_loop(steps=11)
        watch = attach(loop.model, loop.optimizers[0], log=writer)
        loop.run()
        watch.detach()
        watch.detach()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    assert [one.step for one in events.Images("entropy_probe/1_entropy")] == [10, 11]
    (summary,) = events.Tensors("entropy_probe/summary/text_summary")
    assert summary.step == 11
    verdicts = [one.step for one in events.Tensors("entropy_probe/verdict/text_summary")]
    changed = [
        b["step"]
        for a, b in zip(watch.history, watch.history[1:], strict=False)
        if a["verdict"] != b["verdict"]
    ]
    assert verdicts == [1, *changed]


def test_a_loop_with_a_run_of_weights_and_biases(monkeypatch):
    monkeypatch.setitem(sys.modules, trackers.__name__.partition(".")[0], library("tests", "Image"))
    run = WandbRun()
    watch, _ = logged_loop(collapse_fraction=0.1, horizon=20, log=run, strict=True)
    H = watch.last["H_orig_tok"]
    for step in range(15, 25):
        H *= 0.85
        watch.note_entropy(H, step)
    watch.detach()
    (raised,) = watch.last["alarms"]
    ((title, text, _),) = run.alerts
    assert title == "entropy probe: alarm"
    assert f"after step {raised}" in text
    assert run.summary["entropy_probe/alarms"] == f"step {raised}"
    assert run.summary["entropy_probe/verdict"] == watch.last["verdict"]
    assert media_of(run.logged)["entropy_probe/1_entropy"] == [raised]
    assert [step for _, step in run.logged] == sorted(step for _, step in run.logged)


class Blind(WandbRun):
    """Takes no pictures."""

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        if any(isinstance(value, trackers.Media) for value in data.values()):
            raise OSError(28, "No space left on device")
        super().log(data, step)


def test_a_log_that_fails_to_show_pictures_still_gets_numbers(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, trackers.__name__.partition(".")[0], library("tests", "Image"))
    run = Blind()
    with seeded():
        loop = small_loop(steps=12)
        watch = attach(loop.model, loop.optimizers[0], log=run, strict=False)
        loop.run()
        watch.detach()
    assert [step for _, step in run.logged] == list(range(1, 13))
    assert caplog.text.count("the log takes no pictures and texts from step 10 on") == 1
    assert watch.error is None


def test_drawing_counts_as_the_probes_time():
    run = WandbRun()
    with seeded():
        loop = small_loop(steps=3)
        watch = attach(loop.model, loop.optimizers[0], log=run)
        loop.run()
    before = watch.schedule.probe_seconds
    watch.detach()
    assert watch.schedule.probe_seconds > before
