"""`python -m tests.training.failing_rank HOW WORDS...` is `mmlg WORDS...` with a rank 1 that fails, or is asked to end."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmlg_scale.cli import main
from mmlg_scale.training import checkpoint, loop, signals


def fail(how: str) -> None:
    """Make this rank fail in its second step, or when it writes its part of a checkpoint."""
    step, write = loop.train_step, checkpoint.write_files

    def failing_step(stage: Any, engine: Any, batch: Any, number: int) -> Any:
        if number == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 1 and how == "internal":
            raise ZeroDivisionError("of this test")
        if number == 1 and how == "asked":
            os.kill(os.getpid(), signal.SIGUSR2)
        return step(stage, engine, batch, number)

    def failing_write(*args: Any) -> Iterator[Path]:
        if how == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        return write(*args)

    loop.train_step = failing_step
    checkpoint.write_files = failing_write


if __name__ == "__main__":
    signals.SECONDS_BETWEEN = 0.0  # these runs are shorter than a second
    if os.environ.get("RANK") == "1":
        fail(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
