"""Jobs as processes of this host: the argv itself, or torchrun around it where several ranks are asked for."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mmlg_launchers.interface import JobState, Resources

GRACE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Runs in the child: end when the parent does, also when it is killed.

    Otherwise a rerun of a killed command would meet its own orphans writing to the same folder. Linux only.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def torchrun(argv: Sequence[str], num_processes: int) -> list[str]:
    """`argv` (python -m MODULE ..., python SCRIPT ..., or a program) under torchrun with `num_processes` ranks on this host."""
    prefix = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    if argv[0] == sys.executable:
        return [*prefix, "-m", "mmlg_launchers.rank", *argv[1:]]
    return [*prefix, "--no-python", *argv]


class Process(Protocol):
    """What a job needs of its process."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises subprocess.TimeoutExpired."""
        ...


class ForkedProcess:
    """`python -m MODULE ...` in a fork of a server that has already imported the heavy modules (multiprocessing's forkserver).

    A process that imports torch, DeepSpeed and open_clip anew needs ten seconds of a core before its first step.
    """

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], log: Path, preload: Sequence[str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
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

    def __init__(self, process: Process, run_folder: Path, argv: Sequence[str], log: Path) -> None:
        self._process, self._run_folder, self._argv, self._log = process, run_folder, list(argv), log
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
        """SIGTERM to the whole group, and SIGKILL after a grace of 10 seconds."""
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
        return [self._log]

    def _write_state(self) -> None:
        code = self._process.poll()
        state = {
            "state": (JobState.RUNNING if code is None else self._final(code)).value,
            "argv": self._argv,
            "pid": self._process.pid,
            "exit_code": code,
            "started": self._started,
            "ended": self._ended,
        }
        temporary = self._run_folder / ".state.json.tmp"
        temporary.unlink(missing_ok=True)  # a symbolic link in its place would be followed
        temporary.write_text(json.dumps(state, indent=1))
        os.replace(temporary, self._run_folder / "state.json")


class LocalLauncher:
    """Starts jobs on this host.

    Args:
        stream: let the job print to this console instead of to its log.
        preload: modules that a server imports once; jobs of one process that run ``python -m`` are then forks of it.
    """

    def __init__(self, *, stream: bool = False, preload: Sequence[str] = ()) -> None:
        self.stream, self.preload = stream, tuple(preload)

    def submit(self, argv: Sequence[str], resources: Resources, run_folder: Path, env: Mapping[str, str] | None = None) -> LocalJob:
        """Start `argv` in a process group of its own, which ends when this process does.

        Raises:
            ValueError: more than one node is asked for.
        """
        if resources.num_nodes != 1:
            raise ValueError(f"the local launcher has one node, {resources.num_nodes} are asked for: use a cluster launcher")
        run_folder.mkdir(parents=True, exist_ok=True)
        log = run_folder / "log.txt"
        command = list(argv) if resources.num_processes == 1 else torchrun(argv, resources.num_processes)
        threads = resources.cpus_per_process or max(1, len(os.sched_getaffinity(0)) // resources.num_processes)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **(env or {})}
        if self.preload and not self.stream and resources.num_processes == 1 and argv[:2] == [sys.executable, "-m"]:
            return LocalJob(ForkedProcess(argv, environment, log, self.preload), run_folder, command, log)
        # A symbolic link in place of the log could name any file: it is not followed.
        with open(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=None if self.stream else file,
                stderr=None if self.stream else subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509 (no threads hold locks here: prctl alone is called)
            )
        return LocalJob(process, run_folder, command, log)
