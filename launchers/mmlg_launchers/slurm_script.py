"""The batch script of a job, an array or a step of a graph: a pure function of what is to run, where, and on what."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmlg_launchers.cluster import Cluster
from mmlg_launchers.interface import EXIT_REQUEUE, EXIT_STOPPED, Resources

RANK_LOG = "rank-%t.txt"
"""A rank's log in the job's folder; Slurm fills in the rank."""
BATCH_LOG = "batch.txt"
"""What the batch script and Slurm itself have to say."""
SRUN_LOG = "srun.txt"
"""What srun has to say of the ranks."""
EXIT_FILE = "exit_code"
"""The job's exit code, which outlives Slurm's memory of the job."""

# What each task runs. The signal to save must not end a rank that has no handler for it yet: what is ignored here stays ignored until the
# program asks for it.
_TASK = """trap "" USR2
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_WORLD_SIZE={per_node}
exec "$@\""""
_TASK_ALONE = """trap "" USR2
exec "$@\""""

# The address that Slurm itself uses for the first node, which need not be its name. The port lies below those that outgoing connections
# are given; another start of the same job takes another one, which nothing of an earlier start can still hold.
_RENDEZVOUS = """first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
export MASTER_ADDR="${address:-$first}"
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 20000))"""


# Ranks report their ends to srun, whose own exit code is the highest: also that of a rank which it ended because another had failed.
# What has saved and asks for it (75) is started again, where it has not seen to that itself. So is a crash, but only so many times without
# progress; what is complete, a mistake (2), stopped (76) or ended from outside (130, 143) is not.
_END = """cat -- "$folder"/srun.txt
first=$(sed -n 's/^srun: error: .*tasks\\{{0,1\\}} [0-9,-]*: //p' "$folder"/srun.txt | head -n 1)
case "$first" in
"") ;;
"Exited with exit code "*) code=${{first##* }} ;;
Killed*) code=137 ;;
Terminated*) code=143 ;;
*) code=1 ;;
esac
again=
case "$code" in
0 | 2 | {stopped} | 130 | 143) ;;
{requeue}) again=1 ;;
*)
  crashes="$folder"/crashes
  if [ -n "$(find "$checkpoints" -mindepth 1 -maxdepth 1 -name 'step-*' -newer "$crashes" 2>/dev/null)" ]; then rm -f -- "$crashes"; fi
  echo "exit code $code at $(date)" >> "$crashes"
  if [ "$(wc -l < "$crashes")" -le {restarts} ]; then again=1; fi ;;
esac
if [ -n "$again" ] && [ -z "$told" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
printf '%s\\n' "$code" > "$folder"/exit_code
exit "$code\""""


@dataclass(frozen=True)
class Task:
    """A command, and the folder for its logs."""

    argv: tuple[str, ...]
    folder: Path
    checkpoints: Path | None = None
    """A folder in which another step-* appears when the command has made progress; None: nobody can see that it has."""


@dataclass(frozen=True)
class Batch:
    """What one sbatch submits: a job, or with several tasks an array of them."""

    name: str
    tasks: tuple[Task, ...]
    resources: Resources
    folder: Path
    """Of the batch script and its own log; of a single task the task's."""
    directory: Path
    """Where the commands run."""
    needs: tuple[str, ...] = ()
    """Jobs that must have ended with exit code 0 before this starts."""
    max_parallel: int | None = None
    """Tasks of an array that run side by side; None: all."""
    environment: Mapping[str, str] = field(default_factory=dict)
    preflight: tuple[str, ...] = ()
    """A command that one process on each node runs first: where it fails, the job ends."""


