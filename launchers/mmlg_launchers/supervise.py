"""A job's processes on this host: starts the ranks, ends them together, and says in one line which of them failed.

Run as a program, `python supervise.py ALIVE_FD NUM_PROCESSES FOLDER ARGV...`, that imports nothing but the standard library. It is used
instead of torchrun, which prints forty lines around a rank's one, leaves ranks behind where it is killed while they start, and imports
torch first.

- Each rank gets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. The port is bound here, but not listened
  at, so that no other program is given it before the first rank takes it over.
- ALIVE_FD is the reading end of a pipe whose writing end only the launcher has. It ends with the launcher, however that ends, and then
  the whole process group is killed. The ranks themselves end with this process by a signal from the kernel.
- The first rank writes to this process's output, the others to FOLDER/rank-N.txt.
- Of several ranks, each is given a pipe in MMLG_ERROR_FD, where it says why it fails (`report_failure`), instead of on its output: one
  rank's failure makes the others fail too, in many more words. What only follows from another rank's failure is not shown. A pipe,
  because the disk may be what is full.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ERROR_VARIABLE = "MMLG_ERROR_FD"
PARENT_VARIABLE = "MMLG_SERVER_OF"
"""The launcher's process id, for `server.py`."""
GRACE_SECONDS = 5.0
"""How long ranks may take to end by themselves after one has failed, and again after SIGTERM."""
_MAX_REPORT = 60_000
"""Bytes; a pipe takes 64 KiB without a reader."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def ends_with(parent: int) -> Callable[[], None]:
    """For the child of the process `parent`: end when the parent does, also when it is killed. Linux only.

    A parent that died before the kernel was asked sends no signal any more: the child then has another parent.
    """

    def ask() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(128 + signal.SIGKILL)

    return ask


def _as_rank(parent: int) -> Callable[[], None]:
    """`ends_with`, for a rank: SIGUSR2 does nothing until the rank listens."""
    ask = ends_with(parent)

    def prepare() -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        ask()

    return prepare


def log_name(rank: int) -> str:
    """Where a rank other than the first writes, in the job's folder."""
    return f"rank-{rank}.txt"


def open_log(path: Path, *, append: bool = False) -> IO[bytes]:
    """Open a log to write. A symbolic link in its place, which could name any file, is not followed."""
    how = os.O_APPEND if append else os.O_TRUNC
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | how, 0o644), "wb")


def failure_pipe() -> int | None:
    """The descriptor on which this process, one of several ranks, says why it fails; None: on its own output.

    Taken once: processes that it starts do not have the descriptor.
    """
    given = os.environ.pop(ERROR_VARIABLE, None)
    try:
        return int(given) if given is not None and stat.S_ISFIFO(os.fstat(int(given)).st_mode) else None
    except (ValueError, OSError):
        return None


def report_failure(pipe: int, line: str, *, kind: str, details: str = "") -> None:
    """Say why this rank fails.

    Args:
        pipe: what `failure_pipe` returned.
        line: for the user.
        kind: user (a mistake, or what the machine refuses), internal, stopped (as it was asked to), or follows (from another rank's
            failure).
        details: a traceback, for the log folder.
    """
    content = {"line": line[:4000], "kind": kind, "details": details[-40_000:], "time": time.monotonic()}
    payload = json.dumps(content).encode()
    if len(payload) > _MAX_REPORT:
        payload = json.dumps(content | {"details": ""}).encode()[:_MAX_REPORT]
    with contextlib.suppress(OSError):
        os.write(pipe, payload)


@dataclass
class _Rank:
    """A process, and what it said of its failure."""

    number: int
    process: subprocess.Popen[bytes]
    pipe: int
    log: Path | None
    ended: float | None = None
    stopped_here: bool = False
    """It was this process that ended it: its exit code explains nothing."""
    payload: bytes = b""

    @property
    def code(self) -> int:
        return self.process.returncode

    @property
    def report(self) -> dict[str, Any] | None:
        """What the rank said of its failure."""
        try:
            return json.loads(self.payload)
        except ValueError:
            return None  # nothing, or cut short

    def read(self) -> None:
        """Take what is in the pipe."""
        try:
            part = os.read(self.pipe, _MAX_REPORT)
        except BlockingIOError:
            return
        self.payload += part
        if not part:
            os.close(self.pipe)
            self.pipe = -1

    def poll(self) -> None:
        """Note whether it has ended."""
        if self.ended is None and self.process.poll() is not None:
            self.ended = time.monotonic()
            if self.pipe >= 0:
                self.read()

    def stop(self, number: signal.Signals) -> None:
        """Send it a signal, where it still runs."""
        if self.ended is None:
            self.stopped_here = True
            self.process.send_signal(number)

    def weight(self) -> tuple[int, float]:
        """What explains the failure of all best, first: what a rank says itself, SIGKILL, which no failure of another rank brings,
        the earliest of the others, and last what follows from another rank's failure."""
        kinds, report = {"user": 0, "internal": 2, "stopped": 2, "follows": 3}, self.report
        if report is not None:
            return kinds[report["kind"]], report["time"]
        return (1 if self.code == -signal.SIGKILL else 2), self.ended or 0.0


