"""Several ranks under the supervisor: one line for a failure, the rank that failed, and nothing left behind. No rank here imports torch."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from mmlg_launchers import JobState, LocalLauncher, Resources, Step, StepFailed, interface, run_graph
from mmlg_launchers.local import LocalJob
from rich.console import Console

from mmlg_scale import errors

REPORTS = """
import os, sys, time
from mmlg_launchers.supervise import failure_pipe, report_failure
rank, pipe = int(os.environ["RANK"]), failure_pipe()
assert "MMLG_ERROR_FD" not in os.environ
"""
"""How a rank begins that says why it fails."""


def submit(folder: Path, script: str, ranks: int = 2) -> LocalJob:
    file = folder / "rank.py"
    file.write_text(script)
    return LocalLauncher().submit([sys.executable, str(file)], Resources(num_processes=ranks), folder / "run")


def said(job: LocalJob) -> str:
    return job.log_paths()[0].read_text()


def marked(mark: str) -> list[int]:
    """Processes with `mark` in their environment, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if mark.encode() in (entry / "environ").read_bytes() and (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_what_all_ranks_say_is_said_once(tmp_path: Path) -> None:
    job = submit(tmp_path, REPORTS + "report_failure(pipe, 'no data in x. Give another.', kind='user'); sys.exit(2)")
    assert job.wait(60) is JobState.FAILED
    assert job.exit_code == 2
    assert said(job) == "mmlg: error: no data in x. Give another.\n"


@pytest.mark.parametrize("culprit", [0, 1])
def test_one_rank_says_more_than_those_that_fail_because_of_it(culprit: int, tmp_path: Path) -> None:
    """A rank without a connection ends sooner than the one that closed it: the latter's account counts all the same."""
    script = f"""{REPORTS}
if rank == {culprit}:
    time.sleep(0.3)
    report_failure(pipe, "/out: the disk is full.", kind="user")
    sys.exit(2)
report_failure(pipe, "RuntimeError: connection closed", kind="follows", details="Traceback ...")
sys.exit(1)
"""
    job = submit(tmp_path, script)
    job.wait(60)
    assert job.exit_code == 2
    assert said(job) == f"mmlg: error: rank {culprit}: /out: the disk is full.\n"


def test_the_traceback_of_the_rank_that_failed_is_in_the_folder(tmp_path: Path) -> None:
    script = f"""{REPORTS}
if rank == 1:
    report_failure(pipe, "ValueError: x", kind="internal", details="Traceback " + "y" * 100_000)
    sys.exit(1)
time.sleep(0.5)
report_failure(pipe, "RuntimeError: another", kind="internal", details="Traceback z")
sys.exit(1)
"""
    job = submit(tmp_path, script)
    job.wait(60)
    assert job.exit_code == 1
    kept = tmp_path / "run" / "traceback-rank-1.txt"
    assert said(job) == f"mmlg: error: rank 1: ValueError: x. Traceback: {kept}.\n"
    assert kept.read_text().endswith("yyy")


def test_a_killed_rank_is_named_and_the_others_end(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    script = "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(300)"
    (tmp_path / "rank.py").write_text(script)
    started = time.monotonic()
    job = LocalLauncher().submit(
        [sys.executable, str(tmp_path / "rank.py")], Resources(num_processes=3), tmp_path / "run", env={"MARK": mark}
    )
    job.wait(60)
    assert job.exit_code == 128 + signal.SIGKILL
    assert said(job) == "mmlg: error: rank 1 was ended by SIGKILL (the kernel sends it when memory runs out).\n"
    assert time.monotonic() - started < 15
    assert not marked(mark)


def test_a_program_that_says_nothing_is_quoted_from_its_log(tmp_path: Path) -> None:
    job = submit(tmp_path, "import os, sys, time\nif os.environ['RANK'] == '1': print('last words'); sys.exit(3)\ntime.sleep(300)")
    job.wait(60)
    assert job.exit_code == 3
    assert said(job) == "mmlg: error: rank 1 failed (exit code 3): last words\n"


def test_a_program_that_is_not_there_is_a_line(tmp_path: Path) -> None:
    for ranks in (1, 2):
        job = LocalLauncher().submit(["/nowhere/program"], Resources(num_processes=ranks), tmp_path / str(ranks))
        job.wait(60)
        assert job.exit_code == 2
        assert said(job) == "mmlg: error: /nowhere/program cannot be started: No such file or directory.\n"


def test_a_graph_quotes_the_rank_that_failed(tmp_path: Path) -> None:
    """And, of a step of one process, what killed it."""
    file = tmp_path / "rank.py"
    file.write_text(
        "import os, signal\nif os.environ.get('WORLD_SIZE') != '2' or os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)"
    )
    for ranks, who in ((2, "rank 1"), (1, "the process")):
        marker = tmp_path / str(ranks) / "gene" / "result.json"
        step = Step("gene", (sys.executable, str(file)), Resources(num_processes=ranks), (), marker)
        with pytest.raises(StepFailed) as error:
            run_graph([step], LocalLauncher(), parallel=1, console=Console(file=open(os.devnull, "w")))  # noqa: SIM115
        log = marker.parent.parent / "gene.launch" / "log.txt"
        assert str(error.value) == (
            f"step gene failed (exit code 137): {who} was ended by SIGKILL (the kernel sends it when memory runs out). Log: {log}."
        )


def test_a_graph_says_what_killed_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "killed.py").write_text("import os, signal; print('first words', flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    step = Step("gene", (sys.executable, "-m", "killed"), Resources(), (), tmp_path / "gene" / "result.json")
    monkeypatch.syspath_prepend(tmp_path)  # the server hands this process's path on to its forks
    console = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    with pytest.raises(StepFailed) as error:
        run_graph([step], LocalLauncher(preload=("json",)), parallel=1, console=console)
    assert "gene failed (exit code -9): it was ended by SIGKILL (the kernel" in str(error.value)


def test_a_request_reaches_every_rank_and_is_no_error(tmp_path: Path) -> None:
    script = """
import pathlib, signal
asked = []
signal.signal(signal.SIGUSR2, lambda *_: asked.append(1))
pathlib.Path(__file__).with_name(f"listens-{rank}").touch()
while not asked:
    time.sleep(0.02)
report_failure(pipe, "stopped by SIGUSR2; start the same command again.", kind="stopped")
sys.exit(75)
"""
    job = submit(tmp_path, REPORTS + script)
    wait_until(lambda: len(list(tmp_path.glob("listens-*"))) == 2)
    os.kill(job._process.pid, signal.SIGUSR2)
    assert job.wait(60) is JobState.FAILED
    assert job.exit_code == 75
    assert said(job) == "mmlg: stopped by SIGUSR2; start the same command again.\n"


def test_a_request_before_ranks_listen_ends_nobody(tmp_path: Path) -> None:
    script = """
import pathlib
pathlib.Path(__file__).with_name(f"there-{rank}").touch()
while not pathlib.Path(__file__).with_name("end").exists():
    time.sleep(0.02)
"""
    job = submit(tmp_path, REPORTS + script)
    wait_until(lambda: len(list(tmp_path.glob("there-*"))) == 2)
    os.kill(job._process.pid, signal.SIGUSR2)
    time.sleep(0.3)
    (tmp_path / "end").touch()
    assert job.wait(60) is JobState.COMPLETED


def test_exit_codes_are_those_that_runs_use() -> None:
    assert (interface.EXIT_REQUEUE, interface.EXIT_STOPPED) == (errors.EXIT_REQUEUE, errors.EXIT_STOPPED)


def test_cancel_lets_ranks_end_by_themselves(tmp_path: Path) -> None:
    """SIGTERM reaches each of them, and the supervisor waits for what they do about it."""
    script = f"""
import os, signal, sys, time
def save(*_):
    time.sleep(1)
    open(os.path.join({str(tmp_path)!r}, "saved" + os.environ["RANK"]), "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
open(os.path.join({str(tmp_path)!r}, "ready" + os.environ["RANK"]), "w").close()
time.sleep(300)
"""
    job = submit(tmp_path, script)
    wait_until(lambda: len(list(tmp_path.glob("ready*"))) == 2)
    job.cancel()
    assert job.state() is JobState.CANCELLED
    assert {path.name for path in tmp_path.glob("saved*")} == {"saved0", "saved1"}


LAUNCHER = """
import os, sys, time
from pathlib import Path
from mmlg_launchers import LocalLauncher, Resources
if __name__ == "__main__":
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    launcher = LocalLauncher(preload=("json", "sqlite3", "asyncio") if ranks == 1 else ())
    argv = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "0"]
    launcher.submit(argv, Resources(num_processes=ranks), folder).wait()
"""
"""With one rank the job is a fork of a server."""


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_launcher_killed_at_ten_instants_of_its_start_leaves_no_process(ranks: int, tmp_path: Path) -> None:
    """Spread over the time that the start takes here, each with a chance in it."""
    draw = random.Random(ranks)
    (tmp_path / "launcher.py").write_text(LAUNCHER)

    def start(name: str, mark: str) -> subprocess.Popen[bytes]:
        argv = [sys.executable, str(tmp_path / "launcher.py"), str(tmp_path / name), str(ranks)]
        return subprocess.Popen(argv, env={**os.environ, "MARK": mark}, stderr=subprocess.DEVNULL)

    def killed(launcher: subprocess.Popen[bytes], mark: str) -> None:
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        wait_until(lambda: not marked(mark), seconds=5)

    mark, began = uuid.uuid4().hex, time.monotonic()
    whole = start("whole", mark)
    # The launcher; a supervisor and two ranks, or a server with its tracker and a fork.
    wait_until(lambda: len(marked(mark)) == 4)
    took = time.monotonic() - began
    killed(whole, mark)
    seen = set()
    for instant in range(10):
        mark = uuid.uuid4().hex
        launcher = start(str(instant), mark)
        time.sleep(took * (instant + draw.random()) / 8)  # the last two after the start
        seen.add(len(marked(mark)))
        killed(launcher, mark)
    assert len(seen) > 1  # not all at one point of the start


def test_processes_of_a_rank_end_with_the_launcher(tmp_path: Path) -> None:
    """A rank's own children, as loader workers are, whose parent the kernel does not signal."""
    mark = uuid.uuid4().hex
    script = tmp_path / "launcher.py"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(300)'])"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom mmlg_launchers import LocalLauncher, Resources\n"
        f"LocalLauncher().submit([sys.executable, '-c', {child!r}], Resources(num_processes=2), Path({str(tmp_path)!r}) / 'run').wait()"
    )
    launcher = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "MARK": mark})
    wait_until(lambda: len(marked(mark)) == 6)  # launcher, supervisor, two ranks with a child each
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    wait_until(lambda: not marked(mark), seconds=5)


def test_a_job_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    """The kernel's signal for a parent's death is sent when the thread ends that started the child: the supervisor does not ask for it."""
    import threading

    jobs: list[LocalJob] = []
    thread = threading.Thread(target=lambda: jobs.append(submit(tmp_path, "import time; time.sleep(1); print('done')", ranks=1)))
    thread.start()
    thread.join()
    assert jobs[0].wait(60) is JobState.COMPLETED
    assert said(jobs[0]) == "done\n"
