"""mmlg launch: start any command on this machine or a cluster, and look after what was started. Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlg_scale.cli.parsing import make_parser, nearest, parse, require_options
from mmlg_scale.errors import UserError
from mmlg_scale.ranges import NonNegativeInt, PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from mmlg_launchers import Resources, SlurmLauncher

RUN_FOLDER_HELP = (
    "Where the job's state and logs are written. Left out: DIR.launch beside the command's --out DIR, or the next of runs/launch/1, 2, ..."
)
PACKAGES = ("mmlg_scale", "mmlg_kernels", "mmlg_launchers")
ON_RANKS = ("train", "extract", "pretrain", "features", "family", "benchmark")
"""Commands that divide their work among ranks; of the others every rank would do the same, and write the same files."""
WITH_RECIPE = ("train", "extract", "pretrain", "features", "family", "plan", "benchmark")


def local(arguments: list[str]) -> int:
    """mmlg launch local."""
    parser = make_parser(
        "launch local",
        "[options] -- COMMAND ...",
        "Run a command of mmlg on several processes of this machine: one for each GPU, or on a CPU one for every few cores.",
        (
            "launch local --num-processes 2 -- train demo --data.path data --out runs/ancestor",
            "launch local --num-processes 8 --run-folder runs/gene.launch -- extract vit-b-32 \\\n"
            "      --ancestor-model weights.safetensors --data.path data --out runs/gene",
        ),
    )
    parser.add_argument("--num-processes", type=PositiveInt, default=1, metavar="N", help="Ranks.")
    parser.add_argument("--run-folder", type=str | None, default=None, metavar="DIR", help=RUN_FOLDER_HELP)
    options, command = _split(arguments)
    args = parse(parser, options)
    _need(command, "mmlg launch local --num-processes 2 -- train demo --data.path DIR --out DIR")
    from mmlg_launchers import LocalLauncher, Resources

    if args.num_processes > 1 and command[0] not in ON_RANKS:
        raise UserError(f"mmlg {command[0]} runs in one process. Leave --num-processes out.")
    launcher = LocalLauncher(stream=True)
    job = launcher.submit(_argv(command), Resources(num_processes=args.num_processes), _run_folder(args, command))
    try:
        job.wait()
    except KeyboardInterrupt:
        job.cancel()
        raise
    return job.exit_code or 0


def slurm(arguments: list[str]) -> int:
    """mmlg launch slurm."""
    parser = make_parser(
        "launch slurm",
        "[options] -- COMMAND ...",
        "Submit a command of mmlg to Slurm: one task for each GPU. mmlg family becomes a graph of jobs that wait for each other, its "
        "descendants arrays; submitted again, only what is not complete runs.",
        (
            "launch slurm --cluster my-site.yaml --nodes 4 --gpus-per-node 8 -- train my-recipe.yaml \\\n"
            "      --data.path data --out runs/ancestor --runtime.zero_stage 2",
            "launch slurm --cluster my-site.yaml --gpus-per-node 1 --array-parallelism 4 -- family my-recipe.yaml \\\n"
            "      --data.path data --out runs/mine",
        ),
    )
    whole = PositiveInt | None
    _add_cluster(parser)
    help_text = "GPUs of each node, and ranks on it. Left out: the cluster file's."
    parser.add_argument("--gpus-per-node", type=NonNegativeInt | None, default=None, metavar="N", help=help_text)
    help_text = "Ranks on each node. Left out: one for each GPU, or one."
    parser.add_argument("--processes-per-node", type=whole, default=None, metavar="N", help=help_text)
    parser.add_argument("--cpus-per-process", type=whole, default=None, metavar="N", help="CPUs of each rank.")
    parser.add_argument("--memory-gib", type=whole, default=None, metavar="N", help="Memory of each node.")
    help_text = "Time limit of each job: minutes, HH:MM:SS or D-HH:MM:SS."
    parser.add_argument("--time", type=str | None, default=None, metavar="T", help=help_text)
    parser.add_argument("--name", type=str | None, default=None, metavar="NAME", help="The job's name in the queue.")
    help_text = "Steps of a family that run side by side in an array. Left out: all."
    parser.add_argument("--array-parallelism", type=whole, default=None, metavar="N", help=help_text)
    help_text = "Look at the nodes first, as mmlg launch check does; a bad one ends the job."
    parser.add_argument("--preflight", action="store_true", help=help_text)
    help_text = "Run from a copy of mmlg's code as it is now, whatever becomes of it while jobs wait."
    parser.add_argument("--snapshot", action="store_true", help=help_text)
    parser.add_argument("--run-folder", type=str | None, default=None, metavar="DIR", help=RUN_FOLDER_HELP)
    parser.add_argument("--dry-run", action="store_true", help="Print the batch scripts and submit nothing.")
    options, command = _split(arguments)
    args = parse(parser, options)
    _need(command, "mmlg launch slurm --nodes 2 --gpus-per-node 8 -- train my-recipe.yaml --data.path DIR --out DIR")
    recipe = _check(command)
    from mmlg_launchers.slurm import require_free

    with launch_errors():
        launcher, resources = _slurm_launcher(args, command)
        if command[0] in WITH_RECIPE and command[0] != "plan" and _out(command) is None:
            raise UserError(f"mmlg {command[0]}: --out is missing. Give the folder of the run.")
        folder = _run_folder(args, command)
        if command[0] == "family":
            return _family(args, arguments, command, recipe, launcher, resources)
        if not args.dry_run:
            require_free(folder)
            _keep_what_runs(args.snapshot, folder, arguments, recipe, launcher)
        return _submit(args, command, _argv(command), launcher, resources, folder)


def _keep_what_runs(copies: bool, folder: Path, arguments: list[str], recipe: str, launcher: SlurmLauncher) -> None:
    """Keep what a run could be made again from: the command, the recipe with all its fields, versions, and the code."""
    from mmlg_launchers import provenance

    provenance.keep(folder, ["mmlg", "launch", "slurm", *arguments], {"recipe.yaml": recipe} if recipe else {}, PACKAGES)
    if copies:
        code = provenance.snapshot(folder.absolute(), PACKAGES)
        launcher.environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(code), os.environ.get("PYTHONPATH"))))


def _add_cluster(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--cluster",
        type=str,
        default="generic",
        metavar="FILE",
        help="The site's YAML file (partition, account, modules, container), or a shipped one: generic, single-node.",
    )
    parser.add_argument("--nodes", type=PositiveInt, default=1, metavar="N", help="Nodes of a job.")


def check(arguments: list[str]) -> int:
    """mmlg launch check."""
    parser = make_parser(
        "launch check",
        "[--cluster FILE] [--nodes N]",
        "Look at nodes of a cluster before days of work are trusted to them: GPUs, memory, disk and clock of each, and an all-reduce over "
        "every pair. Says what is wrong with which node, prints the line that leaves it out, and ends with exit code 1.",
        (
            "launch check --cluster my-site.yaml --nodes 8 --gpus-per-node 8",
            "launch check --cluster my-site.yaml --nodes 2 --gigabytes-per-second 20",
        ),
    )
    _add_cluster(parser)
    help_text = "GPUs that each node should have. Left out: the cluster file's."
    parser.add_argument("--gpus-per-node", type=NonNegativeInt | None, default=None, metavar="N", help=help_text)
    help_text = "What an all-reduce of two nodes should reach; half of it is too little. Left out: the upper quartile of all pairs."
    parser.add_argument("--gigabytes-per-second", type=PositiveFloat | None, default=None, metavar="X", help=help_text)
    parser.add_argument(
        "--run-folder", type=str, default="runs/check.launch", metavar="DIR", help="Where the job's state and logs are written."
    )
    args = parse(parser, arguments)
    from mmlg_launchers import Resources, SlurmLauncher, load_cluster
    from mmlg_launchers.jobs import find_jobs, follow, log_sizes
    from mmlg_launchers.slurm import preflight_argv

    with launch_errors():
        cluster = load_cluster(args.cluster)
        gpus = cluster.gpus_per_node if args.gpus_per_node is None else args.gpus_per_node
        wanted = Resources(num_nodes=args.nodes, gpus_per_node=gpus, time="30")
        folder = Path(args.run_folder)
        launcher = SlurmLauncher(dataclasses.replace(cluster, max_restarts=0), Path.cwd(), name="mmlg-check")
        earlier = log_sizes(folder)
        job = launcher.submit(preflight_argv(wanted, args.gigabytes_per_second), wanted, folder)
        follow(find_jobs(folder), 0, _write, _tell, earlier)
    return 0 if job.exit_code == 0 else 1


def _slurm_launcher(args: Any, command: list[str]) -> tuple[SlurmLauncher, Resources]:
    from mmlg_launchers import Resources, SlurmLauncher, load_cluster
    from mmlg_launchers.cluster import check_time

    cluster = load_cluster(args.cluster)
    gpus = cluster.gpus_per_node if args.gpus_per_node is None else args.gpus_per_node
    if command[0] not in ON_RANKS:
        given = {"nodes": args.nodes, "gpus-per-node": args.gpus_per_node, "processes-per-node": args.processes_per_node}
        if several := next((name for name, number in given.items() if (number or 1) > 1), None):
            raise UserError(f"mmlg {command[0]} runs in one process. Leave --{several} out.")
        gpus = min(gpus, 1)
    time = args.time or cluster.time
    if time is not None:
        check_time(time)
    resources = Resources(
        num_processes=args.processes_per_node or max(1, gpus),
        num_nodes=args.nodes,
        cpus_per_process=args.cpus_per_process or cluster.cpus_per_process,
        gpus_per_node=gpus,
        memory_gib=args.memory_gib or cluster.memory_gib,
        time=time,
    )
    return SlurmLauncher(cluster, Path.cwd(), name=args.name or f"mmlg-{command[0]}", preflight=args.preflight), resources


def _submit(args: Any, command: list[str], argv: list[str], launcher: SlurmLauncher, resources: Resources, folder: Path) -> int:
    """Submit one job, or print its script."""
    from mmlg_launchers.slurm_script import Task

    out = _out(command)
    checkpoints = out / "checkpoints" if out is not None else None
    if args.dry_run:
        print(launcher.script(launcher.batch(launcher.name, [Task(tuple(argv), folder.absolute(), checkpoints)], resources)), end="")
        return 0
    job = launcher.submit(argv, resources, folder, checkpoints=checkpoints)
    nodes = f"{resources.num_nodes} nodes x " if resources.num_nodes > 1 else ""
    ranks = f"{resources.num_processes} rank{'s' if resources.num_processes > 1 else ''}"
    print(f"job {job.id}: {nodes}{ranks}, mmlg {' '.join(command[:2])}")
    _what_next(folder)
    return 0


def _family(args: Any, arguments: list[str], command: list[str], recipe_text: str, launcher: SlurmLauncher, resources: Resources) -> int:
    """Submit the family's graph, or print its scripts. Where torch is not installed, a job does that where it is."""
    from mmlg_scale.cli.runs import parse_family_command

    parsed = parse_family_command(command[1:])
    if parsed is None:
        return 0
    options, recipe, runtime = parsed
    out = Path(options.out)
    try:
        from mmlg_scale.family_jobs import FamilyJobs
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from mmlg_launchers import Resources

        one = Resources(cpus_per_process=resources.cpus_per_process, time=resources.time)
        print("torch is not installed here: the steps are planned, and their jobs submitted, by a job of its own.", file=sys.stderr)
        folder = out.absolute().with_name(f"{out.absolute().name}-plan.launch")
        return _submit(
            args, command, _argv(["launch", "slurm", *(word for word in arguments if word != "--dry-run")]), launcher, one, folder
        )
    jobs = FamilyJobs(recipe, runtime, out, launcher, resources)
    if args.dry_run:
        for name, script in jobs.scripts(args.array_parallelism):
            print(f"# ---- {name}\n{script}")
        return 0
    _keep_what_runs(args.snapshot, _run_folder(args, command), arguments, recipe_text, launcher)
    submitted = jobs.submit(args.array_parallelism)
    for step in submitted.complete:
        print(f"{step}: complete")
    for step, job in submitted.jobs.items():
        print(f"{step}: job {job}")
    _what_next(out)
    return 0


