"""How long a rank's computing waits for other ranks: exposed communication.

On a CPU it is the time that the process spends in waiting for collectives that it has started (torch's `Work.wait`), on a GPU the time in
which NCCL's kernels run and no other does. Both include what a rank waits for one that is behind it. Of the frozen ancestor's shards
(`runtime.shard_ancestor`), which torch waits for elsewhere, a CPU counts nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

Interval = tuple[float, float]
NCCL_KERNELS = ("ncclDevKernel", "ncclKernel")
NOT_COMPUTING = ("Memcpy", "Memset", "nccl:")
"""Copies, and the names that torch gives to stretches of a GPU's time."""


@dataclass
class Exposed:
    """What `exposed_communication` has found so far; on a GPU, when it has ended."""

    seconds: float = 0.0


@contextmanager
def exposed_communication(device: torch.device) -> Iterator[Exposed]:
    """Measure it in this process while the context is open. On a GPU by torch's profiler, which slows down what it watches."""
    found = Exposed()
    if device.type != "cuda":
        with _waits_timed(found):
            yield found
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        yield found
        torch.cuda.synchronize(device)
    found.seconds = uncovered(*_kernels(profiler.events() or []))


@contextmanager
def _waits_timed(found: Exposed) -> Iterator[None]:
    work: Any = dist.Work
    wait = work.wait

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return wait(*args, **kwargs)
        finally:
            found.seconds += time.perf_counter() - start

    work.wait = timed
    try:
        yield
    finally:
        work.wait = wait


def _kernels(events: Sequence[Any]) -> tuple[list[Interval], list[Interval]]:
    """When a GPU ran NCCL's kernels, and when others, in seconds."""
    of_nccl: list[Interval] = []
    others: list[Interval] = []
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        times = event.time_range.start / 1e6, event.time_range.end / 1e6
        if event.name.startswith(NCCL_KERNELS):
            of_nccl.append(times)
        elif not event.name.startswith(NOT_COMPUTING):
            others.append(times)
    return of_nccl, others


def uncovered(intervals: Sequence[Interval], by: Sequence[Interval]) -> float:
    """The length of the union of `intervals` less what lies in the union of `by`."""
    edges = [
        (time, kind, step) for kind, given in enumerate((intervals, by)) for pair in given for time, step in zip(pair, (1, -1), strict=True)
    ]
    total, last, depth = 0.0, 0.0, [0, 0]
    for moment, kind, step in sorted(edges):
        if depth[0] and not depth[1]:
            total += moment - last
        last = moment
        depth[kind] += step
    return total
