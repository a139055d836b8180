"""The processes of a run from its beginning to its end: when one has gone, all go, and one of them says why."""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch

from probe.distributed.environment import first_process, started_by_first
from probe.distributed.ranks import ALONE, Ranks
from probe.errors.exceptions import ProbeError, RanksApartError
from probe.text import error_text, text_of

POLL = 0.2
"""Seconds between two looks at the other processes."""
GRACE = 3.0
"""Seconds that a process gets to end by itself."""
_LEFT = "entropy_probe/left/"
INTERRUPTED = "interrupted"
"""What a rank says that has heard Ctrl-C."""


class Crew:
    """The ranks of a run, each of which looks after those that it can see.

    The first rank sees the processes that it has started, these see whether it is still there; where a launcher
    (torchrun, SLURM) has started all, that one looks after them.

    Attributes:
        ranks: of the run; this one alone before `join`.
        single: whether this process is the only one.
    """

    def __init__(self, started: list[subprocess.Popen[Any]], single: bool = False) -> None:
        """Nothing is watched before `watch`.

        Args:
            started: Lightning's list of the processes of the ranks 1, 2, ... that this one starts, empty yet. They are
                taken out of it as soon as they are there: Lightning's own observer, which looks at this very list,
                kills the first process when one of these fails, before it can say anything.
            single: whether this process is the only one.
        """
        self.ranks, self.single = ALONE, single
        self._started = started
        self._children: list[subprocess.Popen[Any]] = []
        self._parent = os.getppid() if started_by_first() else None
        self._store: Any = None
        self._called = False
        self._lock = threading.Lock()
        self._watching = threading.Event()
        self._thread: threading.Thread | None = None

    def join(self) -> None:
        """All processes have found each other."""
        self._adopt()
        # the others wait for a reward, however long it takes: the crew sees who has gone
        self.ranks = Ranks.of_job(patience=timedelta(days=7))
        if self.ranks.size > 1:
            self._store = torch.distributed.distributed_c10d._get_default_store()

    @property
    def watches(self) -> bool:
        """Whether it is within a block that sees to how a run ends."""
        return self._watching.is_set()

    def watch(self) -> None:
        """Interrupt this process when one that it can see has gone, until `rest`."""
        self._watching.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, daemon=True, name="entropy-probe-crew")
            self._thread.start()

    def rest(self) -> None:
        """Look no further."""
        with self._lock:
            self._watching.clear()

    def explained(self, error: BaseException) -> BaseException:
        """What to raise in the place of an error: where another rank has gone, why it has.

        Args:
            error: that ends the run here: a meeting that failed, an interrupt, or an error of this rank's own.
        """
        if not isinstance(error, (RanksApartError, KeyboardInterrupt)):
            return error
        until = time.monotonic() + GRACE
        while True:
            lost, word = self._lost(), self._word()
            if word or lost or isinstance(error, KeyboardInterrupt) or time.monotonic() > until:
                break
            time.sleep(POLL)  # a process has closed its connections before it has ended
        own = isinstance(error, KeyboardInterrupt) and not self._called
        if (own and word.endswith(f": {INTERRUPTED}")) or (not word and not lost):
            return error  # of Ctrl-C all have heard
        found = RanksApartError(word or self._ended(lost[0]))
        found.said_by_others = not self.ranks.first and not (lost == [0] and self.ranks.rank == 1)
        return found

    def leave(self, error: BaseException) -> None:
        """Tell the others why this rank goes, and end the processes that it has started.

        Args:
            error: why.
        """
        if self._store is not None and not getattr(error, "shared_by_ranks", False):
            with suppress(RuntimeError, ValueError):
                self._store.set_timeout(timedelta(seconds=GRACE))
                self._store.set(f"{_LEFT}{self.ranks.rank}", _words(error)[:2000])
        self._end_children(at_once=True)

    def _adopt(self) -> None:
        """Look after the processes that have been started."""
        if self._started:
            self._children = list(self._started)
            self._started.clear()
            atexit.register(self._end_children)

    def _look(self) -> None:
        """See whether the others are there, again and again."""
        while True:
            self._watching.wait()
            time.sleep(POLL)
            self._adopt()
            with self._lock:
                lost = self._lost() if self._watching.is_set() else []
                if lost:
                    self._called = True
                    _thread.interrupt_main(signal.SIGINT)
            if lost:
                break
        time.sleep(2 * GRACE)
        if self._watching.is_set():  # waiting for the others inside a library, where no interrupt is heard
            if first_process():
                print(f"entropy-probe: error: {self._ended(lost[0])}", file=sys.stderr, flush=True)
            self._end_children(at_once=True)
            os._exit(2)

    def _lost(self) -> list[int]:
        """Ranks that have gone before the end."""
        if self._parent is not None and os.getppid() != self._parent:
            return [0]
        return [k for k, child in enumerate(self._children, 1) if child.poll() not in (None, 0)]

    def _word(self) -> str:
        """What the first of the others that have gone has said; empty where none has, or nobody knows."""
        if self._store is None:
            return ""
        for rank in range(self.ranks.size):
            key = f"{_LEFT}{rank}"
            try:
                if rank != self.ranks.rank and self._store.check([key]):
                    return f"rank {rank} of {self.ranks.size}: {self._store.get(key).decode()}"
            except RuntimeError:  # the store went with the first rank
                break
        return ""

    def _ended(self, rank: int) -> str:
        """That a process has ended, and how."""
        code = self._children[rank - 1].returncode if 0 < rank <= len(self._children) else None
        how = "" if code is None else f" with the code {code}"
        if code is not None and code < 0:
            how = f" by {signal.Signals(-code).name} (killed, or out of memory)"
        return f"expected every process to last, found that the one of rank {rank} has ended{how}; the run ends here"

    def _end_children(self, at_once: bool = False) -> None:
        """See the processes that this one has started to their ends."""
        for child in self._children if at_once else ():
            if child.poll() is None:
                child.terminate()
        until = time.monotonic() + GRACE
        for child in self._children:
            try:
                child.wait(max(until - time.monotonic(), POLL))
            except subprocess.TimeoutExpired:
                child.kill()


@contextmanager
def crew_at_work(crew: Crew | None) -> Iterator[None]:
    """Run a block on all ranks: where it ends with an error on one, it does on all, with the reason.

    A block within such a block is left to that one.

    Args:
        crew: of the run.

    Raises:
        RanksApartError: another rank has gone.
    """
    if crew is None or crew.single or crew.watches:
        yield
        return
    try:
        crew.watch()
        yield
        crew.rest()
    except BaseException as error:
        crew.rest()
        found = crew.explained(error)
        crew.leave(found)
        if found is error:
            raise
        raise found from error


def _words(error: BaseException) -> str:
    """One line on why a rank goes."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return text_of(error) if isinstance(error, ProbeError) else error_text(error)
