"""Writing so that a kill leaves the old content or the new one: names, modes, leftovers, and systems without an exchange of names."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmlg_scale import files


def dead_pid() -> int:
    """The id of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_a_reused_process_id_is_no_collision(tmp_path: Path) -> None:
    """The name that this process would have taken before is there, as a folder even; two threads write at once."""
    target = tmp_path / "file"
    (tmp_path / f".file.{os.getpid()}.tmp").mkdir()
    assert len({files.temporary_name(target) for _ in range(100)}) == 100
    payloads = [bytes([index]) * 200_000 for index in range(8)]
    threads = [threading.Thread(target=files.write_bytes_atomic, args=(target, payload)) for payload in payloads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() in payloads
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".file.{os.getpid()}.tmp", "file"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_mode_is_that_of_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        files.write_text_atomic(tmp_path / "sub/file", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "sub/file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_text_atomic(tmp_path / "file", "old")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        files.write_text_atomic(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_long_names(tmp_path: Path) -> None:
    name = "x" * 250
    files.write_text_atomic(tmp_path / name, "long")
    assert (tmp_path / name).read_text() == "long"


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    """Of this host, an hour old, and dead: all three."""
    host, suffix = files._host(), "0123456789abcdef.tmp"
    old = time.time() - 4000
    gone = [tmp_path / f".a.{host}.{dead_pid()}.{suffix}", tmp_path / f".b.{host}.{dead_pid()}.{suffix}"]
    gone[0].write_text("x")
    gone[1].mkdir()
    (gone[1] / "inside").write_text("x")
    kept = [
        tmp_path / f".c.{host}.{os.getpid()}.{suffix}",
        tmp_path / f".d.ffffffff.{dead_pid()}.{suffix}",
        tmp_path / ".mine.tmp",
        tmp_path / f".e.{host}.{dead_pid()}.{suffix}.txt",
    ]
    young = tmp_path / f".f.{host}.{dead_pid()}.{suffix}"
    for path in [*kept, young]:
        path.write_text("x")
    for path in [*gone, *kept]:
        os.utime(path, (old, old))
    files.write_text_atomic(tmp_path / "file", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in [*kept, young, tmp_path / "file"])


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("links", [True, False])
def test_a_folder_takes_the_place_of_another(exchange: bool, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the system cannot let two names change places, or the filesystem has no hard links."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    if not links:
        monkeypatch.setattr(files.os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    out = tmp_path / "out"
    with files.folder_atomic(out) as folder:
        (folder / "weights").write_text("old")
        assert not out.exists()
    (out / "mine").mkdir()
    (out / "mine/notes").write_text("mine")
    (out / "link").symlink_to("gone")
    with files.folder_atomic(out, {"weights"}) as folder:
        (folder / "weights").write_text("new")
        assert (out / "weights").read_text() == "old"
    assert (out / "weights").read_text() == "new"
    assert (out / "mine/notes").read_text() == "mine"
    assert os.readlink(out / "link") == "gone"
    with pytest.raises(FileNotFoundError), files.folder_atomic(out, {"weights"}) as folder:
        (folder / "nowhere/weights").write_text("newer")
    assert (out / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_would_be_hidden_is_an_error(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "weights").write_text("a person's")
    with pytest.raises(FileExistsError), files.folder_atomic(out) as folder:
        (folder / "weights").write_text("ours")
    assert (out / "weights").read_text() == "a person's"
