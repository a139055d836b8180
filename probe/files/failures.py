"""What a file system refuses, in one line with its remedy."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from probe.errors.exceptions import LogError

_REMEDIES = {
    errno.ENOSPC: "free some space on that disk, or choose another folder",
    errno.EDQUOT: "free some of your disk quota, or choose another folder",
    errno.EACCES: "choose a folder that you may write to, or change its permissions",
    errno.EPERM: "choose a folder that you may write to, or change its permissions",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EEXIST: "a file of that name is in the way; remove it, or choose another folder",
    errno.EISDIR: "a folder of that name is in the way; choose another name",
}


def write_error(path: str | os.PathLike[str], error: OSError) -> LogError:
    """The `LogError` for an `OSError` met while writing `path`: names the path, the cause and a remedy."""
    remedy = _REMEDIES.get(error.errno or 0, "check that the folder exists and can be written to")
    return LogError(f"cannot write {os.fspath(path)}: {error.strerror or error}; {remedy}")


def write_failure(error: BaseException | None) -> OSError | None:
    """The error of a disk or file system that a library has wrapped in errors of its own; None where there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in _REMEDIES:
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def writer_errors_raised_once() -> Iterator[None]:
    """Keep the thread in which TensorBoard writes from printing the traceback of an error that is raised here too."""

    def is_writer(thread: threading.Thread | None) -> bool:
        return type(thread).__name__ == "_AsyncWriterThread"

    def hook(args: Any) -> None:
        if not (is_writer(args.thread) and isinstance(args.exc_value, OSError)):
            before(args)

    before = threading.excepthook
    threading.excepthook = hook
    try:
        yield
    finally:
        for thread in threading.enumerate():
            # It hands its error over before it ends, and prints it last.
            if is_writer(thread) and getattr(thread, "exception", None) is not None:
                thread.join(timeout=5)
        if threading.excepthook is hook:
            threading.excepthook = before
