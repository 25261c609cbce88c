"""What another process can learn of a job and do to it, by its folder; and launching where torch cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from mmlg_launchers import JobState, LaunchError, LocalLauncher, Resources
from mmlg_launchers.jobs import cancel_jobs, find_jobs, follow, in_words, log_sizes
from mmlg_launchers.local import LocalJob

from mmlg_scale.cli import main
from tests.launchers.test_local import is_alive, wait_until

SLEEPS = "import time; print('up', flush=True); time.sleep(300)"


def start(code: str, folder: Path, ranks: int = 1, env: Mapping[str, str] | None = None) -> LocalJob:
    return LocalLauncher().submit([sys.executable, "-c", code], Resources(num_processes=ranks), folder, env)


def test_a_run_s_job_is_found_followed_and_cancelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = start(SLEEPS, tmp_path / "run.launch", ranks=2)
    wait_until(lambda: all(log.exists() and log.read_text() == "up\n" for log in job.log_paths()))
    pid = json.loads((tmp_path / "run.launch" / "state.json").read_text())["pid"]
    for folder in (tmp_path / "run", tmp_path / "run.launch"):
        assert main(["launch", "status", str(folder)]) == 0
        assert capsys.readouterr().out == f"run  pid {pid}  running\n"
    assert main(["launch", "logs", str(tmp_path / "run"), "--rank", "1"]) == 0
    assert capsys.readouterr().out == "up\n"
    assert main(["launch", "logs", str(tmp_path / "run"), "--rank", "2"]) == 2
    assert capsys.readouterr().err == "mmlg: error: run has no rank 2.\n"
    assert main(["launch", "cancel", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == "run: cancelled\n"
    assert job.wait(20) is JobState.FAILED  # to its launcher, which did not end it
    wait_until(lambda: not is_alive(pid))
    assert main(["launch", "cancel", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == "nothing to cancel: every job has ended.\n"


def test_the_steps_of_a_graph_are_told_apart(tmp_path: Path) -> None:
    for name, code in (("a", "print('one')"), ("parts/b", "print('two'); raise SystemExit(3)")):
        start(code, tmp_path / f"{name}.launch").wait(60)
    jobs = find_jobs(tmp_path)
    assert [(name, in_words(job)) for name, job in jobs] == [("a", "completed"), ("parts/b", "failed (exit code 3)")]
    written: list[str] = []
    told: list[str] = []
    follow(jobs, 0, written.append, told.append)
    logs = [tmp_path / "a.launch" / "log.txt", tmp_path / "parts" / "b.launch" / "log.txt"]
    assert "".join(written) == f"==> a: {logs[0]} <==\none\n==> parts/b: {logs[1]} <==\ntwo\n"
    assert told == ["a: completed", "parts/b: failed (exit code 3)"]
    assert cancel_jobs(jobs) == []


def test_what_earlier_launches_logged_is_left_out(tmp_path: Path) -> None:
    """A second check of a cluster's nodes must not begin with the first one's findings."""
    folder, written = tmp_path / "check.launch", list[str]()
    assert log_sizes(folder) == {}
    start("print('first')", folder).wait(60)
    earlier = log_sizes(folder)
    start("print('second')", folder).wait(60)
    assert (folder / "log.txt").read_text() == "first\nsecond\n"
    follow(find_jobs(folder), 0, written.append, lambda _: None, earlier)
    assert written == ["second\n"]


def test_following_ends_with_the_job(tmp_path: Path) -> None:
    script = "import sys; from mmlg_scale.cli import main; sys.exit(main(sys.argv[1:]))"
    code = (
        "import sys\nfrom pathlib import Path\nfrom mmlg_launchers import LocalLauncher, Resources\n"
        "argv = [sys.executable, '-c', \"import time; print('first', flush=True); time.sleep(1.5); print('last')\"]\n"
        f"LocalLauncher().submit(argv, Resources(), Path({str(tmp_path / 'other.launch')!r})).wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code]):
        wait_until((tmp_path / "other.launch" / "state.json").exists)
        words = ["launch", "logs", "--follow", str(tmp_path / "other")]
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "first\nlast\n"
    assert done.stderr.splitlines() == ["mmlg: other: running", "mmlg: other: completed"]


def test_a_process_that_was_given_the_number_since_is_left_alone(tmp_path: Path) -> None:
    job = start("pass", tmp_path / "run.launch")
    job.wait(60)
    file = tmp_path / "run.launch" / "state.json"
    record = json.loads(file.read_text())
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True) as other:
        file.write_text(json.dumps(record | {"state": "running", "pid": other.pid, "exit_code": None}))
        ((_, found),) = find_jobs(tmp_path / "run")
        assert in_words(found) == "failed (its launcher was killed)"
        assert cancel_jobs([("run", found)]) == []
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "nothing was launched"),
        ("{", "cannot be read"),
        ("[]", "no record of a launch"),
        ('{"launcher": "local", "pid": 1}', "no record of a local job"),
        ('{"launcher": "slurm", "job": "1; id", "num_ranks": 1, "batch_folder": "", "batch_log": ""}', "no record of a Slurm job"),
    ],
)
def test_a_record_that_is_none_is_one_line(text: str | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.launch").mkdir()
    if text is not None:
        (tmp_path / "run.launch" / "state.json").write_text(text)
    with pytest.raises(LaunchError, match=said):
        find_jobs(tmp_path / "run")


def test_jobs_side_by_side_have_different_gpus(tmp_path: Path) -> None:
    """Four GPUs, of which this machine need have none: what jobs are told."""
    launcher = LocalLauncher(gpus=("0", "1", "GPU-2", "3"))
    shows = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(300)"

    def submit(name: str, ranks: int) -> LocalJob:
        return launcher.submit([sys.executable, "-c", shows], Resources(num_processes=ranks), tmp_path / name)

    def told(job: LocalJob) -> str:
        wait_until(job.log_paths()[0].read_text)
        return job.log_paths()[0].read_text().strip()

    jobs = [submit("a", 2), submit("b", 1)]
    assert [told(job) for job in jobs] == ["0,1", "GPU-2"]
    jobs[0].cancel()
    jobs += [submit("c", 2), submit("d", 2)]  # one more than there are: the last shares with the two that came first
    assert [told(job) for job in jobs[2:]] == ["0,1", "3,0"]
    for job in jobs:
        job.cancel()


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing torch fails, as where it is not installed."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch' or name.startswith('torch.'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    return os.environ | {"PYTHONPATH": f"{tmp_path / 'hidden'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


@pytest.mark.parametrize("command", ["train", "family"])
def test_submitting_needs_no_torch(command: str, without_torch: dict[str, str], tmp_path: Path) -> None:
    hidden = subprocess.run([sys.executable, "-c", "import torch"], env=without_torch, capture_output=True, text=True, check=False)
    assert "No module named 'torch'" in hidden.stderr
    words = ["launch", "slurm", "--nodes=2", "--gpus-per-node=4", "--dry-run", "--", command, "demo", "--out", str(tmp_path / "run")]
    argv = [sys.executable, "-m", "mmlg_scale", *words]
    done = subprocess.run(argv, env=without_torch, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    if command == "train":
        assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=4\n" in done.stdout
        assert done.stderr == ""
        assert f"\nset -- {sys.executable} -m mmlg_scale train demo --out {tmp_path / 'run'}\n" in done.stdout
    else:  # a job of one process, with torch, plans and submits
        assert "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=1\n" in done.stdout
        assert done.stderr.startswith("torch is not installed here: the steps are planned")
        assert f" launch slurm --nodes=2 --gpus-per-node=4 -- family demo --out {tmp_path / 'run'}\n" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "trian", "demo"], "no command 'trian' to submit. Did you mean 'train'? See mmlg --help."),
        (["--", "launch", "local"], "no command 'launch' to submit."),
        (["--", "train", "demo", "--ancestor.steps", "x"], "ancestor.steps: 'x' does not fit."),
        (["--time", "soon", "--", "train", "demo"], "time: 'soon' is no time limit."),
        (["--cluster", "nowhere", "--", "train", "demo"], "no cluster file 'nowhere'."),
        ([], "no command after --."),
    ],
)
def test_a_mistake_is_found_before_the_queue(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "slurm", "--dry-run", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"mmlg: error: {said}")
    assert printed.err.count("\n") == 1


def test_a_command_of_one_process_gets_one_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On eight of them eight processes would do the same on the first."""
    site = tmp_path / "site.yaml"
    site.write_text("gpus_per_node: 8\n")
    for command, tasks in ((["train", "demo", "--out", str(tmp_path / "run")], 8), (["eval", "m", "--data", "d"], 1)):
        assert main(["launch", "slurm", "--dry-run", "--cluster", str(site), "--", *command]) == 0
        script = capsys.readouterr().out
        assert f"#SBATCH --nodes=1\n#SBATCH --ntasks-per-node={tasks}\n" in script
        assert f"--gpus-per-node={tasks}\n" in script


def test_commands_that_write_no_folder_get_one_for_every_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        assert main(["launch", "local", "--", "recipe"]) == 0
        state = json.loads((tmp_path / "runs" / "launch" / str(number) / "state.json").read_text())
        assert (state["argv"][-1], state["state"]) == ("recipe", "completed")
    assert main(["launch", "slurm", "--dry-run", "--", "recipe"]) == 0
    assert sorted(path.name for path in (tmp_path / "runs" / "launch").iterdir()) == ["1", "2"]


def test_where_there_is_no_slurm_that_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "slurm", "--", "train", "demo", "--out", "run"]) == 2
    assert capsys.readouterr().err == "mmlg: error: there is no sbatch on the PATH. Log in to a submit node of the cluster.\n"
