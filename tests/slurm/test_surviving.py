"""A run through everything that a cluster does to it, against one that is left alone: the same numbers, nothing lost, nothing repeated."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml
from mmlg_launchers import Cluster, JobState, Resources, SlurmLauncher

from mmlg_scale.cli import main
from mmlg_scale.data.scenes import write_scenes
from tests.slurm.daemons import Daemons
from tests.slurm.test_jobs import until
from tests.test_machine_errors import RECIPE, numbers

STEPS = 400


def steps_of(run: Path) -> int:
    """The last step in metrics.jsonl."""
    with contextlib.suppress(FileNotFoundError, ValueError, IndexError, KeyError):
        return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return 0


class Run:
    """A run of two nodes of one rank, ZeRO-2."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.folder, self._words = folder, words
        self.job = ""

    def submit(self, *options: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main(["launch", "slurm", "--nodes=2", *options, "--", *self._words, "--out", str(self.folder)]) == 0
        self.job = said.getvalue().split()[1].rstrip(":")

    def log(self, name: str = "rank-0.txt") -> str:
        file = self.folder.with_name(f"{self.folder.name}.launch") / name
        return file.read_text() if file.exists() else ""

    def state(self) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main(["launch", "status", str(self.folder)]) == 0
        return said.getvalue().split()[2]

    def progress(self, by: int = 20) -> None:
        """Wait for so many steps from now, in a job that runs."""
        until(lambda: self.state() == "running", 300)
        before = steps_of(self.folder)
        until(lambda: steps_of(self.folder) >= before + by, 300)


def rank_pids(run: Path) -> list[int]:
    """Processes of the run's ranks on this machine."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"python") and os.fsencode(run) in words and b"train" in words and b"launch" not in words:
                found.append(int(entry.name))
    return found


def has_been_sent(pid: int, wanted: signal.Signals) -> bool:
    """Whether a process that is stopped has been sent a signal, or has been let go and ended of it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return any(int(status[name], 16) >> (wanted - 1) & 1 for name in ("SigPnd", "ShdPnd"))


def words_of(root: Path, steps: int) -> list[str]:
    """A training command on data of its own."""
    write_scenes(root / "data", num_train=96, num_val=12, num_test=12, seed=0, image_size=32)
    recipe = root / "recipe.yaml"
    training = {"steps": steps, "batch_size": 16, "eval_every": steps // 2}
    runtime = {"log_every": 1, "checkpoint_every": 10, "zero_stage": 2}
    recipe.write_text(yaml.safe_dump({**RECIPE, "ancestor": training, "runtime": runtime}))
    return ["train", str(recipe), "--data.path", str(root / "data")]


@pytest.mark.slow
def test_a_run_survives_what_a_cluster_does(slurm: Daemons, tmp_path: Path) -> None:
    """SIGUSR2, an urgent job, a rank killed, STOP, scancel, a node lost: each time the run resumes, and it ends as one left alone."""
    words = words_of(tmp_path, STEPS)
    alone = Run(tmp_path / "alone", words)
    run = Run(tmp_path / "run", words)
    run.submit()

    run.progress()
    slurm.call("scancel", "--signal=USR2", run.job)
    until(lambda: "requeued" in run.log(), 120)
    run.progress()
    assert run.state() == "running"

    preemptions = run.log().count("requeued")
    urgent = SlurmLauncher(Cluster(partition="urgent"), tmp_path)
    other = urgent.submit(["sleep", "3"], Resources(2, 2, cpus_per_process=2), tmp_path / "urgent.launch")
    assert other.wait(180) is JobState.COMPLETED
    assert run.log().count("requeued") > preemptions
    run.progress()

    pids = rank_pids(run.folder)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    start = time.monotonic()
    until(lambda: not set(pids) & set(rank_pids(run.folder)), 60)
    assert time.monotonic() - start < 30
    run.progress()

    (run.folder / "STOP").touch()
    until(lambda: run.state() == "failed", 120)
    assert run.log("exit_code").strip() == "76"
    run.submit()
    run.progress()

    assert main(["launch", "cancel", str(run.folder)]) == 0
    until(lambda: run.state() == "cancelled", 60)
    until(lambda: not rank_pids(run.folder), 60)
    assert "stopped by SIGTERM after step" in run.log()
    time.sleep(3)
    assert run.state() == "cancelled"  # not brought back
    run.submit()
    run.progress()

    slurm.lose_node("n2")
    until(lambda: run.state() == "pending", 120)
    slurm.start_node("n2")
    until(lambda: run.state() == "completed", 600)

    alone.submit()
    until(lambda: alone.state() == "completed", 600)
    assert numbers(run.folder) == numbers(alone.folder)


@pytest.mark.slow
def test_a_run_outlives_its_time_limit(slurm: Daemons, tmp_path: Path) -> None:
    """It saves, is requeued, and ends with the numbers of one that had the time. Its ranks are held until Slurm has signalled them."""
    words = words_of(tmp_path, 3 * STEPS)
    alone, run = Run(tmp_path / "alone", words), Run(tmp_path / "run", words)
    run.submit("--time=2")
    run.progress()
    pids = rank_pids(run.folder)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    until(lambda: all(has_been_sent(pid, signal.SIGUSR2) for pid in pids), 150)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    until(lambda: "requeued" in run.log(), 60)
    assert 20 <= steps_of(run.folder) < 3 * STEPS
    until(lambda: run.state() == "completed", 600)
    alone.submit()
    until(lambda: alone.state() == "completed", 600)
    assert numbers(run.folder) == numbers(alone.folder)


@pytest.mark.slow
def test_a_run_moves_to_another_number_of_nodes(slurm: Daemons, tmp_path: Path) -> None:
    """At a low rate, so that hundreds of steps do not magnify what rounding differs by."""
    words = [*words_of(tmp_path, 3 * STEPS), "--ancestor.optimizer.learning_rate=1e-5"]
    alone, run = Run(tmp_path / "alone", words), Run(tmp_path / "run", words)
    for nodes in (2, 1):
        run.submit(f"--nodes={nodes}", "--processes-per-node=2")
        run.progress(50)
        (run.folder / "STOP").touch()
        until(lambda: run.state() == "failed", 120)
    run.submit("--nodes=1", "--processes-per-node=1")
    until(lambda: run.state() == "completed", 600)
    alone.submit()
    until(lambda: alone.state() == "completed", 600)
    found, wanted = (numbers(each.folder)["losses"] for each in (run, alone))
    assert [line[0] for line in found] == [line[0] for line in wanted]
    assert [line[1] for line in found] == pytest.approx([line[1] for line in wanted], abs=1e-4)
