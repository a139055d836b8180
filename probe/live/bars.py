"""Progress bars of the host's, out of the way while a line is printed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, cast


@contextmanager
def above_bars(logger: logging.Logger) -> Iterator[None]:
    """While this lasts, what a logger's handlers write to the terminal stands above bars of tqdm and rich.

    Handlers stay what they are, in their order, with their levels and formats. A library that is not loaded has no
    bars; a bar that cannot be moved is no reason to say nothing.
    """
    aside = ExitStack()
    for make in (_tqdm_aside, lambda: _through_rich(logger)):
        with suppress(Exception):
            aside.enter_context(make())
    try:
        yield
    finally:
        with suppress(Exception):
            aside.close()


@contextmanager
def _tqdm_aside() -> Iterator[None]:
    """Take the bars of tqdm (Lightning's, transformers', a loop's own) away, and draw them again."""
    library = sys.modules.get("tqdm.std")
    if library is None:
        yield
        return
    bars = cast(AbstractContextManager[None], library.tqdm.external_write_mode(file=sys.stderr))
    with bars:
        yield


@contextmanager
def _through_rich(logger: logging.Logger) -> Iterator[None]:
    """Where a live display of rich (Lightning's RichProgressBar) stands for stderr, let handlers write to it.

    A handler that was made before the display writes past it, and the bar would be drawn over the line.
    """
    moved: list[tuple[logging.StreamHandler[Any], Any]] = []
    stands_for = {id(getattr(one, "rich_proxied_file", None)): one for one in (sys.stdout, sys.stderr)}
    stands_for.pop(id(None), None)
    try:
        for handler in _handlers(logger) if stands_for else ():
            display = stands_for.get(id(getattr(handler, "stream", None)))
            if display is not None and isinstance(handler, logging.StreamHandler):
                moved.append((handler, handler.setStream(display)))
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)


def _handlers(logger: logging.Logger) -> Iterator[logging.Handler]:
    """Those that a record of this logger reaches."""
    at: logging.Logger | None = logger
    while at is not None:
        yield from at.handlers
        at = at.parent if at.propagate else None
