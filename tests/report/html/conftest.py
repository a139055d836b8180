"""One run with everything in it, and a browser."""

from __future__ import annotations

import pytest

from tests.support.browser import open_browser
from tests.support.logged_run import Logged, logged_run


@pytest.fixture(scope="module")
def browser():
    with open_browser() as found:
        yield found


@pytest.fixture(scope="session")
def logged(tmp_path_factory) -> Logged:
    return logged_run(tmp_path_factory.mktemp("run"))
