"""The Slurm launcher against real daemons: ranks, rendezvous, words of commands, signals, arrays, graphs, cancelling."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mmlg_launchers import Cluster, JobState, LaunchError, Resources, SlurmLauncher, Step
from mmlg_launchers.jobs import cancel_jobs, find_jobs, in_words
from mmlg_launchers.slurm_graph import plan_graph, submit_graph

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
    return SlurmLauncher(Cluster(max_restarts=0), place)


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


SAVES = """
import os, signal, sys, time
from pathlib import Path
def note(number, frame):
    with open(f"signals-{os.environ['RANK']}", "a") as file:
        file.write(signal.Signals(number).name + "\\n")
    if number == signal.SIGTERM:
        time.sleep(3.5)  # it saves, within KillWait
        with open(f"signals-{os.environ['RANK']}", "a") as file:
            file.write("saved\\n")
        sys.exit(0)
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, note)
Path(f"ready-{os.environ['RANK']}").touch()
time.sleep(100)
time.sleep(100)
"""


def test_ranks_can_save_when_told_to_and_when_cancelled(launcher: SlurmLauncher, slurm: Daemons, place: Path) -> None:
    job = launcher.submit(program(place, SAVES), Resources(1, 2), place / "run.launch")
    until(lambda: (place / "ready-0").exists() and (place / "ready-1").exists())
    assert job.state() is JobState.RUNNING
    with pytest.raises(LaunchError, match=f"has job {job.id}, which has not ended"):
        launcher.submit(["true"], Resources(), place / "run.launch")
    slurm.call("scancel", "--signal=USR2", job.id)
    until(lambda: (place / "signals-0").exists() and (place / "signals-1").exists())
    ((name, found),) = find_jobs(place / "run")
    assert (name, found.id) == ("run", job.id)
    assert cancel_jobs([(name, found)]) == ["run"]
    assert job.wait(30) is JobState.CANCELLED
    for rank in (0, 1):
        assert (place / f"signals-{rank}").read_text().split() == ["SIGUSR2", "SIGTERM", "saved"]
    until(lambda: job.exit_code is not None, 10)
    assert cancel_jobs([(name, found)]) == []


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("print('too bad'); sys.exit(7)", 7, "rank 1: too bad"), ("os.kill(os.getpid(), 9)", 137, "rank 1: Killed")],
)
def test_a_rank_that_fails_ends_the_others(how: str, code: int, said: str, launcher: SlurmLauncher, place: Path) -> None:
    argv = program(place, f"import os, sys, time\nif os.environ['RANK'] == '1': {how}\ntime.sleep(300)")
    job = launcher.submit(argv, Resources(1, 2), place / "run.launch")
    assert job.wait(60) is JobState.FAILED
    assert job.exit_code == code
    assert in_words(job) == f"failed (exit code {code}, {said})"
    assert (place / "run.launch" / "crashes").read_text().startswith(f"exit code {code} at ")


AGAIN = """
import os, subprocess, sys
print(os.environ["MASTER_PORT"], os.environ.get("SLURM_RESTART_COUNT", "0"), flush=True)
if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    if os.environ["RANK"] == "0" and "itself" in sys.argv:
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    sys.exit(75)
"""


@pytest.mark.parametrize("who", [pytest.param("itself", marks=pytest.mark.slow), "the script"])
def test_a_job_that_asks_for_it_starts_again_at_another_port(who: str, launcher: SlurmLauncher, place: Path) -> None:
    """Once, whether its ranks have put it back into the queue themselves or could not, as in a container without scontrol."""
    job = launcher.submit([*program(place, AGAIN), who], Resources(2, 1), place / "run.launch")
    assert job.wait(90) is JobState.COMPLETED
    first = int(job.id)
    assert job.log_paths()[1].read_text() == f"{10000 + first} 0\n{10000 + first + 1009} 1\n"


def test_a_graph_goes_to_its_end_and_submitted_again_runs_what_is_left(launcher: SlurmLauncher, place: Path) -> None:
    argv = program(
        place,
        "import sys, time\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n"
        "if folder.name == 'i2' and not Path('mended').exists(): sys.exit(3)\n"
        "folder.mkdir(parents=True, exist_ok=True)\n(folder / 'done').write_text(str(time.time()))",
    )

    def step(name: str, *needs: str) -> Step:
        folder = place / "graph" / name
        return Step(name.rpartition("/")[2], (*argv, str(folder)), Resources(), needs, folder / "done")

    steps = [step("first"), *(step(f"parts/i{n}", "first") for n in (1, 2, 3)), step("last", "i1", "i2", "i3")]

    def submit() -> dict[str, str]:
        planned = plan_graph(steps, lambda step, needs_complete: needs_complete and step.marker.exists())
        return submit_graph(planned, launcher, place / "graph", max_parallel=2)

    def ended() -> dict[str, JobState]:
        found = dict(find_jobs(place / "graph"))
        until(lambda: all(job.state().is_final for job in found.values()))
        return {name: job.state() for name, job in found.items()}

    jobs = submit()
    assert set(jobs) == {"first", "i1", "i2", "i3", "last"}
    array = jobs["i1"].partition("_")[0]
    assert [jobs[f"i{n}"] for n in (1, 2, 3)] == [f"{array}_0", f"{array}_1", f"{array}_2"]
    assert submit() == jobs  # all are under way
    done = dict.fromkeys(("first", "parts/i1", "parts/i3"), JobState.COMPLETED)
    assert ended() == {**done, "parts/i2": JobState.FAILED, "last": JobState.CANCELLED}
    (place / "mended").touch()
    again = submit()
    assert set(again) == {"i2", "last"}
    assert ended() == {**done, "parts/i2": JobState.COMPLETED, "last": JobState.COMPLETED}
    times = [float((step.marker).read_text()) for step in steps]
    assert times[0] < min(times[1:4])
    assert max(times[1:4]) < times[4]
    assert submit() == {}


def test_what_slurm_refuses_is_one_line(slurm: Daemons, place: Path) -> None:
    with pytest.raises(LaunchError, match=r"sbatch: .*partition") as raised:
        SlurmLauncher(Cluster(partition="nowhere"), place).submit(["true"], Resources(), place / "run.launch")
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_ranks_are_told_before_the_time_limit(launcher: SlurmLauncher, place: Path) -> None:
    """The least lead is 90 s, of two minutes: every rank is told after half a minute."""
    job = launcher.submit(program(place, SAVES), Resources(2, 1, time="2"), place / "run.launch")
    until(lambda: (place / "ready-0").exists() and (place / "ready-1").exists())
    start = time.monotonic()
    until(lambda: (place / "signals-0").exists() and (place / "signals-1").exists(), 100)
    assert time.monotonic() - start < 75  # Slurm looks twice a minute
    assert job.state() is JobState.RUNNING
    assert {(place / f"signals-{rank}").read_text() for rank in (0, 1)} == {"SIGUSR2\n"}
    job.cancel()
    assert job.wait(30) is JobState.CANCELLED


AWAY = """
import os, signal, sys, time
from pathlib import Path
def save(number, frame):
    print(signal.Signals(number).name, flush=True)
    sys.exit(75)
