"""Commands and ranks in forks of a server that has the heavy imports behind it and no threads, which do not survive a fork."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.process import BaseProcess
from typing import Any

import torch.multiprocessing

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = ["mmlg_scale.training.run", "deepspeed", "mmlg_kernels", "hypothesis", "pytest"]


def start(output: int, work: Callable[..., int], *args: Any) -> BaseProcess:
    """Start `work`, a function of a module, whose result is the exit code, with the descriptor `output` as its console."""
    _CONTEXT.set_forkserver_preload(_PRELOAD)
    process = _CONTEXT.Process(target=_run, args=(reduction.DupFd(output), work, args))
    process.start()
    return process


def run_ranks(work: Callable[..., None], args: tuple[Any, ...], num_ranks: int) -> None:
    """Run `work(rank, *args)`, a function of a module, in as many processes; raises what one of them raised."""
    _CONTEXT.set_forkserver_preload(_PRELOAD)
    torch.multiprocessing.start_processes(work, args, nprocs=num_ranks, start_method="forkserver")


def _run(output: Any, work: Callable[..., int], args: tuple[Any, ...]) -> None:
    os.setsid()
    descriptor = output.detach()
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    os._exit(work(*args))
