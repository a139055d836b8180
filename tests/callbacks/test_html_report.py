"""The page that a run writes."""

from __future__ import annotations

import pytest

from probe.callbacks import HtmlReport, default_callbacks
from probe.config.output import DetailedLoggingConfig, OutputConfig
from probe.config.schema import ProbeConfig
from probe.errors.exceptions import LogError
from tests.support.synthetic_run import Tokenizer, make_result, make_runner, make_state


@pytest.fixture
def run():
    state = make_state(B_E=6, B_U=3, G=4, lengths=(2, 8), layers=2, shape=(2, 3))
    return state, make_result(state)


class Module:
    tokenizer = Tokenizer()


def test_it_is_there_where_a_path_is_given():
    def asked(path):
        callbacks = default_callbacks(ProbeConfig(output=OutputConfig(report_path=path)))
        return [one.path.name for one in callbacks if isinstance(one, HtmlReport)]

    assert asked(None) == []
    assert asked("page.html") == ["page.html"]


def test_it_says_where_the_page_is(run, tmp_path):
    state, result = run
    runner = make_runner(state)
    callback = HtmlReport(tmp_path / "new" / "page.html")
    callback.on_probe_start(runner, Module())
    callback.on_report_end(runner, Module(), result)
    assert runner.errors == []
    assert runner.written == {"report": str(callback.path)}
    assert callback.path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in callback.path.parent.iterdir()] == ["page.html"]


def test_texts_are_left_out_where_they_are_left_out_of_logs(run, tmp_path):
    state, result = run
    pages = []
    for log_sequences in (None, False):
        config = ProbeConfig(detailed_logging=DetailedLoggingConfig(log_sequences=log_sequences))
        callback = HtmlReport(tmp_path / "page.html")
        callback.on_report_end(make_runner(state, config=config), Module(), result)
        pages.append(callback.path.read_text(encoding="utf-8"))
    assert '"texts":[" ' in pages[0]
    words = state.U.prompts[0].partition("<")[0]
    assert words in pages[0]
    assert '"texts":[]' in pages[1]
    assert words not in pages[1]


def test_a_path_that_cannot_be_written_is_refused_at_the_start(run, tmp_path):
    (tmp_path / "file").write_text("")
    state, result = run
    callback = HtmlReport(tmp_path / "file" / "page.html")
    runner = make_runner(state)
    with pytest.raises(LogError, match="file"):
        callback.on_probe_start(runner, Module())
    callback.on_report_end(runner, Module(), result)
    assert [type(error) for error in runner.errors] == [LogError]
    assert runner.written == {}


def test_other_ranks_write_nothing(run, tmp_path):
    state, result = run
    runner = make_runner(state)
    runner.fabric.is_global_zero = False
    callback = HtmlReport(tmp_path / "page.html")
    callback.on_probe_start(runner, Module())
    callback.on_report_end(runner, Module(), result)
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_the_page_ends_no_run(run, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise TypeError("a fault")

    monkeypatch.setattr("probe.callbacks.html_report.write_page", fails)
    state, result = run
    runner = make_runner(state)
    HtmlReport(tmp_path / "page.html").on_report_end(runner, Module(), result)
    assert [str(error) for error in runner.errors] == [
        f"the report was not written to {tmp_path / 'page.html'}: TypeError: a fault"
    ]
    assert runner.written == {}
