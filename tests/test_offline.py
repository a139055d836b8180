"""One run from Python, and what can be done with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from probe import OfflineEntropyProbe
from probe.errors.exceptions import ConfigError
from probe.report.notebook import Results, ShownResult
from tests.phases.conftest import base, checkpoint, config, prompts  # noqa: F401


@pytest.fixture
def probe(config):  # noqa: F811
    return OfflineEntropyProbe(config)


def test_importing_it_says_nothing():
    """In a process of its own: libraries warn once."""
    names = "EntropyProbeCallback, EntropyProbeTrainerCallback, OfflineEntropyProbe, watch"
    code = f"import probe; from probe import {names}; import logging; print(logging.getLogger('bitsandbytes').level)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_before_a_run(probe, tmp_path):
    assert repr(probe).endswith("B_E=24, B_U=4, G=4; not run yet)")
    assert "not run yet" in probe._repr_html_()
    assert probe.result is None
    for call in (probe.plot, lambda: probe.report(tmp_path / "run.html")):
        with pytest.raises(ConfigError, match="expected a finished run, found none"):
            call()
    assert not (tmp_path / "run.html").exists()


def test_after_a_run(probe, tmp_path):
    results = probe.run_mixed_probe()
    assert isinstance(results, Results)
    assert isinstance(probe.result, ShownResult)
    assert probe.result.values == results
    assert repr(probe).endswith(f"last run {results['verdict']})")
    assert results._repr_html_() in probe._repr_html_()
    assert list(probe.plot()) == list(results.plot()) == list(probe.result.plot())
    path = probe.report(tmp_path / "new" / "run.html")
    page = path.read_text(encoding="utf-8")
    assert f"Verdict: {results['verdict']}" in page
    assert "Tokens are shaded by what they add to deltaH1 where that was worked out" in page
    assert '"tokens":' in page
