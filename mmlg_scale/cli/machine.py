"""Commands about where things run: launch, doctor."""

from __future__ import annotations

import sys
from pathlib import Path

from mmlg_scale.cli.parsing import make_parser, parse
from mmlg_scale.errors import UserError
from mmlg_scale.ranges import PositiveInt


def launch_local(arguments: list[str]) -> int:
    """mmlg launch local."""
    if "--" not in arguments:
        arguments = [*arguments, "--"]
    split = arguments.index("--")
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
    parser.add_argument("--run-folder", type=str, default="runs/launch", metavar="DIR", help="Where the job's state and log are written.")
    args = parse(parser, arguments[:split])
    command = arguments[split + 1 :]
    command = command[1:] if command[:1] == ["mmlg"] else command
    if not command:
        raise UserError("no command after --. Example: mmlg launch local --num-processes 2 -- train demo --data.path DIR --out DIR.")
    from mmlg_launchers import LocalLauncher, Resources

    launcher = LocalLauncher(stream=True)
    argv = [sys.executable, "-m", "mmlg_scale", *command]
    job = launcher.submit(argv, Resources(num_processes=args.num_processes), Path(args.run_folder))
    try:
        job.wait()
    except KeyboardInterrupt:
        job.cancel()
        raise
    return job.exit_code or 0


def doctor(arguments: list[str]) -> int:
    """mmlg doctor."""
    parser = make_parser(
        "doctor",
        "[--json]",
        "Check what training needs on this machine: packages, GPU, kernels, communication, memory, disk, Slurm. Each line says what was "
        "found and, where something is wrong, what to do. ok: nothing to do; absent: training works without it; missing: training needs "
        "it, and the exit code is 1.",
        ("doctor", "doctor --json"),
    )
    parser.add_argument("--json", action="store_true", help="Print a list of objects with name, state, found and remedy.")
    options = parse(parser, arguments)
    import contextlib

    from mmlg_scale.doctor import examine, report

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed says things on standard output when it is imported
        findings = examine()
    return report(findings, as_json=options.json)
