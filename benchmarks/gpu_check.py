"""Run the GPU tests and all kernels' benchmarks, one after the other, within nine minutes.

    python -m benchmarks.gpu_check                         # JSON, plots and logs under benchmarks/results
    python -m benchmarks.gpu_check --out DIR --only tests block_transfer

A check that fails or runs past its limit does not stop the others: benchmarks leave the JSON of the sizes that they have measured. At the
end a table, `gpu_check.json` with the GPU's name and each check's status, seconds and last lines, and the tests' `gpu_tests.xml` (JUnit).
Exit status 0 when all passed, 1 when one did not, 2 without a GPU. Needs torch, triton and pytest; what else is missing is left out and
named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import measure

TOTAL_SECONDS = 520.0
GRACE_SECONDS = 10.0
"""Between asking a step to end, so that it can write its report, and killing it."""
LAST_LINES = 40


@dataclass(frozen=True)
class Check:
    """A command and its limit."""

    name: str
    argv: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    """What became of a command. Status: passed, failed, over its limit, or not started."""

    name: str
    status: str
    seconds: float
    last_lines: list[str]


def all_checks(out: Path) -> list[Check]:
    """The tests, then one benchmark per question, the most wanted first."""

    def benchmark(module: str, *options: str) -> tuple[str, ...]:
        return (sys.executable, "-m", f"benchmarks.{module}", *options, "--out", str(out))

    cuda = ("--device", "cuda")
    tests = ("-m", "pytest", "-m", "gpu", "tests/gpu", "--tb=short", f"--junitxml={out / 'gpu_tests.xml'}", "-o", "junit_family=xunit2")
    return [
        Check("tests", (sys.executable, *tests), 190),
        Check("contrastive_loss", benchmark("contrastive_loss", *cuda), 150),
        Check("block_transfer", benchmark("block_transfer", *cuda), 80),
        Check("distillation_loss", benchmark("distillation_loss", *cuda), 90),
        Check("sigmoid_loss", benchmark("contrastive_loss", *cuda, "--kind", "sigmoid", "--width", "768", "--pairs", "16384", "65536"), 60),
        # Last, since it compiles for minutes: each kernel's fastest tile, for later runs. What is over the limit is missing from the table.
        Check("tiles", (sys.executable, "-m", "mmlg_kernels.tuning", "--out", str(out)), 120),
    ]


def run_checks(checks: Sequence[Check], out: Path, total_s: float) -> list[Outcome]:
    """Each command in a process group of its own, its output in `out/NAME.log`; what the total leaves no time for is not started."""
    # A job started in the background ignores it, and so would what it starts: a check over its limit could then not write its report.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    deadline, outcomes = time.monotonic() + total_s, []
    for check in checks:
        left = deadline - time.monotonic()
        outcomes.append(_run(check, out, min(check.limit_s, left)) if left > 0 else Outcome(check.name, "not started", 0.0, []))
        print(f"{check.name}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
    return outcomes


def _run(check: Check, out: Path, limit_s: float) -> Outcome:
    print(f"{check.name} (at most {limit_s:.0f} s): {' '.join(check.argv)}", flush=True)
    start, log = time.monotonic(), out / f"{check.name}.log"
    with log.open("w") as sink:
        process = subprocess.Popen(check.argv, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = "passed" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "over its limit"
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        finally:
            # Compilers' workers too, also when this process is interrupted.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(check.name, status, time.monotonic() - start, log.read_text(errors="replace").splitlines()[-LAST_LINES:])


def write_results(outcomes: Sequence[Outcome], out: Path, device: str) -> int:
    """`gpu_check.json`, what benchmarks printed, and the exit status."""
    content = {"environment": measure.environment(device), "checks": [asdict(outcome) for outcome in outcomes]}
    (out / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n")
    for outcome in outcomes:
        if outcome.status != "not started":
            print(f"\n== {outcome.name}: {outcome.status}, {outcome.seconds:.0f} s", *outcome.last_lines, sep="\n")
    print("\n| check | status | seconds |\n|---|---|---|")
    for outcome in outcomes:
        print(f"| {outcome.name} | {outcome.status} | {outcome.seconds:.0f} |")
    return int(any(outcome.status != "passed" for outcome in outcomes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    names = [check.name for check in all_checks(Path())]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CHECK", help=", ".join(names))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA GPU here; `make test` runs the kernels in Triton's interpreter instead", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes = run_checks([check for check in all_checks(args.out) if check.name in args.only], args.out, TOTAL_SECONDS)
    return write_results(outcomes, args.out, "cuda")


if __name__ == "__main__":
    sys.exit(main())
