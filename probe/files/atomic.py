"""Files that are either written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from probe.errors.exceptions import LogError
from probe.files.failures import write_error

_TEMPORARY = ".tmp-entropy-probe"
"""How the names of temporary files begin; machine, process and a random part follow."""
_NAME_OF_TEMPORARY = re.compile(r"-([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}")
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

LEFTOVER_AGE = 24 * 3600
"""Seconds after which a temporary file of a process that cannot be asked, on another machine, is a leftover."""


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


def atomic_create_bytes(path: str | os.PathLike[str], data: bytes) -> bool:
    """Write `data` to `path` as `atomic_write_bytes` does, but only where nothing has that name yet.

    Of several processes that try the same name, on one machine or on a network file system, one succeeds.

    Args:
        path: the file to make.
        data: its whole content.

    Returns:
        Whether this call made the file; false where the name was taken, and then nothing is changed.

    Raises:
        LogError: the file cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _write_temporary(target, data)
        try:
            return _move_to_free_name(temporary, target)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise write_error(path, error) from error


def remove_leftovers(folder: str | os.PathLike[str], prefix: str = _TEMPORARY) -> None:
    """Remove the temporary files and folders of processes that were killed while they wrote into `folder`.

    Only what has such a name is looked at. On this machine it goes when its process is gone; what another machine
    (or this one before it was started anew) has left goes after `LEFTOVER_AGE`. What cannot be removed stays.

    Args:
        folder: the folder to look in; the folders in it are not searched.
        prefix: how the names begin, as given to `temporary_name`.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            name = _NAME_OF_TEMPORARY.fullmatch(entry.name.removeprefix(prefix))
            if name is None or not entry.name.startswith(prefix):
                continue
            with suppress(OSError):
                known = name[1] == _machine() and os.name == "posix"
                if _is_running(int(name[2])) if known else _is_young(entry):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


def temporary_name(prefix: str = _TEMPORARY) -> str:
    """A name for a temporary file or folder that no other process uses, and that `remove_leftovers` knows.

    Args:
        prefix: how it begins.
    """
    return f"{prefix}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"


def ensure_writable(folder: str | os.PathLike[str]) -> Path:
    """Make `folder` if it is missing, and try out that a file can be written in it.

    Meant for the start of a long run, whose results are to go there. What killed runs left there unfinished goes.

    Raises:
        LogError: the folder cannot be made, or no file can be written in it.
    """
    trial = Path(folder) / temporary_name()
    try:
        trial.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        try:
            trial.write_bytes(b"x")
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    return Path(folder)


def claim_folder(root: str | os.PathLike[str], name: str) -> Path:
    """Make a folder called `name`, or `name_2`, `name_3`, ...: the first that nobody has made yet.

    Of several processes that try the same name, each gets a folder of its own.

    Args:
        root: where it is made; missing folders above are made too.
        name: of the folder.

    Raises:
        LogError: it cannot be made.
    """
    number = 1
    try:
        os.makedirs(root, exist_ok=True)
        while True:
            folder = Path(root) / (name if number == 1 else f"{name}_{number}")
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
            number += 1
    except OSError as error:
        raise write_error(root, error) from error


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
    temporary = _write_temporary(target, data)
    try:
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _write_temporary(target: Path, data: bytes) -> Path:
    """Write a temporary file beside `target`, down to the disk; on any failure nothing is left."""
    # tempfile makes files that only their owner can read; results are for whoever the umask allows.
    temporary = target.with_name(temporary_name())
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return temporary


def _move_to_free_name(temporary: Path, target: Path) -> bool:
    """Give a finished file its name, and say whether that was free."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        # A network file system may repeat a request whose answer was lost, and find the link it has made.
        with suppress(OSError):
            return os.path.samefile(temporary, target) and not target.is_symlink()
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # Without hard links the name is claimed first; it is empty only until the next line.
        try:
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            return False
        os.replace(temporary, target)
    return True


def _is_running(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is there, and somebody else's
        return True
    return True


def _is_young(entry: os.DirEntry[str]) -> bool:
    """Whether a file was changed so lately that its process may still write it."""
    return time.time() - entry.stat(follow_symlinks=False).st_mtime < LEFTOVER_AGE


@cache
def _machine() -> str:
    """This machine, since it was started, and the process's own numbering of processes (containers have theirs)."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
