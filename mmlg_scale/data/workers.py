"""Worker processes of torch's loader: how they are started, the shared memory that they need, and their failures in one line."""

from __future__ import annotations

import atexit
import math
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from mmlg_scale.errors import UserError

T = TypeVar("T")

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where the system has it; no file of ours is there)
AHEAD = 2
"""Batches that each worker may have ready."""
TIMEOUT_SECONDS = 600.0
"""How long a batch may take, the start of the workers included."""
_WORKER_BYTES = 2**17
"""Of shared memory for a worker's queues and locks."""
_PAGE = 4096
_OF_THE_RUN = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""Signals that are requests to a run; see `training.signals`."""


def worker_options(num_workers: int) -> dict[str, Any]:
    """Arguments of a DataLoader with `num_workers` processes."""
    if not num_workers:
        return {}
    return {
        "num_workers": num_workers,
        "prefetch_factor": AHEAD,
        "timeout": TIMEOUT_SECONDS,
        # The engine has started threads, which a fork would break.
        "multiprocessing_context": "spawn",
        "worker_init_fn": prepare_worker,
    }


def prepare_worker(worker: int) -> None:
    """Let a worker process end without tearing its interpreter down, and not by a signal that is meant for its run.

    The stream has no end, so a worker is always stopped with batches under way. The thread that sends them is then cut off inside torch's
    C++ code, and now and again that aborts the process, with noise on the console of a run that is well.

    A scheduler, or Ctrl-C, signals every process of a run. Batches are needed until the run has decided what to do, so the first SIGTERM
    does nothing here, and the second, which ends a worker that its run has left, does.
    """
    atexit.register(os._exit, 0)

    def first_only(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, first_only)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_RUN)


def require_shared_memory(num_workers: int, tensor_bytes: list[int]) -> None:
    """Raise UserError where /dev/shm is too small for what the workers of this host's ranks hand over.

    torch finds out in the middle of a run, by a worker that dies or a batch that never comes. Docker's default is 64 MiB.

    Args:
        num_workers: per rank.
        tensor_bytes: size of each tensor of a batch.
    """
    if not num_workers or not SHARED_MEMORY.is_dir():
        return
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    batch = sum(math.ceil(size / _PAGE) * _PAGE for size in tensor_bytes)
    # And one that the training process is still reading.
    needed = num_ranks * ((num_workers * AHEAD + 1) * batch + num_workers * _WORKER_BYTES)
    stat = os.statvfs(SHARED_MEMORY)
    free = stat.f_bavail * stat.f_frsize
    if free < needed:
        wanted = 64 * math.ceil(2 * needed / 2**26)
        ranks = f" on each of {num_ranks} ranks" if num_ranks > 1 else ""
        raise UserError(
            f"{SHARED_MEMORY} has {free / 2**20:.1f} MiB free, {num_workers} loader workers{ranks} need {needed / 2**20:.1f} MiB "
            f"({AHEAD} batches of {batch / 2**20:.1f} MiB each). Start the container with docker run --shm-size={wanted}m, "
            "or set runtime.num_workers 0."
        )


def from_workers(loader: DataLoader[T]) -> Iterator[T]:
    """The loader's items.

    Raises:
        UserError: in one line, what a worker process raised of its own or was refused by the machine; a worker was killed; or no item
            came in time.
    """
    try:
        # What starts now has these signals blocked, until it knows what to do with them; here they only wait.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RUN if loader.num_workers else ())
        try:
            items = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield from items
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        line = _in_words(error)
        if line is None:
            raise
        raise UserError(line) from error


def _in_words(error: Exception) -> str | None:
    said = str(error).strip()
    remedy = f"Memory may have run out, also in {SHARED_MEMORY}: use fewer runtime.num_workers."
    if "DataLoader timed out" in said:
        return f"the loader's workers gave no batch for {TIMEOUT_SECONDS:.0f} s. {remedy}"
    ended = re.search(r"DataLoader worker \(pid\S* (\d+)\) (?:is killed by signal: ([^.]+)\.|exited unexpectedly)", said)
    if ended is not None:
        how = f"was killed ({ended[2]})" if ended[2] else "ended unexpectedly"
        return f"a worker of the loader, process {ended[1]}, {how}. {remedy}"
    if isinstance(error, RuntimeError) or "in DataLoader worker process" not in said:
        return said if isinstance(error, UserError) else None
    # torch gives a traceback in text, the worker's own line being the last.
    return re.sub(r"^[\w.]+: ", "", said.splitlines()[-1])
