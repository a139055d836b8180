"""Files are written whole or not at all, and a failure says what to do."""

from __future__ import annotations

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from probe.errors.exceptions import LogError
from probe.files.atomic import (
    LEFTOVER_AGE,
    atomic_create_bytes,
    atomic_write_bytes,
    claim_folder,
    ensure_replaceable,
    ensure_writable,
    remove_leftovers,
    temporary_name,
)
from tests.support.helpers import name_of_ended_process


def failing(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_file_is_written_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "x.json"
    assert atomic_write_bytes(path, "grün\r\n".encode()) == path
    assert path.read_bytes() == "grün\r\n".encode()
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write_bytes(tmp_path / "x", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "check that the folder exists"),
    ],
)
def test_a_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch, call, code, remedy):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, failing(code))
    with pytest.raises(LogError, match=f"cannot write .*x: {os.strerror(code)}; .*{remedy}"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_bytes(tmp_path / "x", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "real", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    atomic_write_bytes(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_what_is_not_a_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LogError, match="found a device, pipe or socket"):
        atomic_write_bytes(tmp_path / "pipe", b"x")
    with pytest.raises(LogError, match="found a folder"):
        atomic_write_bytes(tmp_path, b"x")
    with pytest.raises(LogError, match="found a folder"):
        ensure_replaceable(tmp_path)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(LogError, match=r"file/logs: .*a part of the path is a file"):
        ensure_writable(tmp_path / "file" / "logs")
    with pytest.raises(LogError, match="a file of that name is in the way"):
        ensure_writable(tmp_path / "file")
    with pytest.raises(LogError, match=r"cannot write .*x\.json: "):
        atomic_write_bytes(tmp_path / "file" / "x.json", b"x")


def test_a_name_that_is_too_long_is_named(tmp_path):
    with pytest.raises(LogError, match="choose a shorter name"):
        atomic_write_bytes(tmp_path / ("x" * 300), b"x")
    with pytest.raises(LogError, match="choose a shorter name"):
        ensure_replaceable(tmp_path / ("x" * 300))


def test_trying_out_a_folder_leaves_it_empty(tmp_path):
    assert ensure_writable(tmp_path / "new") == tmp_path / "new"
    assert ensure_replaceable(tmp_path / "new" / "r.json") == tmp_path / "new" / "r.json"
    assert list((tmp_path / "new").iterdir()) == []


def test_only_one_makes_a_file_of_a_name(tmp_path):
    assert atomic_create_bytes(tmp_path / "a" / "x", b"first")
    assert not atomic_create_bytes(tmp_path / "a" / "x", b"second")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "a").iterdir()] == [("x", b"first")]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert not atomic_create_bytes(tmp_path / "link", b"x")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "link", failing(code))
    assert atomic_create_bytes(tmp_path / "x", b"first")
    assert not atomic_create_bytes(tmp_path / "x", b"second")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"first")]


@pytest.mark.parametrize("call", ["link", "fsync", "open"])
def test_a_new_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, call):
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    with pytest.raises(LogError, match=r"cannot write .*x: No space left on device"):
        atomic_create_bytes(tmp_path / "x", b"new")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_goes_and_nothing_else(tmp_path):
    ended, own, foreign = name_of_ended_process(), temporary_name(), ".tmp-entropy-probe-00000000-1-00000000"
    old = foreign.replace("-1-", "-2-")
    kept = (own, foreign, ".tmp-entropy-probe", ".tmp-x", "x", f"{ended}.json", f"x{ended}", ended.upper())
    for name in (ended, old, *kept):
        (tmp_path / name).write_bytes(b"x")
    day_before = (tmp_path / foreign).stat().st_mtime - LEFTOVER_AGE - 60
    for name in (old, own, ".tmp-x"):
        os.utime(tmp_path / name, (day_before, day_before))
    ensure_writable(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_folders_and_links_that_were_left(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "x").write_bytes(b"x")
    ended = name_of_ended_process().replace(".tmp-entropy-probe", ".demo")
    (tmp_path / ended).mkdir()
    (tmp_path / ended / "model").write_bytes(b"x")
    (tmp_path / f"{ended[:-8]}abcdef01").symlink_to(kept)
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    remove_leftovers(tmp_path, ".demo")
    assert list(tmp_path.iterdir()) == [kept]
    assert (kept / "x").exists()


def test_a_folder_that_is_not_there_has_no_leftovers(tmp_path):
    remove_leftovers(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_every_run_gets_a_folder_of_its_own(tmp_path):
    root = tmp_path / "a" / "b"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: claim_folder(root, "run"), range(8)))
    assert sorted(folder.name for folder in made) == ["run", *(f"run_{i}" for i in range(2, 9))]
    assert all(folder.is_dir() for folder in made)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LogError, match=r"a file of that name is in the way|a part of the path is a file"):
        claim_folder(tmp_path / "file", "run")
