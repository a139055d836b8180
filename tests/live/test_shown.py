"""What a person sees of a watch."""

from __future__ import annotations

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
