"""Where numbers and lines go."""

from __future__ import annotations

import csv
import logging
import math
from typing import Any

import pytest

from probe.live.names import PREFIX, probe_scalars, scalars
from tests.support.live_loops import TIMES, attach, seeded, small_loop


def test_the_cost_is_said_with_the_first_step_after_the_first_probe(caplog):
    caplog.set_level(logging.INFO, "probe.live")
    loop = small_loop(steps=3)
    attach(loop.model, loop.optimizers[0], every=100)
    loop.run()
    assert sum("a training step" in record.message for record in caplog.records) == 1


def test_the_first_reason_is_said_when_the_verdict_changes(caplog):
    caplog.set_level(logging.INFO, "probe.live")
    loop = small_loop(steps=4)
    group = loop.optimizers[0].param_groups[0]
    group["lr"] = 0.0
    watch = attach(loop.model, loop.optimizers[0])
    loop.run()
    lines = [r.message for r in caplog.records if "entropy probe: step" in r.message]
    assert [watch.history[0]["verdict_reasons"][0] in line for line in lines] == [True, False, False, False]


def test_a_reason_of_another_kind_is_said_too(caplog):
    caplog.set_level(logging.INFO, "probe.live")
    loop = small_loop()
    outlets = attach(loop.model, loop.optimizers[0])._outlets
    reasons = (
        "E is worth 9.5 responses.",
        "E is worth 12 responses.",
        "The step bends by 20 %.",
        "E is worth 8 responses.",
    )
    for step, reason in enumerate(reasons, 1):
        outlets._say_probe({"step": step, "verdict": "caution", "verdict_reasons": [reason]})
    lines = [r.message for r in caplog.records if "entropy probe: step" in r.message]
    assert [reason in line for line, reason in zip(lines, reasons, strict=True)] == [True, False, True, False]


class WithLog:
    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, float], int]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.seen.append((metrics, step))


def run_logged(log: Any, steps: int = 2) -> Any:
    with seeded():
        loop = small_loop(steps=steps)
        watch = attach(loop.model, loop.optimizers[0], log=log)
        loop.run()
    return watch


def test_logs_to_a_function_and_to_an_object():
    target, calls = WithLog(), []
    watch = run_logged(target)
    run_logged(lambda metrics, step: calls.append((metrics, step)))
    assert [step for _, step in target.seen] == [1, 2]
    for seen in (target.seen, calls):
        for (metrics, _), entry in zip(seen, watch.history, strict=True):
            assert {k: v for k, v in metrics.items() if k.split("/")[1] not in TIMES} == {
                k: v for k, v in probe_scalars(entry).items() if k.split("/")[1] not in TIMES
            }
            assert all(isinstance(x, float) and math.isfinite(x) for x in metrics.values())
            assert type(metrics) is dict


def test_logs_to_a_lightning_logger(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="", version="")
    watch = run_logged(logger)
    logger.save()
    with open(tmp_path / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2]
    for row, entry in zip(rows, watch.history, strict=True):
        assert float(row[f"{PREFIX}/deltaH_true_tok"]) == entry["deltaH_true_tok"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_logs_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        watch = run_logged(writer)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert set(scalars(watch.last)) <= tags
    for tag in (f"{PREFIX}/deltaH1_tok", f"{PREFIX}/H_orig_tok", f"{PREFIX}/verdict_code"):
        found = [(e.step, e.value) for e in events.Scalars(tag)]
        expected = [(e["step"], e[tag.split("/")[1]]) for e in watch.history]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_steps_that_change_nothing_are_pointed_out(caplog):
    loop = small_loop()
    for group in loop.optimizers[0].param_groups:
        group["lr"] = 0.0
    attach(loop.model, loop.optimizers[0])
    loop.run(5)
    assert sum("3 probed steps in a row have changed nothing" in r.message for r in caplog.records) == 1