def batch_script(batch: Batch, cluster: Cluster, *, user: str) -> str:
    """The text for sbatch.

    Words of commands, paths and values are quoted for the shell; the only text that a shell interprets is `cluster.unsafe_shell_setup`.

    Args:
        user: fills in {user} in the cluster's folders.
    """
    sections = [
        ["#!/bin/bash", *(f"#SBATCH --{option}" for option in _options(batch, cluster))],
        # Slurm tells the ranks to end or to save; this script waits for them, and says how they ended.
        ["trap '' USR2", "told=; trap 'told=1' TERM"],
        list(_environment(batch, cluster, user)),
        list(cluster.unsafe_shell_setup),
        list(_what(batch, cluster)),
        [_RENDEZVOUS] if _num_ranks(batch.resources) > 1 else [],
        _preflight(batch, cluster) if batch.preflight else [],
        [
            'rm -f -- "$folder"/exit_code "$folder"/srun.txt',
            f'srun {_srun(batch, cluster)} "$@" 2> "$folder"/srun.txt &',
            "wait $!; code=$?",
            "while kill -0 $! 2>/dev/null; do wait $!; code=$?; done  # a signal ended wait, not the ranks",
            _END.format(restarts=cluster.max_restarts, requeue=EXIT_REQUEUE, stopped=EXIT_STOPPED),
        ],
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _num_ranks(resources: Resources) -> int:
    return resources.num_nodes * resources.num_processes


def _options(batch: Batch, cluster: Cluster) -> Iterator[str]:
    """sbatch's options. It splits such lines into words as a shell does."""
    wanted, is_array = batch.resources, len(batch.tasks) > 1
    log = batch.folder / (f"{Path(BATCH_LOG).stem}-%a.txt" if is_array else BATCH_LOG)
    yield f"job-name={shlex.quote(batch.name)}"
    yield f"nodes={wanted.num_nodes}"
    yield f"ntasks-per-node={wanted.num_processes}"
    if wanted.cpus_per_process is not None:
        yield f"cpus-per-task={wanted.cpus_per_process}"
    if wanted.gpus_per_node:
        yield "gpus-per-node=" + shlex.quote(
            f"{cluster.gpu_type}:{wanted.gpus_per_node}" if cluster.gpu_type else str(wanted.gpus_per_node)
        )
    if wanted.memory_gib is not None:
        yield f"mem={wanted.memory_gib}G"
    if wanted.time is not None:
        yield f"time={wanted.time}"
    for key in ("partition", "account", "qos", "constraint"):
        value = getattr(cluster, key)
        if value is not None:
            yield f"{key}={shlex.quote(value)}"
    if cluster.exclude:
        yield f"exclude={shlex.quote(','.join(cluster.exclude))}"
    for key, value in cluster.sbatch.items():
        yield f"{key}={shlex.quote(value)}"
    if is_array:
        yield f"array=0-{len(batch.tasks) - 1}{f'%{batch.max_parallel}' if batch.max_parallel is not None else ''}"
    if batch.needs:
        yield f"dependency=afterok:{':'.join(batch.needs)}"
        yield "kill-on-invalid-dep=yes"
    yield f"signal=USR2@{cluster.signal_seconds}"
    yield "requeue"
    yield "open-mode=append"
    yield f"chdir={shlex.quote(str(batch.directory))}"
    yield f"output={shlex.quote(_pattern(log.parent) + '/' + log.name)}"


def _pattern(path: Path) -> str:
    """A path in a file name pattern of Slurm's."""
    return str(path).replace("%", "%%")


def _environment(batch: Batch, cluster: Cluster, user: str) -> Iterator[str]:
    if cluster.modules:
        yield f"module load {shlex.join(cluster.modules)}"
    variables = {
        "OMP_NUM_THREADS": str(batch.resources.cpus_per_process or 1),
        **cluster.environment,
        **{f"NCCL_{key}": value for key, value in cluster.nccl.items()},
        **batch.environment,
    }
    for name, value in variables.items():
        yield f"export {name}={shlex.quote(value)}"
    folders = {}
    if cluster.scratch is not None:
        folders["TMPDIR"] = _folder(cluster.scratch, user)
    if cluster.cache is not None:
        cache = _folder(cluster.cache, user)
        folders["XDG_CACHE_HOME"] = cache
        folders |= {name: f"{cache}/{part}" for name, part in (("HF_HOME", "huggingface"), ("TRITON_CACHE_DIR", "triton"))}
        folders["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/inductor"
    for name, folder in folders.items():
        yield f"export {name}={folder}"
    if folders:
        yield f"srun --ntasks-per-node=1 --ntasks={batch.resources.num_nodes} mkdir -p -- " + " ".join(f'"${name}"' for name in folders)


def _folder(template: str, user: str) -> str:
    """A folder of the cluster's, quoted, with the user and the job's id filled in."""
    return '"$SLURM_JOB_ID"'.join(shlex.quote(part) if part else "" for part in template.replace("{user}", user).split("{job_id}"))


def _what(batch: Batch, cluster: Cluster) -> Iterator[str]:
    """Set the arguments to the command, and `folder` to its folder."""

    def chosen(task: Task) -> tuple[str, str]:
        checkpoints = "" if task.checkpoints is None else shlex.quote(str(task.checkpoints))
        return f"folder={shlex.quote(str(task.folder))} checkpoints={checkpoints}", f"set -- {shlex.join(_argv(task, cluster))}"

    if len(batch.tasks) == 1:
        yield from chosen(batch.tasks[0])
        return
    yield 'case "$SLURM_ARRAY_TASK_ID" in'
    for number, task in enumerate(batch.tasks):
        folder, command = chosen(task)
        yield f"{number})"
        yield f"  {folder}"
        yield f"  {command} ;;"
    yield "esac"


def _argv(task: Task, cluster: Cluster) -> list[str]:
    """The command, with the cluster's interpreter in place of the one that submits."""
    first, *others = task.argv
    return [cluster.python or first, *others]


def _preflight(batch: Batch, cluster: Cluster) -> list[str]:
    one = replace(batch, resources=replace(batch.resources, num_processes=1))
    command = shlex.join(_argv(Task(batch.preflight, batch.folder), cluster))
    return [
        "# The nodes are looked at first. What was found is in preflight.txt.",
        f"if ! srun {_srun(one, cluster, log='preflight.txt')} {command}; then",
        f"  printf '1\\n' > \"$folder\"/{EXIT_FILE}",
        "  exit 1",
        "fi",
    ]


def _srun(batch: Batch, cluster: Cluster, log: str = RANK_LOG) -> str:
    """srun's options, and what each task runs before the command's words."""
    wanted = batch.resources
    words = [
        "--kill-on-bad-exit=1",
        f"--nodes={wanted.num_nodes}",
        f"--ntasks-per-node={wanted.num_processes}",
        f"--ntasks={_num_ranks(wanted)}",
        *([f"--cpus-per-task={wanted.cpus_per_process}"] if wanted.cpus_per_process is not None else []),  # not taken over from sbatch
        "--open-mode=append",
    ]
    inside: list[str] = []
    if cluster.pyxis is not None:
        words.append(f"--container-image={cluster.pyxis.image}")
        if cluster.pyxis.mounts:
            words.append(f"--container-mounts={','.join(cluster.pyxis.mounts)}")
    if cluster.apptainer is not None:
        mounts = [word for mount in cluster.apptainer.mounts for word in ("--bind", mount)]
        inside = ["apptainer", "exec", *(["--nv"] if wanted.gpus_per_node else []), *mounts, cluster.apptainer.image]
    task = _TASK.format(per_node=wanted.num_processes) if _num_ranks(wanted) > 1 else _TASK_ALONE
    output = f'--output="${{folder//%/%%}}"/{log}'
    return f"{shlex.join(words)} {output} {shlex.join([*inside, 'sh', '-c', task, 'mmlg'])}"
