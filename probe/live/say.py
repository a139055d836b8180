"""What the probe says in the course of a training."""

from __future__ import annotations

import contextlib
import logging
import sys

from probe.distributed.ranks import rank_and_size
from probe.live.bars import above_bars
from probe.terminal import StderrHandler
from probe.text import error_text, printable

logger = logging.getLogger("probe.live")


def say(line: str, *, warn: bool = False) -> None:
    """Print a line through logging, above progress bars.

    Where nobody has set logging up, or its handlers fail, it goes to stderr. Of several processes the first one
    speaks. Never raises: a full disk or a dead socket behind a logging handler is no reason to end a training.
    """
    if rank_and_size()[0] > 0:
        return
    try:
        _log_line(line, warn)
    except Exception as error:
        with contextlib.suppress(Exception):  # stderr may be closed too, and then nobody listens
            print(f"entropy probe: {line} (logging failed: {error_text(error)})", file=sys.stderr, flush=True)


def _log_line(line: str, warn: bool) -> None:
    """Hand a line to logging."""
    line = printable(line)
    if not logger.hasHandlers():
        handler = StderrHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
    with above_bars(logger):
        logger.log(logging.WARNING if warn else logging.INFO, "entropy probe: %s", line)
