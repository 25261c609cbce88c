"""The Slurm launcher against real daemons: ranks, rendezvous, words of commands, signals, arrays, graphs, cancelling."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mmlg_launchers import Cluster, JobState, LaunchError, Resources, SlurmLauncher

from tests.slurm.daemons import Daemons

TELL = """
import json, os, signal, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURMD_NODENAME", "OMP_NUM_THREADS")
told = {name: os.environ.get(name) for name in names}
told["argv"] = sys.argv[1:]
told["cwd"] = os.getcwd()
told["USR2 ignored"] = signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
told["TERM default"] = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
print(json.dumps(told), flush=True)
"""


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


@pytest.fixture
def launcher(slurm: Daemons, place: Path) -> SlurmLauncher:
    return SlurmLauncher(Cluster(), place)


def program(place: Path, text: str) -> list[str]:
    file = place / "program.py"
    file.write_text(text)
    return [sys.executable, str(file)]


def test_each_task_is_a_rank_with_the_words_as_they_were_given(launcher: SlurmLauncher, place: Path) -> None:
    words = ["a b", "$HOME", "`id`", "it's", '"', "*", "", "--x=;exit 3", "%j\\"]
    job = launcher.submit([*program(place, TELL), *words], Resources(2, 2, cpus_per_process=1), place / "run.launch")
    assert job.wait(60) is JobState.COMPLETED, (place / "run.launch" / "batch.txt").read_text()
    assert job.exit_code == 0
    *logs, batch = job.log_paths()
    assert [log.name for log in logs] == ["rank-0.txt", "rank-1.txt", "rank-2.txt", "rank-3.txt"]
    told = [json.loads(log.read_text()) for log in logs]
    assert [found["RANK"] for found in told] == ["0", "1", "2", "3"]
    assert [found["LOCAL_RANK"] for found in told] == ["0", "1", "0", "1"]
    assert [found["SLURMD_NODENAME"] for found in told] == ["n1", "n1", "n2", "n2"]
    port = str(10000 + int(job.id) % 20000)
    for found in told:
        assert (found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"], found["OMP_NUM_THREADS"]) == ("4", "2", "1")
        assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("127.0.0.1", port)
        assert found["argv"] == words
        assert found["cwd"] == str(place)
        assert found["USR2 ignored"]
        assert found["TERM default"]
    assert batch.read_text() == ""
