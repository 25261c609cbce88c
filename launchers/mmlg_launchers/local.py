"""Jobs as processes of this host, under a supervisor (`supervise.py`), or as forks of a server that has the heavy imports behind it."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from mmlg_launchers import supervise
from mmlg_launchers.interface import JobState, Resources
from mmlg_launchers.record import write_state
from mmlg_launchers.supervise import PARENT_VARIABLE

GRACE_SECONDS = 45.0
"""How long a job may take to end after SIGTERM; more than a run counts on where it saves first (`runtime.kill_wait`, 30 seconds)."""


class Process(Protocol):
    """What a job needs of its process."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises subprocess.TimeoutExpired."""
        ...


class SupervisedProcess:
    """Ranks of `argv` under a supervisor, which ends with them, or with this process."""

    def __init__(
        self, argv: Sequence[str], num_processes: int, environment: Mapping[str, str], folder: Path, log: IO[bytes] | None
    ) -> None:
        read, self._alive = os.pipe()
        command = [sys.executable, supervise.__file__, str(read), str(num_processes), str(folder), *argv]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=None if log is None else subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=(read,),
        )
        os.close(read)
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._ended(self._process.poll())

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(self._process.wait(timeout))
        assert code is not None
        return code

    def _ended(self, code: int | None) -> int | None:
        if code is not None and self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
        return code


class ForkedProcess:
    """`python -m MODULE ...` in a fork of a server that has already imported the heavy modules (multiprocessing's forkserver).

    A process that imports torch, DeepSpeed and open_clip itself needs ten seconds of a core before its first step.
    """

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], log: Path, preload: Sequence[str]) -> None:
        context = multiprocessing.get_context("forkserver")
        os.environ[PARENT_VARIABLE] = str(os.getpid())
        context.set_forkserver_preload(["mmlg_launchers.server", *preload])
        self._process = context.Process(target=_run_module, args=(list(argv), dict(environment), str(log)))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("", timeout or 0)
        return code


def _run_module(argv: list[str], environment: dict[str, str], log: str) -> None:
    """Runs in the fork: become a process group of its own that ends with the launcher, write to the log, run the module."""
    os.setsid()
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = argv[2:]
    runpy.run_module(argv[2], run_name="__main__", alter_sys=True)


def _end_with_launcher() -> None:
    """The fork's parent is the server, which outlives a killed launcher: wait for the launcher's own end."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    multiprocessing.connection.wait([launcher.sentinel])
    os.killpg(0, signal.SIGKILL)


class LocalJob:
    """A process group on this host."""

    def __init__(self, process: Process, run_folder: Path, argv: Sequence[str], logs: Sequence[Path]) -> None:
        self._process, self._run_folder, self._argv, self._logs = process, run_folder, list(argv), list(logs)
        self._cancelled = False
        self._started = time.time()
        self._ended: float | None = None
        self._write_state()

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def state(self) -> JobState:
        code = self._process.poll()
        if code is None:
            return JobState.RUNNING
        if self._ended is None:
            self._ended = time.time()
            self._write_state()
        return self._final(code)

    def _final(self, code: int) -> JobState:
        if self._cancelled:
            return JobState.CANCELLED
        return JobState.COMPLETED if code == 0 else JobState.FAILED

    def wait(self, timeout: float | None = None) -> JobState:
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return JobState.RUNNING
        return self.state()

    def cancel(self) -> None:
        """SIGTERM to the whole group, and SIGKILL after a grace of 45 seconds."""
        if self._process.poll() is None:
            self._cancelled = True
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_SECONDS)
        self._signal(signal.SIGKILL)  # whatever of the group outlived its leader
        self._process.wait()
        self.state()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def log_paths(self) -> list[Path]:
        return self._logs

    def _write_state(self) -> None:
        code = self._process.poll()
        state = {
            "launcher": "local",
            "state": (JobState.RUNNING if code is None else self._final(code)).value,
            "argv": self._argv,
            "pid": self._process.pid,
            "num_ranks": len(self._logs),
            "exit_code": code,
            "started": self._started,
            "ended": self._ended,
        }
        with contextlib.suppress(OSError):  # the job is worth more than the record of it
            write_state(self._run_folder, state)


class LocalLauncher:
    """Starts jobs on this host.

    Args:
        stream: let the job print to this console instead of to its log.
        preload: modules that a server imports once; jobs of one process that run ``python -m`` are then forks of it.
        gpus: GPUs, as CUDA_VISIBLE_DEVICES names them, that jobs side by side share out: each of their ranks is given the one that the
            fewest use. Left out: every job sees all GPUs.
    """

    def __init__(self, *, stream: bool = False, preload: Sequence[str] = (), gpus: Sequence[str] = ()) -> None:
        self.stream, self.preload, self.gpus = stream, tuple(preload), tuple(gpus)
        self._holders: list[tuple[LocalJob, tuple[str, ...]]] = []

    def submit(self, argv: Sequence[str], resources: Resources, run_folder: Path, env: Mapping[str, str] | None = None) -> LocalJob:
        """Start `argv` in a process group of its own, which ends when this process does.

        Raises:
            ValueError: more than one node is asked for.
        """
        if resources.num_nodes != 1:
            raise ValueError(f"the local launcher has one node, {resources.num_nodes} are asked for: use a cluster launcher")
        run_folder = run_folder.absolute()
        run_folder.mkdir(parents=True, exist_ok=True)
        log = run_folder / "log.txt"
        threads = resources.cpus_per_process or max(1, len(os.sched_getaffinity(0)) // resources.num_processes)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **(env or {})}
        taken = self._free_gpus(resources.num_processes)
        if taken:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
        process: Process
        if self.preload and not self.stream and resources.num_processes == 1 and argv[:2] == [sys.executable, "-m"]:
            process = ForkedProcess(argv, environment, log, self.preload)
        else:
            with contextlib.nullcontext() if self.stream else supervise.open_log(log, append=True) as file:
                process = SupervisedProcess(argv, resources.num_processes, environment, run_folder, file)
        logs = [log, *(run_folder / supervise.log_name(rank) for rank in range(1, resources.num_processes))]
        job = LocalJob(process, run_folder, argv, logs)
        self._holders.append((job, taken))
        return job

    def _free_gpus(self, number: int) -> tuple[str, ...]:
        """The GPUs that the fewest running jobs use."""
        self._holders = [(job, gpus) for job, gpus in self._holders if job.exit_code is None]
        uses = Counter(gpu for _, gpus in self._holders for gpu in gpus)
        return tuple(sorted(self.gpus, key=lambda gpu: uses[gpu])[:number])
