"""Ends a run that hangs, as in a collective that one rank never enters, and leaves every rank's stack behind."""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from mmlg_scale.errors import EXIT_HANG

GRACE_SECONDS = 10.0
"""After its own stack is written a rank waits so long for the others, whose last step ended a little later."""


class Watchdog:
    """A context in which the process must say at least every `seconds` that it is alive (`beat`); None: never.

    A thread of this process watches. Collectives, loaders and kernels wait without Python's lock, so it can run while they do.

    Args:
        folder: the run's; the stacks are FOLDER/stacks/rank-N.txt.
    """

    def __init__(self, folder: Path, rank: int, seconds: float | None) -> None:
        self._file, self._rank, self._seconds = folder / "stacks" / f"rank-{rank}.txt", rank, seconds
        self._alive_at = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self.beat()
        if self._seconds is not None:
            self._thread = threading.Thread(target=self._watch, args=(self._seconds,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is watched meanwhile: of work that has no steps, and may take longer."""
        self._alive_at = math.inf
        try:
            yield
        finally:
            self.beat()

    def beat(self) -> None:
        """The process is alive."""
        self._alive_at = time.monotonic()

    def _watch(self, seconds: float) -> None:
        while not self._ended.wait(min(1.0, seconds / 4)):
            if time.monotonic() - self._alive_at > seconds:
                self._end(seconds)

    def _end(self, seconds: float) -> None:
        try:
            self._file.parent.mkdir(exist_ok=True)
            with open(self._file, "w") as file:
                faulthandler.dump_traceback(file)
            where = f"where it hangs is in {self._file}"
        except OSError:
            faulthandler.dump_traceback()
            where = "where it hangs is above"
        line = f"mmlg: error: rank {self._rank} has done no step for {seconds:.0f} s (runtime.hang_minutes); {where}."
        print(line, file=sys.stderr, flush=True)
        self._ended.wait(GRACE_SECONDS)
        os._exit(EXIT_HANG)
