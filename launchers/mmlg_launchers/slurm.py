"""Jobs under Slurm: submitted as a batch script (`slurm_script`), followed through what Slurm and the job's own folder say.

Not submitit's executor. It unpickles a function in each rank, under handlers of its own, of which rank 0's requeues the job and exits while
the other ranks still save; and its script ends with srun, so that nothing is left to note how the ranks ended. What is needed here is
less: the argv itself, one process per task.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmlg_launchers.cluster import Cluster
from mmlg_launchers.interface import JobState, LaunchError, Resources
from mmlg_launchers.record import STATE_FILE, read_state, write_state
from mmlg_launchers.slurm_script import BATCH_LOG, EXIT_FILE, RANK_LOG, SRUN_LOG, Batch, Task, batch_script

SCRIPT_FILE = "script.sh"
SECONDS = 60
"""How long one of Slurm's commands may take."""
POLL_SECONDS = 1.0
_PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED")
_ID = re.compile(r"\d+(_\d+)?")
LAST_BYTES = 4096
"""Of a log, in which its last line is looked for."""
_FIRST_FAILED = re.compile(r"^srun: error: .*\btasks? (\d+)[^:]*: (.+)$", re.MULTILINE)
_NO_TASK = str(2**32 - 2)
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class SlurmJob:
    """A job, or a task of an array, that this or another process has submitted; its folder says which."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._record = read_state(folder)
        if not {"job", "num_ranks", "batch_folder", "batch_log"} <= set(self._record) or not _ID.fullmatch(str(self._record["job"])):
            raise LaunchError(f"{folder / STATE_FILE} is no record of a Slurm job.")
        self.id: str = self._record["job"]
        self.reason = ""
        """Why it waits, or how it ended, in Slurm's words; as of the last call of `state`."""

    @property
    def exit_code(self) -> int | None:
        """None until the job has ended, and where it came to no end of its own."""
        try:
            return int((self._folder / EXIT_FILE).read_text())
        except (OSError, ValueError):
            return None

    def state(self) -> JobState:
        shown = _show(self.id)
        # Ids start again at 1 where a cluster is set up again: another job may have this one.
        if shown is not None and str(self._record["batch_folder"]).replace("%", "%%") in shown.replace("%%", "%").replace("%", "%%"):
            word = _value(shown, "JobState")
            self.reason = _value(shown, "Reason") if word in _PENDING else word
            if word in _PENDING:
                return JobState.PENDING
            if word in _RUNNING:
                return JobState.RUNNING
            if word == "CANCELLED":
                return JobState.CANCELLED
            if word == "COMPLETED":
                return JobState.COMPLETED
            if word == "FAILED":
                self.reason = self._failure() or word
            return JobState.FAILED
        return self._ended()

    def _ended(self) -> JobState:
        """What is known of a job that Slurm has forgotten."""
        if self._record.get("cancelled"):
            self.reason = "CANCELLED"
            return JobState.CANCELLED
        code = self.exit_code
        self.reason = _accounted(self.id) or ("ended" if code is not None else "ended without an exit code")
        if code == 0:
            return JobState.COMPLETED
        self.reason = self._failure() or self.reason
        return JobState.FAILED

    def _failure(self) -> str | None:
        """The rank that failed first, and what it printed last, or how it was ended."""
        with contextlib.suppress(OSError):
            found = _FIRST_FAILED.search((self._folder / SRUN_LOG).read_text(errors="replace"))
            if found is None:
                return None
            rank, how = found.groups()
            if not how.startswith("Exited"):
                return f"rank {rank}: {how}"
            with open(self._folder / RANK_LOG.replace("%t", rank), "rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_BYTES))
                lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            return f"rank {rank}: {lines[-1] if lines else how}".replace("mmlg: error: ", "")
        return None

    def wait(self, timeout: float | None = None) -> JobState:
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while not (state := self.state()).is_final and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return state

    def cancel(self) -> None:
        if not self.state().is_final:
            write_state(self._folder, self._record | {"cancelled": time.time()})
            call("scancel", self.id)

    def log_paths(self) -> list[Path]:
        ranks = [self._folder / RANK_LOG.replace("%t", str(rank)) for rank in range(self._record["num_ranks"])]
        return [*ranks, Path(self._record["batch_log"])]


class SlurmLauncher:
    """Submits jobs to the Slurm of this host.

    Args:
        cluster: the site's settings.
        directory: where commands run.
        name: of jobs, in the queue.
        preflight: jobs of several ranks or with GPUs look at their nodes first, see `preflight`.
        environment: variables of all jobs.
    """

    def __init__(
        self,
        cluster: Cluster,
        directory: Path,
        *,
        name: str = "mmlg",
        preflight: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.cluster, self.directory, self.name, self.preflight = cluster, directory.absolute(), name, preflight
        self.environment = dict(environment or {})

    def submit(
        self,
        argv: Sequence[str],
        resources: Resources,
        run_folder: Path,
        env: Mapping[str, str] | None = None,
        *,
        checkpoints: Path | None = None,
    ) -> SlurmJob:
        """Submit one job.

        Args:
            checkpoints: a folder in which something new appears when the command has made progress: a crash after that counts as the first.

        Raises:
            LaunchError: Slurm refuses it (its words), or cannot be reached; or a job of this folder waits or runs.
        """
        batch = self.batch(self.name, [Task(tuple(argv), run_folder.absolute(), checkpoints)], resources, environment=env or {})
        self.submit_batch(batch)
        return SlurmJob(run_folder)

    def batch(
        self,
        name: str,
        tasks: Sequence[Task],
        resources: Resources,
        *,
        folder: Path | None = None,
        needs: Sequence[str] = (),
        max_parallel: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Batch:
        """What `submit_batch` submits; for an array `folder` is where its script and its own logs are written."""
        place = tasks[0].folder if folder is None else folder
        looks = self.preflight and (resources.num_nodes * resources.num_processes > 1 or resources.gpus_per_node > 0)
        preflight = preflight_argv(resources) if looks else ()
        variables = {**self.environment, **(environment or {})}
        found = Batch(name, tuple(tasks), resources, place, self.directory, tuple(needs), max_parallel, variables, preflight)
        for path in (place, self.directory, *(task.folder for task in tasks)):
            if any(ord(letter) < 32 for letter in str(path)):
                raise LaunchError(f"{str(path)!r} has a line break or another control character. Use another folder.")
        return found

    def script(self, batch: Batch) -> str:
        """The batch script."""
        return batch_script(batch, self.cluster, user=getpass.getuser())

    def submit_batch(self, batch: Batch) -> list[str]:
        """Submit a job or an array; returns the id of each of its tasks.

        Raises:
            LaunchError: as for `submit`.
        """
        for task in batch.tasks:
            require_free(task.folder)
        script = self.script(batch)
        for folder in (batch.folder, *(task.folder for task in batch.tasks)):
            folder.mkdir(parents=True, exist_ok=True)
        for task in batch.tasks:
            for name in (EXIT_FILE, "crashes"):
                (task.folder / name).unlink(missing_ok=True)
        answer = call("sbatch", "--parsable", stdin=script)
        number = answer.strip().partition(";")[0]
        if not number.isdigit():
            raise LaunchError(f"sbatch answered {answer.strip()!r} instead of a job's id.")
        is_array = len(batch.tasks) > 1
        with contextlib.suppress(OSError):  # the job is submitted, which the record below has to say
            (batch.folder / SCRIPT_FILE).unlink(missing_ok=True)  # a symbolic link in its place would be followed
            (batch.folder / SCRIPT_FILE).write_text(script)
        ids = []
        for index, task in enumerate(batch.tasks):
            ids.append(f"{number}_{index}" if is_array else number)
            log = f"{Path(BATCH_LOG).stem}-{index}.txt" if is_array else BATCH_LOG
            record = {
                "launcher": "slurm",
                "job": ids[-1],
                "argv": list(task.argv),
                "num_ranks": batch.resources.num_nodes * batch.resources.num_processes,
                "batch_folder": str(batch.folder),
                "batch_log": str(batch.folder / log),
                "submitted": time.time(),
            }
            write_state(task.folder, record)
        return ids


def require_free(folder: Path) -> None:
    """Raise LaunchError where a job of a launch folder waits or runs."""
    busy = active_job(folder)
    if busy is not None:
        raise LaunchError(f"{folder} has job {busy.id}, which has not ended. mmlg launch cancel ends it.")


def preflight_argv(resources: Resources, gigabytes_per_second: float | None = None) -> tuple[str, ...]:
    """The command that looks at a job's nodes, for one process on each."""
    expected = () if gigabytes_per_second is None else (f"--gigabytes-per-second={gigabytes_per_second}",)
    return (sys.executable, "-m", "mmlg_launchers.preflight", f"--gpus={resources.gpus_per_node}", *expected)


def active_job(folder: Path) -> SlurmJob | None:
    """The job of a launch folder, where it waits or runs. Raises LaunchError where Slurm does not answer."""
    try:
        if read_state(folder).get("launcher") != "slurm":
            return None
        job = SlurmJob(folder)
    except LaunchError:
        return None  # nothing was launched, or it is damaged
    return None if job.state().is_final else job


def call(*command: str, stdin: str | None = None) -> str:
    """What one of Slurm's commands prints.

    Raises:
        LaunchError: it is not there, fails or does not answer.
    """
    # What a job sets for itself must not become what another job asks for, nor an outer launcher's ranks.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_")) or name == "SLURM_CONF"}
    for name in _RANKS:
        environment.pop(name, None)
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False)
    except FileNotFoundError as error:
        raise LaunchError(f"there is no {command[0]} on the PATH. Log in to a submit node of the cluster.") from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{command[0]} gave no answer in {SECONDS} s. Ask whether slurmctld runs (scontrol ping).") from error
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise LaunchError(f"{command[0]}: {said[-1].removeprefix(f'{command[0]}: ').removeprefix('error: ').rstrip('.')}.")
    return done.stdout


def _show(identifier: str) -> str | None:
    """What scontrol says of a job; None where Slurm has forgotten it."""
    try:
        return call("scontrol", "--oneliner", "show", "job", identifier)
    except LaunchError as error:
        if not any(said in str(error) for said in ("Invalid job id", "not found")):
            raise
    array, _, index = identifier.partition("_")
    whole = _show(array) if index else None
    # An array that ended before any of its tasks started has one record for all of them.
    return whole if whole is not None and _value(whole, "ArrayTaskId") == _NO_TASK else None


def _value(shown: str, key: str) -> str:
    found = re.search(rf"(?:^| ){key}=(\S+)", shown)
    return found.group(1) if found else ""


def _accounted(identifier: str) -> str | None:
    """The state in Slurm's accounting, where the site keeps one."""
    with contextlib.suppress(LaunchError):
        lines = call("sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={identifier}").split("\n")
        return lines[-2].split()[0] if len(lines) > 1 else None
    return None