def _what_next(folder: Path) -> None:
    for words in (["status", str(folder)], ["logs", str(folder), "--follow"], ["cancel", str(folder)]):
        print(f"  mmlg launch {shlex.join(words)}")


def status(arguments: list[str]) -> int:
    """mmlg launch status."""
    args = _of_a_folder("status", "", "Show what became of what was launched: each job with its state.", arguments)
    from mmlg_launchers.jobs import find_jobs, in_words

    with launch_errors():
        lines = [(name, job.id, in_words(job)) for name, job in find_jobs(Path(args.DIR))]
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    for name, identifier, state in lines:
        print(f"{name:{widths[0]}}  {identifier:{widths[1]}}  {state}")
    return 0


def logs(arguments: list[str]) -> int:
    """mmlg launch logs."""
    description = "Print what the jobs have printed: the first rank's log of each, or another one's."
    args = _of_a_folder("logs", " [--follow] [--rank N]", description, arguments)
    from mmlg_launchers.jobs import find_jobs, follow

    with launch_errors():
        follow(find_jobs(Path(args.DIR)), args.rank, _write, _tell if args.follow else None)
    return 0


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _tell(line: str) -> None:
    print(f"mmlg: {line}", file=sys.stderr, flush=True)


def cancel(arguments: list[str]) -> int:
    """mmlg launch cancel."""
    args = _of_a_folder("cancel", "", "End what was launched: what waits, and what runs.", arguments)
    from mmlg_launchers.jobs import cancel_jobs, find_jobs

    with launch_errors():
        cancelled = cancel_jobs(find_jobs(Path(args.DIR)))
    print("\n".join(f"{name}: cancelled" for name in cancelled) or "nothing to cancel: every job has ended.")
    return 0


