"""What a person sees of a watch."""

from __future__ import annotations

import shutil

import pytest

from probe.errors.exceptions import ConfigError, LogError
from tests.support.live_loops import attach, seeded, small_loop


@pytest.fixture
def watched():
    """A watch that has seen a few steps."""
    with seeded(0):
        loop = small_loop()
        with attach(loop.model, loop.optimizers[0]) as watch:
            loop.run(3)
            yield watch


def test_a_training_is_reported_at_any_time(watched, tmp_path):
    path = tmp_path / "new" / "training.html"
    assert watched.report(path) == path
    page = path.read_text(encoding="utf-8")
    assert page.count("data-verdict=") == 3
    assert "microbatch_size" in page
    watched.report(str(path))
    assert [one.name for one in path.parent.iterdir()] == ["training.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(LogError, match="file"):
        watched.report(tmp_path / "file" / "training.html")


def test_nothing_is_reported_before_a_probe(tmp_path):
    loop = small_loop()
    watch = attach(loop.model, loop.optimizers[0])
    with watch, pytest.raises(ConfigError, match="expected at least one probed step, found none in 0 steps"):
        watch.report(tmp_path / "training.html")
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_and_a_notebook_show_the_last_probes(watched):
    text = repr(watched)
    assert text.startswith("Watch: 3 of 3 steps probed\nstep 3: H ")
    page = watched._repr_html_()
    assert page.count("<tr>") == 4
    assert "<script" not in page
    for entry in watched.history:
        assert f"<td>{entry['verdict']}</td>" in page


def test_figures_of_a_training(watched):
    figures = watched.plot()
    assert "1_entropy" in figures
    assert "data:image/png;base64," in figures._repr_html_()


def test_a_watch_that_has_seen_nothing():
    loop = small_loop()
    watch = attach(loop.model, loop.optimizers[0])
    with watch:
        assert repr(watch) == "Watch: 0 of 0 steps probed"
        assert "0 of 0 steps" in watch._repr_html_()
        with pytest.raises(ConfigError, match="plot: expected at least one probed step"):
            watch.plot()
    assert repr(watch) == "Watch: 0 of 0 steps probed; detached"


def test_a_probe_that_an_error_has_switched_off_says_so(monkeypatch):
    loop = small_loop()
    watch = attach(loop.model, loop.optimizers[0], strict=False)

    def fail(*args, **kwargs):
        raise RuntimeError("no E to be had\nat all")

    monkeypatch.setattr(watch._probe, "before", fail)
    with watch:
        loop.run(1)
        assert repr(watch) == "Watch: 0 of 1 steps probed; switched off by no E to be had"


def test_a_page_at_every_alarm_and_in_the_end(tmp_path):
    path = tmp_path / "training.html"
    with seeded(0):
        loop = small_loop()
        # an entropy above its band is an explosion from the first probe on
        watch = attach(loop.model, loop.optimizers[0], report_path=str(path), entropy_band=(1e-6, 1e-3))
        loop.run(4)
        alarms = [step for entry in watch.history for step in entry.get("alarms", ())]
        assert alarms
        assert path.read_text(encoding="utf-8").count("data-verdict=") == alarms[-1]
        loop.run(2)
        watch.detach()
    page = path.read_text(encoding="utf-8")
    assert page.count("data-verdict=") == 6
    assert f"Alarm after step {alarms[0]}." in page
    assert "The policy&#39;s entropy has exploded" in page


@pytest.mark.parametrize("strict", [False, True])
def test_a_page_that_cannot_be_written_ends_no_training(tmp_path, caplog, strict):
    folder = tmp_path / "folder"
    with seeded(0):
        loop = small_loop()
        watch = attach(loop.model, loop.optimizers[0], report_path=str(folder / "page.html"), strict=strict)
        loop.run(2)
        shutil.rmtree(folder)
        folder.write_text("in the way")
        if strict:
            with pytest.raises(LogError):
                watch.detach()
        else:
            watch.detach()
            assert "the report was not written (LogError: " in caplog.text
    assert not watch.active


def test_a_place_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    loop = small_loop()
    with pytest.raises(LogError, match="file"):
        attach(loop.model, loop.optimizers[0], report_path=str(tmp_path / "file" / "page.html"))
