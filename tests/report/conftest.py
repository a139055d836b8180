"""A made-up run for the tests of reports."""

from __future__ import annotations

import pytest

from tests.support.synthetic_run import make_state


@pytest.fixture(scope="module")
def state():
    return make_state(B_E=6, B_U=3, G=4, lengths=(2, 8), layers=2, shape=(2, 3))
