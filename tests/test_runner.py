"""Which callbacks a run calls."""

from __future__ import annotations

import pytest

from probe.callbacks import (
    ConsoleReport,
    DeltaH1,
    DetailedLogging,
    GroundTruth,
    ProbeCallback,
    ProgressBars,
    TensorBoardDiagnostics,
)
from probe.config.schema import ProbeConfig
from probe.errors.exceptions import ConfigError
from probe.module import EntropyProbe
from probe.runner import ProbeRunner


class Stop(ProbeCallback):
    """Ends a run before anything is loaded."""

    def on_probe_start(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        raise ConfigError("stop here")


@pytest.mark.parametrize(
    ("asked", "called"),
    [
        (
            (),
            [
                ProgressBars,
                DeltaH1,
                GroundTruth,
                ConsoleReport,
                DetailedLogging,
                TensorBoardDiagnostics,
                Stop,
            ],
        ),
        (([],), [Stop]),
        (([ConsoleReport()],), [ConsoleReport, Stop]),
    ],
)
def test_a_run_calls_what_is_asked_for_or_what_the_configuration_asks_for(
    asked, called, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    runner = ProbeRunner("cpu", callbacks=Stop(), logger=False)
    with pytest.raises(ConfigError, match="stop here"):
        runner.run(EntropyProbe(ProbeConfig(), 1), *asked)
    assert [type(callback) for callback in runner.fabric._callbacks] == called


class Former(ProbeCallback):
    """Of a version that asked for phases by name."""

    phases = ("update",)

    def run_update(self, runner, module):
        raise AssertionError


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (Former(), r"Former to compute its phases in `compute\(runner, module\)`, found run_update, phases"),
        ("x", "expected objects derived from ProbeCallback, found 'x'"),
    ],
)
def test_a_callback_that_would_be_passed_over_is_refused(callback, message):
    runner = ProbeRunner(accelerator="cpu", logger=False)
    with pytest.raises(ConfigError, match=message):
        runner.run(EntropyProbe(ProbeConfig()), [callback])
