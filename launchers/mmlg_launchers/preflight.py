"""Looks at the nodes of a job before days of work are trusted to them: `python -m mmlg_launchers.preflight`, one process on each node.

Each node counts its GPUs, its memory and how fast its disk writes; all-reduces with every other node, pair by pair; and tells the time.
The first rank prints a table, what is wrong with which node, and the line that leaves these nodes out; the exit code is then 1. A node
that does not come or does not answer is waited for a bounded time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from statistics import median
from typing import Any, NoReturn

MEGABYTES = 32
"""Size of what is reduced and written."""
REPEATS = 4
LEAST_SHARE = 0.5
"""Of what the others reach: a node or a pair below it is called slow."""
WAITS = 5
"""How often the time for one connection or all-reduce is waited in all."""
MOST_SKEW = 1.0
"""Seconds between clocks: file times and logs of several nodes are compared."""


@dataclass
class Report:
    """What a node found of itself."""

    node: str
    gpus: int = 0
    memory_gib: float = 0.0
    disk: float = 0.0
    """MB per second that its folder for temporary files takes."""
    clock: float = 0.0
    """Seconds since 1970, read by all nodes at the same moment."""
    rates: dict[int, float] = field(default_factory=dict)
    """Gigabytes per second of an all-reduce with another rank; 0: it failed."""
    error: str = ""


def rounds(number: int) -> list[list[tuple[int, int]]]:
    """Every pair of `number` ranks once, in rounds in which no rank has two partners (the circle method)."""
    ranks: list[int | None] = list(range(number))
    if number % 2:
        ranks.append(None)
    found = []
    for _ in range(len(ranks) - 1):
        pairs = zip(ranks[: len(ranks) // 2], reversed(ranks[len(ranks) // 2 :]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        ranks = [ranks[0], ranks[-1], *ranks[1:-1]]
    return found


def judge(
    reports: Sequence[Report | None], names: Sequence[str], gpus: int, gigabytes_per_second: float | None = None
) -> dict[str, list[str]]:
    """What is wrong with which node.

    Args:
        reports: by rank; None: the node gave no answer.
        gpus: how many each node should have.
        gigabytes_per_second: what an all-reduce of two nodes should reach; None: the upper quartile of all pairs.
    """
    wrong: dict[str, list[str]] = {name: [] for name in names}
    there = {rank: report for rank, report in enumerate(reports) if report is not None}
    for rank, name in enumerate(names):
        if rank not in there:
            wrong[name].append("gave no answer")
    if not there:
        return wrong
    middle = {key: median(getattr(report, key) for report in there.values()) for key in ("memory_gib", "disk", "clock")}
    rates = sorted(rate for report in there.values() for rate in report.rates.values())
    # The upper quartile: one bad node of four is in half of the pairs.
    usual = gigabytes_per_second or (rates[3 * len(rates) // 4] if rates else 0.0)
    for rank, report in there.items():
        said = wrong[names[rank]]
        if report.error and len(there) == len(reports):  # else it follows from the absence of the others
            said.append(report.error)
        if report.gpus != gpus:
            said.append(f"has {report.gpus} GPUs instead of {gpus}")
        for key, unit in (("memory_gib", "GiB of memory"), ("disk", "MB/s to its disk")):
            value = getattr(report, key)
            if value < LEAST_SHARE * middle[key]:
                said.append(f"has {value:.0f} {unit}, others {middle[key]:.0f}")
        if abs(report.clock - middle["clock"]) > MOST_SKEW:
            said.append(f"its clock is off by {report.clock - middle['clock']:+.1f} s")
        slow = sorted(names[other] for other, rate in report.rates.items() if other in there and (rate == 0 or rate < LEAST_SHARE * usual))
        # Of a slow pair it is the node that is slow with most others too; of two nodes nobody can tell.
        if slow and len(slow) >= len(report.rates) / 2:
            said.append(f"fails or is slow with {', '.join(slow)} (expected: {usual:.2f} GB/s)")
    return {name: said for name, said in wrong.items() if said}


def table(reports: Sequence[Report | None], names: Sequence[str]) -> list[str]:
    """The nodes in columns."""
    lines = [f"{'node':16} {'GPUs':>5} {'memory GiB':>11} {'disk MB/s':>10} {'all-reduce GB/s, least and most':>32}"]
    for name, report in zip(names, reports, strict=True):
        if report is None:
            lines.append(f"{name:16} {'-':>5} {'-':>11} {'-':>10} {'-':>32}")
            continue
        rates = f"{min(report.rates.values()):.2f} {max(report.rates.values()):.2f}" if report.rates else "-"
        lines.append(f"{name:16} {report.gpus:>5} {report.memory_gib:>11.1f} {report.disk:>10.0f} {rates:>32}")
    return lines


def _examine(report: Report) -> None:
    """Count and measure what needs no other node."""
    import torch

    report.gpus = torch.cuda.device_count()
    report.memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    block = os.urandom(2**20)
    with tempfile.TemporaryFile() as file:
        start = time.perf_counter()
        for _ in range(MEGABYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        report.disk = MEGABYTES * 2**20 / 1e6 / (time.perf_counter() - start)


def _reduce_pairs(report: Report, rank: int, number: int, seconds: float) -> None:
    """All-reduce with every other rank."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    for pairs in rounds(number):
        pair = next((pair for pair in pairs if rank in pair), None)
        if pair is None:
            continue
        other = pair[0] if pair[1] == rank else pair[1]
        report.rates[other] = 0.0
        with contextlib.suppress(RuntimeError):  # a pair that fails is one of rate 0
            group = dist.new_group(list(pair), timeout=timedelta(seconds=seconds), use_local_synchronization=True)
            report.rates[other] = _rate(group, torch.ones(MEGABYTES * 2**20 // 4, device=device))


def _rate(group: Any, values: Any) -> float:
    """Gigabytes per second of an all-reduce of ones in a group of two; 0 where their sum is wrong."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(values, group=group)
    if not bool((values == 2).all()):
        return 0.0
    start = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(values, group=group)
    if values.is_cuda:
        torch.cuda.synchronize()
    return REPEATS * values.numel() * values.element_size() / 1e9 / (time.perf_counter() - start)


def _own_port(port: int) -> int:
    """Another port than MASTER_PORT, which the job that follows at once is given, and than the next job's, which is one more."""
    if 10_000 <= port < 30_000:  # as the batch script chooses it
        return 10_000 + port % 20_000
    return port + 1 if port else 0


def run(args: argparse.Namespace, environment: Mapping[str, str], say: Callable[[str], None]) -> NoReturn:
    """Examine this node with the others; the first rank says what was found. Ends the process."""
    import torch
    import torch.distributed as dist

    rank, number = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    host, port = environment.get("MASTER_ADDR", "127.0.0.1"), int(environment.get("MASTER_PORT", "0"))
    report = Report(environment.get("SLURMD_NODENAME", platform.node()))
    wait = timedelta(seconds=args.seconds)
    store = dist.TCPStore(host, _own_port(port), number, is_master=rank == 0, timeout=wait, wait_for_workers=False)
    store.set(f"name-{rank}", report.node)
    try:
        _examine(report)
        if number > 1:
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=number, timeout=wait)
            dist.barrier()
        report.clock = time.time()
        _reduce_pairs(report, rank, number, args.seconds)
    except Exception as error:
        report.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    store.set(f"report-{rank}", json.dumps(asdict(report)))
    code = 0
    if rank == 0:
        code = _conclude(store, number, args, say)
        store.set("over", "")
    else:
        with contextlib.suppress(RuntimeError):
            store.wait(["over"], timedelta(seconds=WAITS * args.seconds))  # the store ends with the first rank
    sys.stdout.flush()
    os._exit(code)  # threads of a collective that hangs are not waited for


def _conclude(store: Any, number: int, args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Gather the reports and say what they come to."""
    reports: list[Report | None] = []
    names = _node_names(number)
    end = time.monotonic() + (WAITS - 1) * args.seconds  # for all together
    for rank in range(number):
        try:
            store.wait([f"report-{rank}"], timedelta(seconds=max(1.0, end - time.monotonic())))
            content = json.loads(store.get(f"report-{rank}"))
        except RuntimeError:
            reports.append(None)
            continue
        content["rates"] = {int(other): rate for other, rate in content["rates"].items()}
        reports.append(Report(**content))
        names[rank] = reports[-1].node if reports[-1] is not None else names[rank]
    for line in table(reports, names):
        say(line)
    wrong = judge(reports, names, args.gpus, args.gigabytes_per_second)
    for name, said in wrong.items():
        say(f"{name}: {'; '.join(said)}")
    if wrong:
        say(f"leave out: --exclude={','.join(wrong)} (in the cluster file, exclude: [{', '.join(wrong)}])")
    else:
        say(f"{number} node{'s' if number > 1 else ''}: nothing wrong.")
    return 1 if wrong else 0


def _node_names(number: int) -> list[str]:
    """The job's nodes in the order of its ranks, one rank on each."""
    names = os.environ.get("SLURM_JOB_NODELIST", "")
    if not names:
        return [f"rank {rank}" for rank in range(number)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["scontrol", "show", "hostnames", names]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
        if len(found) == number:
            return found
    return [f"rank {rank}" for rank in range(number)]


def main() -> NoReturn:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m mmlg_launchers.preflight")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--gigabytes-per-second", type=float, default=None)
    parser.add_argument("--seconds", type=float, default=60.0)
    run(parser.parse_args(), os.environ, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
