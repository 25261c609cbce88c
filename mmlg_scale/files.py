"""Writing files and folders so that a kill at any instant leaves either the old content or the new one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from mmlg_scale.errors import UserError, failed_write

_LEFTOVER = re.compile(r"\..*\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.[0-9a-f]{16}\.tmp")
_LEFTOVER_SECONDS = 3600
"""Process ids of another container can look dead here: only what has not been touched for so long is removed."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes `path`: an error without a path, or with that of a temporary file of ours, gets this one.

    Writing to an open file fails without a path, and libraries (safetensors, torch.save, numpy) raise errors of their own.

    Raises:
        OSError: with `path`, or with the path that the system named.
    """
    try:
        yield
    except OSError as error:
        number = error.errno if error.errno is not None else failed_write(error)
        named = error.filename is not None and not any(map(_LEFTOVER.fullmatch, Path(os.fsdecode(error.filename)).parts))
        if named or number is None:
            raise
        raise _write_error(number, path) from error
    except Exception as error:
        number = failed_write(error)
        if number is None:
            raise
        raise _write_error(number, path) from error


def _write_error(number: int, path: Path) -> OSError:
    if number == 0:  # the library does not say why
        number = errno.ENOSPC if free_bytes(path) < 2**20 else errno.EIO
    return OSError(number, os.strerror(number), str(path))


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process takes: host, process id and 64 random bits (process ids come again)."""
    return path.with_name(f".{path.name[:100]}.{_host()}.{os.getpid()}.{secrets.token_hex(8)}.tmp")


def make_folder(folder: Path) -> None:
    """Make `folder` and what is above it. Raises NotADirectoryError where a file is in its place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error


def write_bytes_atomic(path: Path, payload: bytes) -> None:
    """Write `payload` to a temporary file beside `path`, flush it to disk, then rename it over `path`. Mode as the umask says."""
    make_folder(path.parent)
    remove_leftovers(path.parent.absolute())
    temporary = temporary_name(path)
    try:
        with writing(path):
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` for UTF-8 text."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_bytes_atomic` for JSON; NaN and infinity are refused because they are not JSON."""
    write_text_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def folder_atomic(out: Path, replaced: Collection[str] = ()) -> Iterator[Path]:
    """Yields an empty folder beside `out` to fill; when the block ends without an error, it takes the place of `out`.

    `out` is absent or empty, or a folder of which only the entries named in `replaced` go: all others come along as hard links (copies
    where the filesystem has none), so that they are complete in the old folder and in the new one, and either may be deleted. On Linux
    the two folders change places in one system call. Elsewhere the old one is renamed away first: a kill between these two renames
    leaves no `out`, but both folders whole beside it.

    Raises:
        OSError: the disk is full, or `out` cannot be written.
    """
    make_folder(out.parent)
    out = out.resolve()  # a link to a folder stays a link
    remove_leftovers(out.parent)
    temporary = temporary_name(out)
    try:
        with writing(out):
            temporary.mkdir()  # with the mode that the umask says
            yield temporary
            mode = temporary.stat().st_mode & 0o666
            for path in temporary.iterdir():
                if path.is_file():
                    path.chmod(mode)  # safetensors writes files that only their owner can read
                    flush(path)
            if out.exists():
                _link_others(out, temporary, replaced)
                temporary.chmod(out.stat().st_mode & 0o7777)
            flush(temporary)
            _take_place(temporary, out)
            flush(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _link_others(out: Path, temporary: Path, replaced: Collection[str]) -> None:
    for path in sorted(out.iterdir()):
        if path.name in replaced:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, temporary / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, temporary / path.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _take_place(temporary: Path, out: Path) -> None:
    """`temporary` becomes `out`; what was there is at `temporary` afterwards, or gone where it was empty."""
    if not out.exists() or not any(out.iterdir()):
        os.replace(temporary, out)
        return
    if _exchange(temporary, out):
        return
    previous = temporary_name(out)
    os.replace(out, previous)
    os.replace(temporary, out)
    os.replace(previous, temporary)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one system call; False where system or filesystem cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def flush(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


@functools.cache
def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this host left in `folder`; once a folder and process, since listing a folder takes time."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            found = _LEFTOVER.fullmatch(path.name)
            if found is None or found["host"] != _host() or _is_alive(int(found["pid"])):
                continue
            if time.time() - path.lstat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # somebody else's
    return True


def open_append(path: Path) -> TextIO:
    """Open a text file to append to. A symbolic link in its place, which could name any file, is refused; so is a pipe.

    Raises:
        OSError: it cannot be opened.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "a", encoding="utf-8")


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is, or would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise UserError when fewer than `needed` bytes are free in `folder`, before anything of `what` is written."""
    free = free_bytes(folder)
    if free < needed:
        raise UserError(
            f"{folder}: {what} needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free. Free some, or write --out to another disk."
        )
