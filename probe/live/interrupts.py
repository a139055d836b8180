"""Ctrl-C waits while what a probe has changed is put back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any


class HeldInterrupts:
    """Lets Ctrl-C wait while things are put back; the host's own handler gets it afterwards."""

    def __init__(self) -> None:
        self._own: Any = None
        self._waiting: list[Any] = []

    def hold(self) -> None:
        """Keep signals from here on. Python delivers them to the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            return
        own = signal.getsignal(signal.SIGINT)
        if callable(own) and own != self._keep:  # a default or ignored signal runs no code of Python's
            self._own = own
            signal.signal(signal.SIGINT, self._keep)

    def let_go(self) -> None:
        """Give the handler back, and let it have what came."""
        try:
            self._give_back()
        finally:
            self._give_back()
        waiting, self._waiting = self._waiting, []
        if waiting:
            handler: Callable[[int, Any], Any] = self._own
            handler(*waiting[0])

    def _give_back(self) -> None:
        if self._own is not None and signal.getsignal(signal.SIGINT) == self._keep:
            signal.signal(signal.SIGINT, self._own)

    def _keep(self, number: int, frame: Any) -> None:
        self._waiting.append((number, frame))