signal.signal(signal.SIGUSR2, save)
print("start", os.environ.get("SLURM_RESTART_COUNT", "0"), flush=True)
if Path("end").exists():
    sys.exit(0)
Path(f"ready-{os.environ['RANK']}").touch()
time.sleep(300)
"""


@pytest.mark.slow
def test_a_preempted_job_is_told_and_comes_back(slurm: Daemons, launcher: SlurmLauncher, place: Path) -> None:
    job = launcher.submit(program(place, AWAY), Resources(2, 2, cpus_per_process=2), place / "run.launch")
    until(lambda: all((place / f"ready-{rank}").exists() for rank in range(4)))
    (place / "end").touch()
    urgent = SlurmLauncher(Cluster(partition="urgent"), place)
    other = urgent.submit(["sleep", "3"], Resources(2, 2, cpus_per_process=2), place / "urgent.launch")
    assert other.wait(120) is JobState.COMPLETED
    assert job.wait(120) is JobState.COMPLETED
    for log in job.log_paths()[:4]:
        own = [line for line in log.read_text().splitlines() if not line.startswith("slurmstepd")]  # Slurm may say that it ended a step
        assert " ".join(own).split() == ["start", "0", "SIGUSR2", "start", "1"]


@pytest.mark.slow
def test_a_job_outlives_a_node(slurm: Daemons, launcher: SlurmLauncher, place: Path) -> None:
    job = launcher.submit(program(place, AWAY), Resources(1, 2), place / "run.launch")
    until(lambda: all((place / f"ready-{rank}").exists() for rank in range(2)))
    (place / "end").touch()
    slurm.lose_node("n2")
    until(lambda: job.state() is JobState.PENDING, 120)
    slurm.start_node("n2")
    assert job.wait(180) is JobState.COMPLETED
    assert job.log_paths()[1].read_text().split() == ["start", "0", "start", "1"]
    assert not (place / "run.launch" / "crashes").exists()


CRASHES = """
import os, sys
from pathlib import Path
number = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
print(number, flush=True)
if number == 1:
    Path("checkpoints/step-1").mkdir(parents=True)
if number == 3:
    Path("checkpoints/.step-2").mkdir()
sys.exit(1)
"""


@pytest.mark.slow
def test_crashes_without_progress_are_counted(slurm: Daemons, place: Path) -> None:
    """One restart is allowed. The second start makes progress, so that a third and a fourth follow; a half written checkpoint is none."""
    launcher = SlurmLauncher(Cluster(max_restarts=1), place)
    job = launcher.submit(program(place, CRASHES), Resources(), place / "run.launch", checkpoints=place / "checkpoints")
    assert job.wait(180) is JobState.FAILED
    assert job.exit_code == 1
    assert job.log_paths()[0].read_text().split() == ["0", "1", "2"]
