"""Disks that fill up, and folders that cannot be written to: real ones, so that every library meets what the kernel says."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

SIZE = 64 * 2**20


class Disk(Protocol):
    """A folder where writing fails from a moment on."""

    path: Path

    def fill(self, spare: int) -> None:
        """From now on `spare` bytes, at least, fit in no more."""
        ...

    def clear(self) -> None:
        """There is space again."""
        ...


class SmallDisk(Disk):
    """A file system of its own in memory, which a file fills."""

    def __init__(self, path: Path) -> None:
        self.path, self._ballast = path, path / ".ballast"

    def fill(self, spare: int) -> None:
        stat = os.statvfs(self.path)
        with open(self._ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - spare)

    def clear(self) -> None:
        self._ballast.unlink(missing_ok=True)


class LimitedFiles(Disk):
    """Where nothing may be mounted: the kernel refuses every file of this process that is longer than `spare`."""

    def __init__(self, path: Path) -> None:
        self.path, self._before = path, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, spare: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (spare, self._before[1]))

    def clear(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


@contextlib.contextmanager
def mounted(path: Path, *options: str) -> Iterator[bool]:
    """A mount at `path`; yields False where this process may not make one."""
    path.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *options, str(path)], capture_output=True, check=False) if shutil.which("mount") else None
    if done is None or done.returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextlib.contextmanager
def disk(folder: Path, *, mount: bool = True) -> Iterator[Disk]:
    """A disk in `folder`: a file system of its own where one may be mounted, else (and without `mount`) a limit on file sizes."""
    with contextlib.ExitStack() as stack:
        path = folder / "disk"
        possible = mount and stack.enter_context(mounted(path, "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs"))
        path.mkdir(exist_ok=True)
        found = SmallDisk(path) if possible else LimitedFiles(path)
        stack.callback(found.clear)
        yield found


@contextlib.contextmanager
def unprivileged_folder(mode: int) -> Iterator[Path]:
    """A folder of this mode, as seen by a user whom permissions bind, who this process is meanwhile."""
    root = Path(tempfile.mkdtemp())
    folder = root / "folder"
    folder.mkdir()
    folder.chmod(mode)
    root.chmod(0o755)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(root)
