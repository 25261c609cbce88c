"""Shards where they lie: files of this machine, or whole copies of remote ones in a cache that all processes of a node share.

A remote file is fetched whole, since shards are read in windows in which every sample is wanted. A copy gets its name when it is complete:
it is written beside its place, checked by size (and SHA-256), flushed, and renamed. The cache stays under its bound: before a fetch, its
bytes are reserved and the copies that have gone unused for longest are removed, those that nobody has open first. Processes agree by file
locks, which the system gives back when a process dies; so the cache has to be on a disk of the node, not on NFS.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

from mmlg_scale.data.transfer import (
    FileMissingError,
    FinalError,
    MissingError,
    StoreError,
    at_the_start,
    check_url,
    is_remote,
    local_path,
    stream,
)
from mmlg_scale.errors import UserError
from mmlg_scale.files import flush, make_folder, temporary_name
from mmlg_scale.reading import one_line, open_regular, shown

MAX_RECORD_BYTES = 2**26
"""Of a file that is read into memory: a manifest."""
_STRIPES = 64
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_WAIT_SECONDS = 0.05
_PARTIAL = ".tmp"
_OURS = re.compile(r"\.?[0-9a-f]{24}-.+")
"""Copies, complete or not. Nothing else in the folder is counted or removed: somebody may name one that has files of his own."""


class RemoteFile(NamedTuple):
    """A file of a set.

    Attributes:
        name: relative to the set, or a URL of its own.
        size: in bytes; a copy of another size is never used.
        sha256: what it must have, or how that begins; None to compare sizes alone.
    """

    name: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class CacheKeys:
    """What a person sets a cache by: keys of a recipe, or options of a command."""

    folder: str = "data.cache_dir"
    max_bytes: str = "data.cache_bytes"


RECIPE_KEYS, OPTIONS = CacheKeys(), CacheKeys("--cache-dir", "--cache-bytes")


@dataclass(frozen=True)
class CacheSettings:
    """Where and how remote files are kept.

    Attributes:
        folder: on a disk of this node; one for all its processes.
        max_bytes: of all copies together, complete or not.
        attempts: how often a file is tried.
        first_pause: seconds after the first failure; each later pause is twice as long.
        timeout: seconds without a sign of the store after which an attempt has failed.
        failed_for: seconds for which a file that could not be had is not tried again, so that not each of its samples waits for that.
        keys: for messages.
    """

    folder: Path
    max_bytes: int
    attempts: int = 5
    first_pause: float = 0.5
    timeout: float = 30.0
    failed_for: float = 60.0
    keys: CacheKeys = RECIPE_KEYS


class Store:
    """The files of one data set.

    Args:
        root: a folder, or its URL (s3://, gs://, hf://, http://, https://, file://).
        cache: needed where files are remote.

    Raises:
        UserError: a URL of another kind.
    """

    def __init__(self, root: str, cache: CacheSettings | None = None) -> None:
        self.root, self.cache = root.rstrip("/") if "://" in root else root, cache
        check_url(self.root)
        self._queue: queue.Queue[tuple[RemoteFile, frozenset[str]]] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._failed: dict[str, tuple[float, StoreError]] = {}

    def __reduce__(self) -> tuple[type[Store], tuple[str, CacheSettings | None]]:
        """To loader workers, which fetch ahead by a thread of their own."""
        return Store, (self.root, self.cache)

    def url(self, name: str) -> str:
        """Where a file of the set is.

        Raises:
            UserError: a name that leads out of the set, or a file of this machine in a remote set: a manifest may come from a stranger.
        """
        if "://" in name:
            check_url(name)
            if is_remote(self.root) and not is_remote(name):
                raise UserError(f"{self.root}: {shown(name)} is a file of this machine, which a remote set may not name.")
            return name
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise UserError(f"{self.root}: {shown(name)} leads out of the set. Index it again.")
        if not is_remote(self.root):
            return str(local_path(self.root) / name)
        return f"{self.root}/{quote(name) if self.root.startswith('http') else name}"

    def read_bytes(self, name: str, max_bytes: int = MAX_RECORD_BYTES) -> bytes:
        """A small file as a whole, past the cache. A run begins with one, so that what is wrong with a store is said at its start.

        Raises:
            UserError: the store is unavailable: no such bucket or file, no credentials, a missing package, no network; or the file is
                larger than `max_bytes`.
            OSError: of a local file.
        """
        url = self.url(name)
        if not is_remote(url):
            with open_regular(local_path(url)) as file:
                payload = file.read(max_bytes + 1)
        else:
            parts: list[bytes] = []
            timeout = self._settings(url).timeout

            def attempt() -> None:
                parts.clear()
                for part in stream(url, timeout):
                    parts.append(part)
                    if sum(map(len, parts)) > max_bytes:
                        return

            try:
                self._try(url, attempt, patience=2 * timeout)
            except MissingError as error:
                raise FileMissingError(at_the_start(url, error)) from error
            except StoreError as error:
                raise UserError(at_the_start(url, error)) from error
            payload = b"".join(parts)
        if len(payload) > max_bytes:
            raise UserError(f"{url} has more than {max_bytes:,} bytes, which are supported. Is it what it should be?")
        return payload

    def open(self, file: RemoteFile) -> BinaryIO:
        """The file for `pread`: itself, or its copy, which is fetched where it is not there. A copy that is open is removed last.

        Raises:
            StoreError: it is unavailable after all attempts, or could not be a moment ago.
            OSError: of a local file, or of the cache's disk.
            UserError: the cache is smaller than the file.
        """
        url = self.url(file.name)
        if not is_remote(url):
            return open_regular(local_path(url), buffering=0)
        while True:
            path = self._fetched(file, frozenset(), remember=True)
            try:
                opened = open_regular(path, buffering=0)
            except FileNotFoundError:
                continue  # removed between the two
            fcntl.flock(opened, fcntl.LOCK_SH)
            os.utime(opened.fileno())  # used last, now
            return opened

    def has(self, file: RemoteFile) -> bool:
        """Whether the file, or a copy of it, is on this machine."""
        url = self.url(file.name)
        return _size(self._place(file) if is_remote(url) else local_path(url)) == file.size

    def prefetch(self, files: Sequence[RemoteFile], keep: Collection[RemoteFile] = ()) -> None:
        """Fetch files in the background, in this order, as long as that removes none of `keep`. Errors are left to who opens them."""
        kept = frozenset(self._place(file).name for file in [*keep, *files] if is_remote(self.url(file.name)))
        for file in files:
            if is_remote(self.url(file.name)):
                self._queue.put((file, kept))
        if self._thread is None and kept:
            self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Until all that is to be prefetched has been tried."""
        self._queue.join()

    def _work(self) -> None:
        while True:
            file, kept = self._queue.get()
            with contextlib.suppress(Exception):
                self._fetched(file, kept)
            self._queue.task_done()

    def _settings(self, url: str) -> CacheSettings:
        if self.cache is None:
            raise UserError(f"{url} is remote. Give a folder for copies of it: data.cache_dir.")
        return self.cache

    def _place(self, file: RemoteFile) -> Path:
        """Of another version of a file the place is another, too."""
        url = self.url(file.name)
        key = hashlib.sha256(f"{url}\0{file.size}\0{file.sha256}".encode()).hexdigest()[:24]
        base = re.sub(r"[^A-Za-z0-9._-]", "_", url.rpartition("/")[2])[-60:]
        return self._settings(url).folder / f"{key}-{base}"

    def _fetched(self, file: RemoteFile, keep: frozenset[str], *, remember: bool = False) -> Path:
        """The copy's path, complete when this returns; of the node's processes one fetches, and the others wait.

        `remember`: a failure is raised again for some time, without a new attempt.
        """
        path, url = self._place(file), self.url(file.name)
        settings = self._settings(url)
        if _size(path) == file.size:
            return path
        if file.size > settings.max_bytes:
            raise UserError(f"{settings.keys.max_bytes} is {settings.max_bytes:,}, {url} alone has {file.size:,} bytes. Allow more.")
        make_folder(settings.folder / "locks")
        stripe = int(path.name[:8], 16) % _STRIPES
        with _locked(settings.folder / "locks" / f"{stripe:02}"):
            if _size(path) != file.size:
                until, failure = self._failed.get(path.name, (0.0, None))
                if failure is not None and time.monotonic() < until and remember:
                    raise StoreError(str(failure)) from failure
                try:
                    self._try(url, lambda: self._fetch(url, file, path, keep))
                except StoreError as error:
                    if remember:
                        self._failed[path.name] = (time.monotonic() + settings.failed_for, error)
                    raise
        return path

    def _fetch(self, url: str, file: RemoteFile, path: Path, keep: frozenset[str]) -> None:
        """One attempt. Nothing of it is left unless it succeeds; what a kill leaves is removed by the next fetch."""
        settings = self._settings(url)
        partial = _reserve(settings, path, file.size, keep)
        try:
            found, at = hashlib.sha256(), 0
            for part in stream(url, settings.timeout):
                at += len(part)
                if at > file.size:
                    raise StoreError(f"{url}: more than the {file.size:,} bytes that the manifest says")
                partial.write(part)
                if file.sha256 is not None:
                    found.update(part)
            if at != file.size:
                raise StoreError(f"{url}: {at:,} bytes came, the manifest says {file.size:,}")
            if file.sha256 is not None and not found.hexdigest().startswith(file.sha256):
                raise StoreError(f"{url}: its SHA-256 is {found.hexdigest()}, the manifest says {file.sha256}")
            partial.flush()
            os.fsync(partial.fileno())
            os.replace(partial.name, path)
            flush(path.parent)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial.name)
            partial.close()

    def _try(self, url: str, attempt: Callable[[], None], patience: float = math.inf) -> None:
        """Raises StoreError after the last attempt, or at once where another would not help; none begins after `patience` seconds."""
        settings, since = self._settings(url), time.monotonic()
        for number in range(settings.attempts):
            try:
                attempt()
                return
            except (UserError, FinalError):
                raise
            except Exception as error:  # each store's library has its own
                if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                    raise OSError(error.errno, os.strerror(error.errno), str(settings.folder)) from error
                if number + 1 == settings.attempts or time.monotonic() - since > patience:
                    told = str(error) if isinstance(error, StoreError) else f"{url}: {one_line(error)}"
                    raise StoreError(f"{told} (tried {'once' if number == 0 else f'{number + 1} times'})") from error
            time.sleep(settings.first_pause * 2**number)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone on this node, processes and threads alike."""
    with open(path, "a", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reserve(settings: CacheSettings, path: Path, size: int, keep: frozenset[str]) -> BinaryIO:
    """An empty partial file that counts `size` bytes of the cache: what is in the way has been removed. Waits for the fetches of others.

    Raises:
        StoreError: only files of `keep` are in the way.
        OSError: the disk has too little space.
    """
    while True:
        with _locked(settings.folder / "locks" / "cache"):
            free = settings.max_bytes - _used(settings.folder)
            if free < size:
                free += _remove_unused(settings.folder, size - free, keep)
            if free >= size:
                partial = open(temporary_name(path), "xb")  # noqa: SIM115 (the caller closes it)
                fcntl.flock(partial, fcntl.LOCK_EX)
                os.truncate(partial.fileno(), size)
                return partial
            if keep:
                raise StoreError(f"{path.name}: the cache is full of what is being read")
        time.sleep(_WAIT_SECONDS)  # partial files of others: they will be complete, or gone


def _used(folder: Path) -> int:
    """Bytes of all copies, complete or not. What a process left that died is removed on the way: nobody has it locked."""
    total = 0
    for entry in os.scandir(folder):
        if not _OURS.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
            continue
        if entry.name.endswith(_PARTIAL) and _is_free(Path(entry.path)):
            Path(entry.path).unlink(missing_ok=True)
            continue
        with contextlib.suppress(FileNotFoundError):  # renamed or removed by its owner just now
            total += entry.stat(follow_symlinks=False).st_size
    return total


def _is_free(path: Path) -> bool:
    """Whether no process has the file open by `Store`."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True


def _remove_unused(folder: Path, wanted: int, keep: frozenset[str]) -> int:
    """Remove complete copies until `wanted` bytes are free: those that nobody has open first, then by when they were used.

    A copy that is open stays readable for who has it, and its bytes are gone when that is closed.
    """
    copies = []
    for entry in os.scandir(folder):
        if not _OURS.fullmatch(entry.name) or entry.name.endswith(_PARTIAL) or entry.name in keep:
            continue
        if entry.is_file(follow_symlinks=False):
            stat = entry.stat(follow_symlinks=False)
            copies.append((not _is_free(Path(entry.path)), stat.st_mtime_ns, stat.st_size, Path(entry.path)))
    freed = 0
    for _, _, size, path in sorted(copies):
        if freed >= wanted:
            break
        path.unlink(missing_ok=True)
        freed += size
    return freed


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
