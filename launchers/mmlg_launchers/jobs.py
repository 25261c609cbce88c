"""Jobs that were launched before, by this or another process, found by their folders: `mmlg launch status`, `logs` and `cancel`."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from mmlg_launchers import supervise
from mmlg_launchers.interface import JobState, LaunchError
from mmlg_launchers.local import GRACE_SECONDS
from mmlg_launchers.record import STATE_FILE, read_state
from mmlg_launchers.slurm import SlurmJob

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
    return [(str(path.relative_to(folder)) if path != beside else folder.name, _open(path)) for path in found]


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
    if job.reason and job.reason.lower() not in (state.value, "none"):
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


def follow(jobs: Sequence[tuple[str, Found]], rank: int, write: Callable[[str], None], *, until_end: bool) -> None:
    """Write the logs of one rank of each job; with `until_end` also what is added to them until the jobs have ended.

    Several logs are told apart by a line with the job's name in front of each part.

    Raises:
        LaunchError: a job has no such rank.
    """
    logs = []
    for name, job in jobs:
        paths = job.log_paths()
        if rank >= len(paths):
            raise LaunchError(f"{name} has no rank {rank}.")
        logs.append((name, job, paths[rank]))
    offsets = dict.fromkeys((path for _, _, path in logs), 0)
    last = None
    while True:
        ended = not until_end or all(job.state().is_final for _, job, _ in logs)
        for name, _, path in logs:
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                file.seek(offsets[path])
                text = file.read()
                offsets[path] += len(text)
                if text:
                    if len(logs) > 1 and last != path:
                        write(f"==> {name}: {path} <==\n")
                    last = path
                    write(text.decode(errors="replace"))
        if ended:
            return
        time.sleep(0.5)
