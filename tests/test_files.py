"""Files are written whole or not at all, and a failure says what to do."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from probe.errors import LogError
from probe.files import atomic_write_bytes, atomic_write_text, ensure_replaceable, ensure_writable


def failing(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_file_is_written_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "x.json"
    assert atomic_write_text(path, "grün\r\n") == path
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
