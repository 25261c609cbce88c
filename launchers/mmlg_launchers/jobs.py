"""Jobs that were launched before, by this or another process, found by their folders: `mmlg launch status`, `logs` and `cancel`."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mmlg_launchers import supervise
from mmlg_launchers.interface import JobState, LaunchError
from mmlg_launchers.local import GRACE_SECONDS
from mmlg_launchers.record import STATE_FILE, read_state
from mmlg_launchers.slurm import SlurmJob

FOLLOW_SECONDS = 1.0
SUFFIX = ".launch"
"""The launch folder of RUN is RUN.launch, beside it."""


class Found(Protocol):
    """What can be asked of a job of an earlier launch."""

    id: str
    reason: str

    @property
    def exit_code(self) -> int | None: ...
    def state(self) -> JobState: ...
    def cancel(self) -> None: ...
    def log_paths(self) -> list[Path]: ...


class FoundLocalJob:
    """A job of this host that another process launched."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        record = read_state(folder)
        if not isinstance(record.get("pid"), int) or record["pid"] < 2:
            raise LaunchError(f"{folder / STATE_FILE} is no record of a local job.")
        self._pid: int = record["pid"]
        self.id, self.reason = f"pid {self._pid}", ""

    @property
    def exit_code(self) -> int | None:
        code = read_state(self._folder).get("exit_code")
        return code if isinstance(code, int) else None

    def state(self) -> JobState:
        try:
            state = JobState(read_state(self._folder).get("state"))
        except ValueError as error:
            raise LaunchError(f"{self._folder / STATE_FILE} has no state of a job.") from error
        if not state.is_final and not self._runs():
            self.reason = "its launcher was killed"
            return JobState.FAILED
        return state

    def _runs(self) -> bool:
        """Whether the process still is this job's, and not another that was given its number since: it names the folder, or logs to it."""
        process = Path(f"/proc/{self._pid}")
        try:
            if process.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return False
            words = process.joinpath("cmdline").read_bytes().split(b"\0")
            log = os.readlink(process / "fd" / "1")
        except OSError:
            return False
        return (os.fsencode(supervise.__file__) in words and os.fsencode(self._folder) in words) or log == str(self._folder / "log.txt")

    def cancel(self) -> None:
        if self.state().is_final:
            return
        for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, number)
            end = time.monotonic() + seconds
            while self._runs() and time.monotonic() < end:
                time.sleep(0.05)
            if not self._runs():
                return

    def log_paths(self) -> list[Path]:
        ranks = read_state(self._folder).get("num_ranks", 1)
        return [self._folder / "log.txt", *(self._folder / supervise.log_name(rank) for rank in range(1, int(ranks)))]


def find_jobs(folder: Path) -> list[tuple[str, Found]]:
    """The jobs of a run's folder, a launch folder, or a graph's folder, with their names.

    Raises:
        LaunchError: nothing was launched there; a record is damaged.
    """
    folder = folder.absolute()
    beside = folder.with_name(folder.name + SUFFIX)
    if (folder / STATE_FILE).is_file():
        return [(folder.name.removesuffix(SUFFIX), _open(folder))]
    found = sorted((file.parent for pattern in (f"*{SUFFIX}", f"*/*{SUFFIX}") for file in folder.glob(f"{pattern}/{STATE_FILE}")), key=_age)
    if (beside / STATE_FILE).is_file():
        found.append(beside)
    if not found:
        raise LaunchError(
            f"nothing was launched in {folder}: there is no {STATE_FILE} in it, in {beside.name}, or in a step's {SUFFIX} folder."
        )
    names = [folder.name if path == beside else str(path.relative_to(folder)).removesuffix(SUFFIX) for path in found]
    return [(name, _open(path)) for name, path in zip(names, found, strict=True)]


def _age(folder: Path) -> float:
    state = read_state(folder)
    return float(state.get("submitted", state.get("started", 0)))


def _open(folder: Path) -> Found:
    return SlurmJob(folder) if read_state(folder).get("launcher") == "slurm" else FoundLocalJob(folder)


def in_words(job: Found) -> str:
    """A job's state, and what else there is to say of it."""
    state = job.state()
    said = [state.value]
    if state is JobState.FAILED and job.exit_code is not None:
        said.append(f"exit code {job.exit_code}")
    if job.reason and job.reason.lower() not in (state.value, "none", ""):
        said.append(job.reason)
    return said[0] + (f" ({', '.join(said[1:])})" if said[1:] else "")


def cancel_jobs(jobs: Sequence[tuple[str, Found]]) -> list[str]:
    """End the jobs that wait or run, the last of a graph first, so that none starts because of it; returns their names."""
    cancelled = []
    for name, job in reversed(jobs):
        if not job.state().is_final:
            job.cancel()
            cancelled.append(name)
    return cancelled[::-1]


def log_sizes(folder: Path) -> dict[Path, int]:
    """Bytes of the logs in a launch folder, to which the next launch there appends."""
    return {path: path.stat().st_size for path in folder.absolute().glob("*.txt")}


def follow(
    jobs: Sequence[tuple[str, Found]],
    rank: int,
    write: Callable[[str], None],
    tell: Callable[[str], None] | None,
    after: Mapping[Path, int] | None = None,
) -> None:
    """Write the logs of one rank of each job.

    Several logs are told apart by a line with the job's name in front of each part.

    Args:
        tell: told of every change of a job's state, while what is added to the logs is written too, until the jobs have ended. None: only
            what is in the logs now is written.
        after: of logs that have parts of earlier launches, where these end; they are left out.

    Raises:
        LaunchError: a job has no such rank.
    """
    logs = []
    for name, job in jobs:
        paths = job.log_paths()
        if rank >= len(paths):
            raise LaunchError(f"{name} has no rank {rank}.")
        logs.append(_Log(name, job, paths[rank], (after or {}).get(paths[rank], 0)))
    last = logs[0]
    while True:
        if tell is not None:
            for log in logs:
                log.tell(tell)
        for log in logs:
            text = log.read()
            if text:
                if log is not last or (log.offset == len(text) and len(logs) > 1):
                    write(f"==> {log.name}: {log.path} <==\n")
                last = log
                write(text.decode(errors="replace"))
        if tell is None or all(log.has_ended for log in logs):
            return
        time.sleep(FOLLOW_SECONDS)


class _Log:
    """A log that grows."""

    def __init__(self, name: str, job: Found, path: Path, start: int) -> None:
        self.name, self.path, self.offset = name, path, start
        self.has_ended = False
        self._job, self._said = job, ""

    def tell(self, tell: Callable[[str], None]) -> None:
        """Note the job's state, and tell a change of it. What it printed last is read after this."""
        if self.has_ended:
            return
        said = in_words(self._job)
        self.has_ended = self._job.state().is_final
        if said != self._said:
            tell(f"{self.name}: {said}")
        self._said = said

    def read(self) -> bytes:
        """What is new."""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            file.seek(self.offset)
            text = file.read()
            self.offset += len(text)
            return text
        return b""