class Supervisor:
    """Runs `argv` on `num_processes` ranks; see the module's docstring."""

    def __init__(self, argv: Sequence[str], num_processes: int, folder: Path, alive: int) -> None:
        self._argv, self._num_processes, self._folder, self._alive = list(argv), num_processes, folder, alive
        self._ranks: list[_Rank] = []
        self._stopped = False

    def run(self) -> int:
        """Returns the exit code: 0, that of the rank that failed, or 128 + N where signal N ended it."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGUSR2, self._forward)
        try:
            with socket.socket() as reserved:
                reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the first rank may bind it too
                reserved.bind(("127.0.0.1", 0))
                for number in range(self._num_processes):
                    if self._stopped:
                        break
                    self._ranks.append(self._start(number, reserved.getsockname()[1]))
                    if self._stopped:  # while it was started: the signal has not reached it
                        self._ranks[-1].stop(signal.SIGTERM)
                failed = self._wait(until=lambda: any(rank.ended and rank.code for rank in self._ranks))
        except OSError as error:
            self._end_others()
            print(f"mmlg: error: {error.filename or self._argv[0]} cannot be started: {error.strerror}.", file=sys.stderr, flush=True)
            return 2
        if failed:
            self._end_others()
        if (failed or self._stopped) and os.getpgrp() == os.getpid():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.killpg(0, signal.SIGTERM)  # what the ranks started and left behind
        if self._stopped:
            return 128 + signal.SIGTERM
        return self._explain() if failed else 0

    def _start(self, number: int, port: int) -> _Rank:
        environment = dict(os.environ)
        read, write = os.pipe()
        log = None
        if self._num_processes > 1:
            ranks = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": self._num_processes, "LOCAL_WORLD_SIZE": self._num_processes}
            environment |= {name: str(value) for name, value in ranks.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), ERROR_VARIABLE: str(write)}
            log = self._folder / log_name(number) if number else None
        output = None if log is None else open_log(log)
        process = subprocess.Popen(
            self._argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            env=environment,
            pass_fds=(write,),
            preexec_fn=_as_rank(os.getpid()),  # noqa: PLW1509 (there are no threads here)
        )
        os.close(write)
        os.set_blocking(read, False)
        if output is not None:
            output.close()
        return _Rank(number, process, read, log)

    def _stop(self, *_: object) -> None:
        """SIGTERM to this process is for the ranks; it waits for them, and whoever sent it kills what takes too long."""
        self._stopped = True
        for rank in self._ranks:
            rank.stop(signal.SIGTERM)

    def _forward(self, number: int, *_: object) -> None:
        """A signal that asks ranks for something, and does not end them: theirs to answer."""
        for rank in self._ranks:
            if rank.ended is None:
                rank.process.send_signal(number)

    def _wait(self, until: Callable[[], bool], seconds: float = float("inf")) -> bool:
        """Wait until all ranks have ended (False), or what is waited for has come (True), or for so many seconds (False)."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for rank in self._ranks:
                rank.poll()
            if until():
                return True
            if all(rank.ended is not None for rank in self._ranks):
                return False
            pipes = {rank.pipe: rank for rank in self._ranks if rank.pipe >= 0}
            for ready in select.select([self._alive, *pipes], [], [], 0.05)[0]:
                if ready == self._alive:
                    os.killpg(0, signal.SIGKILL)  # the launcher is gone
                pipes[ready].read()
        return False

    def _end_others(self) -> None:
        """Give the others time to fail or end by themselves, which they do where they share the cause or wait for the rank that failed."""
        for end in (None, signal.SIGTERM, signal.SIGKILL):
            for rank in self._ranks:
                if end is not None:
                    rank.stop(end)
            self._wait(until=lambda: False, seconds=GRACE_SECONDS)

    def _explain(self) -> int:
        """Print the line of the rank that failed; returns its exit code."""
        failed = [rank for rank in self._ranks if rank.ended and rank.code and not rank.stopped_here]
        first = min(failed, key=_Rank.weight)
        code = first.code if first.code > 0 else 128 - first.code
        if self._num_processes == 1 and first.code > 0:
            return code  # it had the console, and has said what there is to say
        who = f"rank {first.number}" if self._num_processes > 1 else "the process"
        report = first.report
        if report is not None:
            said = [rank.report["line"] for rank in self._ranks if rank.report is not None]
            everyone = len(said) == len(self._ranks) and len(set(said)) == 1
            line = report["line"] if everyone else f"{who}: {report['line']}"
            if report["details"]:
                line = f"{line.rstrip('.')}.{self._keep(first.number, report['details'])}"
        elif first.code < 0:
            line = f"{who} was ended by {in_words(-first.code)}."
        else:
            line = f"{who} failed (exit code {code}){_last_line(first.log)}"
        prefix = "mmlg" if report is not None and report["kind"] == "stopped" else "mmlg: error"
        print(f"{prefix}: {line}", file=sys.stderr, flush=True)
        return code

    def _keep(self, number: int, details: str) -> str:
        """Write a rank's traceback to the folder; returns where it is, in words."""
        file = self._folder / f"traceback-rank-{number}.txt"
        try:
            with open_log(file) as opened:
                opened.write(details.encode("utf-8", "backslashreplace"))
        except OSError:
            return ""
        return f" Traceback: {file}."


def in_words(number: int) -> str:
    """A signal's name, and what usually sends it."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{name} (the kernel sends it when memory runs out)" if number == signal.SIGKILL else name


def tail(log: Path, num_bytes: int = 65_536) -> str:
    """The end of a log, which can be long."""
    with open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - num_bytes))
        return file.read().decode(errors="replace")


def _last_line(log: Path | None) -> str:
    lines = [] if log is None else [line for line in tail(log).splitlines() if line.strip()]
    return f": {lines[-1]}" if lines else "."


def main() -> int:
    """See the module's docstring."""
    alive, num_processes, folder, *argv = sys.argv[1:]
    return Supervisor(argv, int(num_processes), Path(folder), int(alive)).run()


if __name__ == "__main__":
    sys.exit(main())
