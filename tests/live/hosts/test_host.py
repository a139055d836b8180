"""Numbers that wait until a trainer has counted their step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from probe.live.hosts.host import HostedWatch


def test_every_number_is_logged_under_the_step_that_it_belongs_to():
    """A trainer that logs an update under one less than its number, as Lightning; every second batch takes no step."""
    host, sent = HostedWatch(has_alarm=False), []

    def send(numbers: Any, step: int) -> None:
        sent.append((numbers["x"], step))

    outlets: Any = SimpleNamespace(send=send)

    host.log({"x": 0.0}, 1)
    host.hand_on(outlets, 0)
    assert sent == []  # there is no watch
    host.clear()
    watch: Any = SimpleNamespace(step=1, should_stop=False, detach=lambda: None)
    host.watch = watch
    host.log({"x": 1.0}, 1)
    host.hand_on(outlets, 0)
    host.log({"x": 2.0}, 1)  # raised in a batch that takes no step: of the step before
    host.hand_on(outlets, 1)
    host.log({"x": 3.0}, 1)  # raised in the next one, before it takes its step
    watch.step = 2
    host.log({"x": 4.0}, 2)
    host.hand_on(outlets, 1)
    host.hand_on(outlets, 2)
    assert sent == [(1.0, 0), (2.0, 0), (3.0, 0), (4.0, 1)]
