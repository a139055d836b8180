"""Files that are either written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from probe.errors import LogError

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


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path`, replacing what was there in one step; missing folders are made.

    A reader sees the old content or the new, never a part, also when the machine stops halfway. The file gets
    the permissions that the umask gives to any new file. A symbolic link is followed: its target is replaced.

    Args:
        path: the file to write.
        data: its whole content.

    Returns:
        The path, as it was given.

    Raises:
        LogError: the file cannot be written, or `path` is something else than a regular file.
    """
    try:
        target = _target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_and_replace(target, data)
    except OSError as error:
        raise write_error(path, error) from error
    return Path(path)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` to `path` as UTF-8, as `atomic_write_bytes` does; line ends are kept as they are."""
    return atomic_write_bytes(path, text.encode("utf-8"))


def ensure_writable(folder: str | os.PathLike[str]) -> Path:
    """Make `folder` if it is missing, and try out that a file can be written in it.

    Meant for the start of a long run, whose results are to go there.

    Raises:
        LogError: the folder cannot be made, or no file can be written in it.
    """
    trial = Path(folder) / _temporary_name()
    try:
        trial.parent.mkdir(parents=True, exist_ok=True)
        try:
            trial.write_bytes(b"x")
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    return Path(folder)


def ensure_replaceable(path: str | os.PathLike[str]) -> Path:
    """Like `ensure_writable` for one file, which `atomic_write_bytes` is to write at the end of a long run.

    Raises:
        LogError: as `atomic_write_bytes`.
    """
    try:
        ensure_writable(_target(path).parent)
    except OSError as error:
        raise write_error(path, error) from error
    return Path(path)


def _target(path: str | os.PathLike[str]) -> Path:
    """The regular file that `path` names or leads to; it need not exist yet."""
    # os.replace would put a plain file in the place of a link, and of a device such as /dev/null.
    target = Path(os.path.realpath(path))
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        kind = "a folder" if target.is_dir() else "a device, pipe or socket"
        raise LogError(f"cannot write {path}: expected a file, found {kind}; choose another name")
    return target


def _write_and_replace(target: Path, data: bytes) -> None:
    """Write a temporary file beside `target` and move it there; on any failure no temporary file is left."""
    # tempfile makes files that only their owner can read; results are for whoever the umask allows.
    temporary = target.with_name(_temporary_name())
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _temporary_name() -> str:
    """A name that no other process uses, short enough wherever the final name fits."""
    return f".tmp-{secrets.token_hex(8)}"
