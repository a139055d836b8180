"""Where loggers take texts, pictures and alerts."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from probe.report.boards import TensorBoardWriter, TrackedRun, board_of, board_of_logger
from probe.report.publish import Shown, publish
from tests.support import trackers
from tests.support.synthetic_run import make_result
from tests.support.trackers import AlertLevel, MlflowLogger, TrackioRun, WandbRun, library, media_of

IMAGE = np.zeros((4, 6, 3), dtype=np.uint8)


@pytest.fixture
def media(monkeypatch):
    """The library that the stand-ins' runs come from."""

    def install(*kinds):
        monkeypatch.setitem(sys.modules, trackers.__name__.partition(".")[0], library("tests", *kinds))

    return install


def test_what_is_a_board():
    assert isinstance(board_of(SimpleNamespace(add_text=print, add_image=print)), TensorBoardWriter)
    assert isinstance(board_of(WandbRun()), TrackedRun)
    assert isinstance(board_of(TrackioRun()), TrackedRun)
    for other in (None, print, SimpleNamespace(log=print), SimpleNamespace(add_scalar=print)):
        assert board_of(other) is None


def test_weights_and_biases_get_pictures_facts_and_alerts(media):
    media("Image", "Html")
    run = WandbRun()
    board = board_of(run, "trainer/global_step")
    board.numbers({"x": 1.0}, 7)
    board.picture("p", IMAGE, 7)
    board.text("t", "**no Markdown there**", 7)
    board.alert("a" * 100, "what to do")
    board.facts({"verdict": "caution"})
    assert run.logged[0] == ({"x": 1.0, "trainer/global_step": 7}, None)
    assert media_of(run.logged) == {"p": [None]}
    assert run.alerts == [("a" * 60, "what to do", AlertLevel.WARN)]
    assert run.summary == {"verdict": "caution"}


def test_trackio_gets_texts_too(media):
    media("Image", "Markdown")
    run = TrackioRun()
    board = board_of(run)
    board.text("t", "**bold**", 3)
    board.picture("p", IMAGE, 3)
    board.alert("title", "what to do")
    board.facts({"verdict": "caution"})  # it has no summary
    assert media_of(run.logged) == {"t": [3], "p": [3]}
    assert run.alerts == [("title", "what to do", AlertLevel.WARN)]


def test_a_library_acts_on_its_active_run():
    run = WandbRun()
    module = library("wandb", "Image", run=run)
    board = board_of(module, "train/global_step")
    board.picture("p", IMAGE, 2)
    board.facts({"verdict": "invalid"})
    assert run.logged[0][0]["train/global_step"] == 2
    assert media_of(run.logged) == {"p": [None]}
    assert run.summary == {"verdict": "invalid"}


def test_a_result_through_lightnings_logger_of_weights_and_biases(state, media):
    media("Image")
    run = WandbRun()
    logger = SimpleNamespace(
        experiment=run,
        log_metrics=lambda metrics, step: run.log({**metrics, "trainer/global_step": step}),
        log_hyperparams=lambda config: run.summary.update(config),
        save=lambda: None,
    )
    result = make_result(state)
    publish(logger, state, result, Shown())
    assert media_of(run.logged) == {"entropy_probe/1_prediction_and_measurement": [None]}
    assert run.summary["entropy_probe/verdict"] == result.values["verdict"]
    assert result.values["verdict_reasons"][0] in run.summary["entropy_probe/verdict_reasons"]
    assert run.summary["settings/probe_rework/loss"] == "dapo"


def test_mlflow_has_artifacts_and_tags():
    logger = MlflowLogger()
    board = board_of_logger(logger)
    image = np.zeros((2, 3, 3), dtype=np.uint8)
    board.numbers({"entropy_probe/H": 0.5}, 3)
    board.text("entropy_probe/verdict", "**caution**", 3)
    board.picture("entropy_probe/1_entropy", image, 3)
    board.alert("entropy probe: alarm", "collapse in 3 steps")
    board.facts({"entropy_probe/verdict": "caution"})
    client = logger.experiment
    assert client.metrics == [("3f", "entropy_probe/H", 0.5, 3)]
    assert client.artifacts["entropy_probe/verdict/step_3.md"] == "**caution**"
    assert client.artifacts["entropy_probe/1_entropy/step_3.png"] is image
    assert client.tags == {"entropy probe: alarm": "collapse in 3 steps", "entropy_probe/verdict": "caution"}


def test_loggers_that_take_numbers_alone_have_no_board():
    class Numbers:
        experiment, run_id = object(), "1"

    assert board_of_logger(Numbers()) is None
