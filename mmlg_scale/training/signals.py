"""What asks a run to save or to end: signals, and files in its folder. All ranks act on it at the same step.

| what                  | then                                                                                       | exit code         |
|-----------------------|--------------------------------------------------------------------------------------------|-------------------|
| SIGUSR2               | save, end, and requeue: by the launcher that sees the exit code, under Slurm by the run    | EXIT_REQUEUE (75) |
| SIGTERM               | save where that fits in before SIGKILL, end                                                | 143               |
| SIGINT (Ctrl-C)       | save, end; a second one ends at once                                                       | 130               |
| RUN/STOP              | save, end, and remove the file                                                             | EXIT_STOPPED (76) |
| RUN/SAVE              | save, go on, and remove the file                                                           |                   |

A handler only sets a flag of its rank. Between two steps, about once a second, the ranks take the maximum of their flags over the CPU
(gloo), so that the device is never waited for; when they do so next, the first rank says in the same message. A second more is nothing
beside the minute and a half that a scheduler gives.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from mmlg_scale.errors import EXIT_REQUEUE, EXIT_STOPPED, RunStopped
from mmlg_scale.ranks import gloo_group, is_first_rank, several_ranks

SECONDS_BETWEEN = 1.0
MAX_STEPS_BETWEEN = 1000


class Request(IntEnum):
    """What is asked for; of several, the one that is obeyed is the last here."""

    NOTHING = 0
    SAVE = 1
    REQUEUE = 2
    STOP = 3
    INTERRUPT = 4
    TERMINATE = 5

    @property
    def ends(self) -> bool:
        """Whether the run is to end."""
        return self > Request.SAVE

    @property
    def told(self) -> str:
        """What asked."""
        return {Request.REQUEUE: "SIGUSR2", Request.STOP: "the file STOP", Request.INTERRUPT: "Ctrl-C", Request.TERMINATE: "SIGTERM"}[self]

    @property
    def exit_code(self) -> int:
        """Of a run that ends for this reason."""
        codes = {Request.REQUEUE: EXIT_REQUEUE, Request.STOP: EXIT_STOPPED, Request.INTERRUPT: 130, Request.TERMINATE: 143}
        return codes[self]


SIGNALS = {signal.SIGUSR2: Request.REQUEUE, signal.SIGINT: Request.INTERRUPT, signal.SIGTERM: Request.TERMINATE}
FILES = {"SAVE": Request.SAVE, "STOP": Request.STOP}


class Requests:
    """A context in which signals and files are requests to a run.

    Args:
        folder: the run's.
        save_every: seconds after the last save (`saved`) when the first rank asks for one by itself; None: never.
        clock: seconds that only grow.
    """

    def __init__(self, folder: Path, *, save_every: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._save_every, self._clock = folder, save_every, clock
        self._received = Request.NOTHING
        self._before: dict[int, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._next_step = 0
        self._last: tuple[int, float] | None = None  # step and time of the last agreement
        self._saved_at = clock()

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():  # others may not install handlers
            # A shell ignores SIGINT for what it starts in the background. USR2 a launcher ignores until somebody listens.
            wanted = [number for number in SIGNALS if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in wanted}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._received == Request.INTERRUPT:
                raise KeyboardInterrupt
            if is_first_rank():
                os.write(2, b"mmlg: saving; Ctrl-C again ends at once.\n")
        self._received = max(self._received, SIGNALS[signal.Signals(number)])

    def saved(self) -> None:
        """A checkpoint has been written."""
        self._saved_at = self._clock()

    def end_if_asked(self) -> None:
        """For work that is saved as it goes, on ranks that do not wait for each other.

        Raises:
            RunStopped: a signal has come to this rank, or, on the first one, the file STOP is there.
        """
        asked = max(self._received, self._in_files())
        if asked.ends:
            if asked == Request.STOP:
                (self._folder / "STOP").unlink(missing_ok=True)
            then = requeue() if asked == Request.REQUEUE and is_first_rank() else "start the same command again to resume"
            raise RunStopped(f"stopped by {asked.told}; {then}.", asked.exit_code, speaks=is_first_rank())

    def agree(self, step: int, *, now: bool = False) -> Request:
        """What the run is asked to do before `step`; NOTHING at steps where the ranks do not speak. Collective where they do.

        Args:
            now: speak at this step in any case.
        """
        if step < self._next_step and not now:
            return Request.NOTHING
        own, pause = max(self._received, self._in_files()), self._steps_between(step)
        if several_ranks():
            if self._group is None:
                self._group = gloo_group()
            # Only the first rank's clock and view of the folder count.
            said = torch.tensor([own, pause])
            dist.all_reduce(said, dist.ReduceOp.MAX, group=self._group)
            own, pause = Request(int(said[0])), int(said[1])
        self._next_step = step + pause
        if is_first_rank():
            for name in [name for name, request in FILES.items() if request == own]:
                (self._folder / name).unlink(missing_ok=True)
        return own

    def _in_files(self) -> Request:
        if not is_first_rank():
            return Request.NOTHING
        found = [request for name, request in FILES.items() if (self._folder / name).exists()]
        if self._save_every is not None and self._clock() - self._saved_at >= self._save_every:
            found.append(Request.SAVE)
        return max(found, default=Request.NOTHING)

    def _steps_between(self, step: int) -> int:
        """Steps to the next agreement, from how long the last ones took; 0: the first rank decides."""
        if not is_first_rank():
            return 0
        now, last, self._last = self._clock(), self._last, (step, self._clock())
        if last is None or step == last[0]:
            return 1
        per_step = max(1e-9, (now - last[1]) / (step - last[0]))
        return max(1, min(MAX_STEPS_BETWEEN, int(SECONDS_BETWEEN / per_step)))


def requeue() -> str:
    """Under Slurm, put the job back into the queue; returns what was done, or what is left to do, in words."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return "start the same command again"
    if shutil.which("scontrol") is None:
        return f"scontrol was not found, so Slurm job {job} was not requeued: submit it again"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)  # noqa: S607
    except (OSError, subprocess.SubprocessError) as error:
        return f"scontrol requeue {job} failed ({' '.join(str(error).split())}): submit the job again"
    if done.returncode:
        return f"scontrol requeue {job} failed ({' '.join((done.stderr or done.stdout).split())}): submit the job again"
    print(f"mmlg: Slurm job {job} is requeued.", file=sys.stderr, flush=True)
    return f"Slurm job {job} is requeued"
