"""A run's folder: who may write in it, and whose run it is.

    RUN/
      .lock                       held while a process works here: host, pid, since when
      run.json                    the run's identity: written first, compared at every start
      incarnation.json            how many times the run was started, and by which process last
      metrics.jsonl, tensorboard/ the curves
      checkpoints/                of a run under way, see `checkpoint`
      teacher-pool/               likewise, or kept for the adaptation: see `teacher_pool`
      model/, learngene...        what the run exports
      result.json                 written last: with it the run is complete

An identity is {"role", ..., "recipe": the keys that the run depends on, "inputs": a digest of each thing that it reads}.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from mmlg_scale.errors import SupersededError, UserError
from mmlg_scale.files import make_folder, writing
from mmlg_scale.reading import shown
from mmlg_scale.records import read_record, write_record

IDENTITY_FILE, RESULT_FILE, LOCK_FILE = "run.json", "result.json", ".lock"
INCARNATION_FILE = "incarnation.json"
LEASE_SECONDS = 120
"""How long a holder on another node is waited for: NFS servers keep the locks of a node that has gone for 90 seconds by default."""
_LEFTOVER = re.compile(r"\.lock|\..*\.tmp")
"""What a start that was killed while it claimed the folder may have left in it."""
_OF_A_START = (
    "metrics.jsonl",
    "tensorboard",
    "wandb",
    "checkpoints",
    "teacher-pool",
    "metrics_at_0.json",
    "data-skipped*.json",
    "data-faults*-rank*.jsonl",
)
"""What a run writes before its first checkpoint."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that no two processes write in it.

    The kernel lets go of the lock when its holder ends, however it ends: the next start takes over from a dead one. Over a network file
    system this reaches as far as its locks do (NFS 4, Lustre with flock). There the locks of a node that has gone are kept until its lease
    ends: a holder on another node is waited for so long, so that a job that Slurm has moved does not end at its lock.

    Raises:
        UserError: another process holds it (names host, process and since when).
        OSError: the folder cannot be made, or written to.
    """
    make_folder(folder)
    # A symbolic link in place of the lock could name any file: it is not followed.
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        _lock(folder, descriptor)
        content = {"host": platform.node(), "pid": os.getpid(), "since": _now()}
        os.ftruncate(descriptor, 0)
        with writing(folder / LOCK_FILE):
            os.pwrite(descriptor, json.dumps(content).encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _lock(folder: Path, descriptor: int) -> None:
    """Take the lock, or raise UserError; a holder on another node is waited for until the lease of a node that has gone has ended."""
    until = time.monotonic() + LEASE_SECONDS
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                print(f"{folder}: this file system has no locks ({error.strerror}): a second start would not be noticed.", file=sys.stderr)
                return
            host, holder = _holder(descriptor)
            if host in (None, platform.node()) or time.monotonic() > until:
                raise UserError(f"{folder} is in use by {holder}. Wait for it, or give another --out.") from error
        if not told:
            print(f"{folder} is in use by {holder}: waiting up to {LEASE_SECONDS} s, in case that node has gone.", file=sys.stderr)
            told = True
        time.sleep(1.0)


def _holder(descriptor: int) -> tuple[str | None, str]:
    """The host of who holds the lock, where that is known, and the holder for people."""
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
        return str(content["host"]), f"process {content['pid']} on {content['host']} since {content['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, "another process"


def read_json(path: Path) -> dict[str, Any]:
    """A record of a run. Raises UserError where it is damaged."""
    return read_record(path, "record of a run", "Remove the folder and start the run again.")


def result_of(folder: Path) -> dict[str, Any] | None:
    """The result of a complete run; None where it is not complete."""
    file = folder / RESULT_FILE
    return read_json(file) if file.is_file() else None


def claim(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make `folder`, which is held, the run of this identity, or recognise it; returns the result of a complete run, else None.

    A run of another identity that came to neither a checkpoint nor a result gives way: there is nothing to lose.

    Raises:
        UserError: the folder contains another run (names the keys that differ), or files that are no run's.
    """
    identity = json.loads(json.dumps(identity))
    differing = differences(folder, identity)
    if differing is None:
        foreign = [path.name for path in folder.iterdir() if not _LEFTOVER.fullmatch(path.name)]
        if foreign:
            raise UserError(f"{folder} exists and is not an mmlg run: it contains {foreign[0]}. Give another --out, or an empty folder.")
    elif differing:
        if has_work(folder):
            raise UserError(f"{folder} contains another run: {'; '.join(differing)}. Give another --out, or remove that folder.")
        for path in [path for pattern in _OF_A_START for path in folder.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        print(f"{folder}: an earlier start ({'; '.join(differing)}) left no checkpoint; starting over.", file=sys.stderr)
    else:
        return result_of(folder)
    write_record(folder / IDENTITY_FILE, identity)
    return None


class Incarnation:
    """One start of a run. Whatever publishes asks it first, since a lock is not everything: after a node was lost, or over a network file
    system whose locks have lapsed, a process of an earlier start may still write.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.number, self._file = number, folder / INCARNATION_FILE

    @classmethod
    def next(cls, folder: Path) -> Incarnation:
        """Count this start, in a folder that is held and claimed."""
        file = folder / INCARNATION_FILE
        number = 1 + (_last_start(file)["number"] if file.is_file() else 0)
        write_record(file, {"number": number, "host": platform.node(), "pid": os.getpid(), "since": _now()})
        return cls(folder, number)

    def check(self) -> None:
        """Raise SupersededError where a later start has taken over. Reads a small file."""
        found = _last_start(self._file)
        if found["number"] != self.number:
            raise SupersededError(
                f"{self._file.parent}: another start ({found['number']}, process {found['pid']} on {found['host']} since {found['since']}) "
                f"has taken this run over. This one ({self.number}) ends and writes nothing more."
            )


def _last_start(file: Path) -> dict[str, Any]:
    """What `Incarnation.next` has written. Raises UserError where it is damaged."""
    remedy = "Make sure that no process works in that folder, and remove the file."
    found = read_record(file, "count of a run's starts", remedy)
    if {"number": int, "host": str, "pid": int, "since": str} != {name: type(value) for name, value in found.items()}:
        raise UserError(f"{file} is damaged. {remedy}")
    return found


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def has_work(folder: Path) -> bool:
    """Whether a run has something to lose: a result, a checkpoint (a damaged one too), or finished blocks of features."""
    checkpoints = (path for kind in ("step-*", "damaged-*") for path in (folder / "checkpoints").glob(kind))
    return (folder / RESULT_FILE).exists() or any(checkpoints) or (folder / "blocks").exists()


def differences(folder: Path, identity: Mapping[str, Any]) -> list[str] | None:
    """In what the run in `folder` differs from `identity`, in words, by dotted key; None where the folder has no run."""
    file = folder / IDENTITY_FILE
    if not file.is_file():
        return None
    return list(_differences(read_json(file), json.loads(json.dumps(identity)), ""))


def _differences(found: Any, wanted: Any, key: str) -> Iterator[str]:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for name in sorted({*found, *wanted}):
            inner = name if not key else f"{key}.{name}"
            yield from _differences(found.get(name), wanted.get(name), inner)
    elif found != wanted:
        key = key.removeprefix("recipe.")
        if key.startswith("inputs."):
            yield f"another {key.removeprefix('inputs.').replace('_', ' ')} (sha256 {str(found)[:8]}, now {str(wanted)[:8]})"
        else:
            yield f"{shown(key)} was {shown(json.dumps(found))}, now {shown(json.dumps(wanted))}"


def set_aside(folder: Path, store: Path) -> Path:
    """Move a superseded run out of the way, whole, to a new place below `store`; returns where it is now."""
    number = 1
    while (store / f"{folder.name}-{number}").exists():
        number += 1
    store.mkdir(parents=True, exist_ok=True)
    target = store / f"{folder.name}-{number}"
    os.replace(folder, target)
    return target
