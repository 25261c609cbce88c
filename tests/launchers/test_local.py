"""The local launcher with real processes: ranks, exit codes, cancelling, and the end of the parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mmlg_launchers import JobState, LocalLauncher, Resources

SLEEPER = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True); time.sleep(300)"


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def test_two_ranks_reduce(tmp_path: Path) -> None:
    script = tmp_path / "reduce.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.tensor([float(dist.get_rank() + 1)])\n"
        "dist.all_reduce(x)\n"
        # One write: the pieces of a print with several arguments mix with the other rank's where output is unbuffered.
        "print(f'sum {x.item()}\\n', end='', flush=True)\n"
        "dist.destroy_process_group()\n"
    )
    job = LocalLauncher().submit([sys.executable, str(script)], Resources(num_processes=2), tmp_path / "run")
    assert job.wait(timeout=120) is JobState.COMPLETED
    assert [log.name for log in job.log_paths()] == ["log.txt", "rank-1.txt"]
    assert [log.read_text() for log in job.log_paths()] == ["sum 3.0\n"] * 2


def test_exit_code_and_state_file(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("import sys; print('leaving'); sys.exit(3)")
    job = LocalLauncher().submit([sys.executable, "-m", "leaves"], Resources(), tmp_path / "run", env={"PYTHONPATH": str(tmp_path)})
    assert job.wait(timeout=60) is JobState.FAILED
    assert job.exit_code == 3
    assert job.log_paths()[0].read_text() == "leaving\n"
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["state"], state["exit_code"]) == ("failed", 3)
    assert state["ended"] >= state["started"]


def test_a_fork_runs_the_module_with_its_arguments(tmp_path: Path) -> None:
    """json.tool copies a file: the argv, the log and the exit code of a preloaded job are the module's own."""
    source = tmp_path / "in.json"
    source.write_text('{"b": 1}')
    launcher = LocalLauncher(preload=("json.tool",))
    argv = [sys.executable, "-m", "json.tool", "--compact", str(source)]
    job = launcher.submit(argv, Resources(), tmp_path / "good")
    assert job.wait(timeout=60) is JobState.COMPLETED
    assert job.log_paths()[0].read_text().endswith('{"b":1}\n')
    bad = launcher.submit([sys.executable, "-m", "json.tool", str(tmp_path / "missing")], Resources(), tmp_path / "bad")
    assert bad.wait(timeout=60) is JobState.FAILED
    assert bad.exit_code not in (0, None)
    assert "No such file" in bad.log_paths()[0].read_text()


def test_cancel_ends_grandchildren(tmp_path: Path) -> None:
    job = LocalLauncher().submit([sys.executable, "-c", SLEEPER], Resources(), tmp_path / "run")
    log = job.log_paths()[0]
    wait_until(lambda: log.read_text().strip().isdigit())
    grandchild = int(log.read_text())
    assert is_alive(grandchild)
    job.cancel()
    assert job.state() is JobState.CANCELLED
    wait_until(lambda: not is_alive(grandchild))
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "cancelled"


@pytest.mark.parametrize("preload", ["", "json"])
def test_jobs_end_with_a_killed_parent(preload: str, tmp_path: Path) -> None:
    """A launcher process ended by SIGKILL leaves no job that keeps writing."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from mmlg_launchers import LocalLauncher, Resources\n"
        "if __name__ == '__main__':\n"
        f"    launcher = LocalLauncher(preload=[m for m in [{preload!r}] if m])\n"
        "    argv = [sys.executable, '-m', 'http.server', '--bind', '127.0.0.1', '0']\n"
        f"    job = launcher.submit(argv, Resources(), Path({str(tmp_path)!r}) / 'run')\n"
        "    print(job._process.pid, flush=True)\n"
        "    time.sleep(300)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    wait_until(lambda: is_alive(child))
    log = tmp_path / "run" / "log.txt"
    wait_until(log.exists)
    time.sleep(0.5)  # past the child's own set-up
    assert is_alive(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not is_alive(child))


def test_ranks_end_with_a_killed_parent(tmp_path: Path) -> None:
    """Not only the supervisor: each of its ranks."""
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, time\n"
        f"open(os.path.join({str(tmp_path)!r}, 'pid' + os.environ['RANK']), 'w').write(str(os.getpid()))\n"
        "time.sleep(300)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from mmlg_launchers import LocalLauncher, Resources\n"
        f"job = LocalLauncher().submit([sys.executable, {str(rank)!r}], Resources(num_processes=2), Path({str(tmp_path)!r}) / 'run')\n"
        "job.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files), seconds=60)
    ranks = [int(file.read_text()) for file in files]
    assert all(is_alive(pid) for pid in ranks)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in ranks))


def test_more_than_one_node_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one node"):
        LocalLauncher().submit(["true"], Resources(num_nodes=2), tmp_path)