def _of_a_folder(name: str, usage: str, description: str, arguments: list[str]) -> Any:
    """Parse a command about what was launched in a folder."""
    examples = {
        "status": ("launch status runs/ancestor", "launch status runs/mine"),
        "logs": ("launch logs runs/ancestor --follow", "launch logs runs/ancestor.launch --rank 3"),
        "cancel": ("launch cancel runs/ancestor", "launch cancel runs/mine"),
    }
    parser = make_parser(f"launch {name}", f"DIR{usage}", description, examples[name])
    parser.add_argument("DIR", type=str, help="A run's folder, its launch folder, or a family's folder with the jobs of all its steps.")
    if name == "logs":
        parser.add_argument("--follow", action="store_true", help="Print what is added, too, until the jobs have ended.")
        parser.add_argument("--rank", type=NonNegativeInt, default=0, metavar="N", help="Whose log.")
    return parse(parser, arguments)


@contextlib.contextmanager
def launch_errors() -> Iterator[None]:
    """What a launcher cannot do is a mistake, or what the machine refuses: one line."""
    from mmlg_launchers import LaunchError

    try:
        yield
    except LaunchError as error:
        raise UserError(str(error)) from error


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options of the launcher, and the command after --. Raises UserError where a command is there without it."""
    from mmlg_scale.cli.main import COMMANDS

    first = {name.split()[0] for name in COMMANDS}
    found = next((word for word in arguments if word in first), None) if "--" not in arguments else None
    if found is not None:
        raise UserError(f"the command {found} needs -- before it: mmlg launch ... -- {found} ...")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    command = arguments[split + 1 :]
    return arguments[:split], command[1:] if command[:1] == ["mmlg"] else command


def _need(command: list[str], example: str) -> None:
    if not command:
        raise UserError(f"no command after --. Example: {example}.")


def _check(command: list[str]) -> str:
    """Find now what the command would refuse after hours in the queue: a name, an option or a recipe that is wrong.

    Returns:
        The recipe with all its fields, or "" where the command has none.
    """
    from mmlg_scale.cli.main import COMMANDS, run_command

    name = next((known for known in COMMANDS if known.split() == command[: len(known.split())]), None)
    if name is None or name.startswith("launch"):
        raise UserError(f"no command {command[0]!r} to submit.{nearest(command[0], list(COMMANDS))} See mmlg --help.")
    if name in WITH_RECIPE:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run_command([*command, "--print-config"])
        return printed.getvalue()
    with contextlib.redirect_stdout(io.StringIO()):
        require_options(lambda: run_command(command))
    return ""


def _argv(command: list[str]) -> list[str]:
    return [sys.executable, "-m", "mmlg_scale", *command]


def _run_folder(args: Any, command: list[str]) -> Path:
    """The launch folder: beside the folder that the command writes. Where it writes none, one of its own, and so for every launch."""
    if args.run_folder is not None:
        return Path(args.run_folder)
    out = _out(command)
    if out is not None:
        return out.with_name(f"{out.name}.launch")
    folders = (Path("runs/launch") / str(number) for number in itertools.count(1))
    return next(folder for folder in folders if _is_free(folder, take=not getattr(args, "dry_run", False)))


def _is_free(folder: Path, *, take: bool) -> bool:
    """Whether there is nothing at `folder`; made at once where it is to be taken, since another launch may look for one too."""
    if not take:
        return not folder.exists()
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _out(command: list[str]) -> Path | None:
    """The folder that the command writes."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        out = following if word == "--out" else word.removeprefix("--out=") if word.startswith("--out=") else ""
        if out:
            return Path(out).absolute()
    return None
