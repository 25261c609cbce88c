"""mmlg doctor."""

from __future__ import annotations

import sys

from mmlg_scale.cli.parsing import make_parser, parse


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
