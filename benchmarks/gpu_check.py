"""Run the GPU tests and the benchmarks in two calls of at most nine minutes each.

    python -m benchmarks.gpu_check --part 1                # correctness, on up to 8 workers, and the fastest tiles
    python -m benchmarks.gpu_check --part 2                # benchmarks with those tiles, training steps among them
    python -m benchmarks.gpu_check --part 2 --out DIR --only throughput

A check that fails or runs past its limit does not stop the others: benchmarks leave the JSON of the sizes that they have measured. Each
call prints a table and leaves three files: `gpu_check_PART.json` with the GPU's name and each check's status, seconds and last lines,
`gpu_check_PART.tar.gz` with all that the checks wrote (JSON, plots, logs, the tests' JUnit file), and after part 1 the table of tiles,
`tiles-GPU.json`. The first two are written anew after every check; with --only their names end in the checks', so that they replace no
others. Part 2 reads the table from --out, from benchmarks/results or the user's cache, and its JSON says which one; without one the
kernels have their fixed tiles. Exit status 0 when all passed, 1 when one did not, 2 without a GPU. Needs torch, triton and pytest; what
else is missing is left out and named.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from mmlg_kernels.tiles import read_table, table_path

from benchmarks import measure

RESULTS = Path(__file__).with_name("results")
TOTAL_SECONDS = 480.0
GRACE_SECONDS = 10.0
"""Between asking a step to end, so that it can write its report, and killing it."""
LAST_LINES = 40


@dataclass(frozen=True)
class Check:
    """A command and its limit."""

    name: str
    argv: tuple[str, ...]
    limit_s: float
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a command. Status: passed, failed, over its limit, not started, or what it needs and is not installed."""

    name: str
    status: str
    seconds: float
    last_lines: list[str]


def all_checks(part: int, out: Path) -> list[Check]:
    """Part 1: the tests and the tiles. Part 2: one benchmark per question, the most wanted first."""

    def benchmark(module: str, *options: str) -> tuple[str, ...]:
        return (sys.executable, "-m", f"benchmarks.{module}", *options, "--out", str(out))

    cuda = ("--device", "cuda")
    if part == 1:
        tests = (
            "-m",
            "pytest",
            "-m",
            "gpu",
            "tests/gpu",
            "--tb=short",
            f"--junitxml={out / 'gpu_tests.xml'}",
            "-o",
            "junit_family=xunit2",
            "--confcutdir=tests/gpu",
        )
        workers = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
        return [
            Check("tests", (sys.executable, *tests, *workers), 270),
            # It compiles for minutes. What is over the limit is missing from the table.
            Check("tiles", (sys.executable, "-m", "mmlg_kernels.tuning", "--out", str(out)), 200),
        ]
    sigmoid = ("--kind", "sigmoid", "--width", "768", "--pairs", "16384", "65536")
    steps = ("--models", "ViT-B-16", "--precision", "bf16", "--batch-size", "256", "--steps", "10", "--pairs", "5", "--step-alone")
    return [
        Check("throughput", benchmark("throughput", *steps), 150, ("open_clip", "deepspeed", "webdataset")),
        Check("contrastive_loss", benchmark("contrastive_loss", *cuda), 100),
        Check("block_transfer", benchmark("block_transfer", *cuda), 60),
        Check("distillation_loss", benchmark("distillation_loss", *cuda), 60),
        Check("sigmoid_loss", benchmark("contrastive_loss", *cuda, *sigmoid), 50),
        # Apart, since an illegal access of theirs would end what is in the same process.
        Check("rivals", benchmark("contrastive_loss", *cuda, "--rivals"), 50),
    ]


def run_checks(checks: Sequence[Check], out: Path, total_s: float, keep: Callable[[list[Outcome]], None] = lambda _: None) -> list[Outcome]:
    """Each command in a process group of its own, its output in `out/NAME.log`; what the total leaves no time for is not started.

    Args:
        keep: is given the outcomes so far after every check: a machine that is taken away takes no more than the one under way.
    """
    # A job started in the background ignores it, and so would what it starts: a check over its limit could then not write its report.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    deadline, outcomes = time.monotonic() + total_s, []
    for check in checks:
        left, missing = deadline - time.monotonic(), [name for name in check.needs if importlib.util.find_spec(name) is None]
        if missing:
            outcomes.append(Outcome(check.name, f"needs {', '.join(missing)}", 0.0, []))
        else:
            outcomes.append(_run(check, out, min(check.limit_s, left)) if left > 0 else Outcome(check.name, "not started", 0.0, []))
        print(f"{check.name}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
        keep(outcomes)
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
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)  # one that hangs in the driver cannot be killed
    return Outcome(check.name, status, time.monotonic() - start, log.read_text(errors="replace").splitlines()[-LAST_LINES:])


def write_results(outcomes: Sequence[Outcome], found: Path, out: Path, name: str, environment: measure.Row) -> None:
    """`NAME.json`, all files of the folder `found` in one archive, and the table of tiles."""
    content = {"environment": environment, "checks": [asdict(outcome) for outcome in outcomes]}
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    with tarfile.open(out / f"{name}.tar.gz", "w:gz") as archive:
        for path in sorted(found.iterdir()):
            archive.add(path, path.name)
            if path.match("tiles-*.json"):
                (out / path.name).write_bytes(path.read_bytes())


def show(outcomes: Sequence[Outcome]) -> int:
    """Print what the checks printed, and a table; the exit status."""
    for outcome in outcomes:
        if outcome.last_lines:
            print(f"\n== {outcome.name}: {outcome.status}, {outcome.seconds:.0f} s", *outcome.last_lines, sep="\n")
    print("\n| check | status | seconds |\n|---|---|---|")
    for outcome in outcomes:
        print(f"| {outcome.name} | {outcome.status} | {outcome.seconds:.0f} |")
    return int(any(outcome.status != "passed" for outcome in outcomes))


def tuned_tiles(out: Path, gpu: str) -> Path | None:
    """The table of tiles that part 2 uses: under MMLG_TILES, else in `out`, the committed results or the user's cache; None: fixed tiles.

    It is of this GPU and this Triton: others are not read by the kernels.
    """
    own = table_path(gpu)
    folders = [own.parent] if "MMLG_TILES" in os.environ else [out.absolute(), RESULTS, own.parent]
    return next((folder / own.name for folder in folders if read_table(folder / own.name)), None)


def part_name(part: int, checks: Sequence[Check], every: Sequence[Check]) -> str:
    """Of a part's files: those of a few checks, run again, leave those of all in place."""
    return "_".join([f"gpu_check_{part}", *(check.name for check in checks if len(checks) < len(every))])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=[1, 2], required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    names = [check.name for part in (1, 2) for check in all_checks(part, Path())]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CHECK", help=", ".join(names))
    args = parser.parse_args()
    if not any(check.name in args.only for check in all_checks(args.part, Path())):
        parser.error(f"part {args.part} has none of {', '.join(args.only)}")
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA GPU here; `make test` runs the kernels in Triton's interpreter instead", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    environment = measure.environment("cuda")
    if args.part == 2:
        tiles = tuned_tiles(args.out, torch.cuda.get_device_name())
        if tiles is not None:
            os.environ["MMLG_TILES"] = str(tiles.parent)
        environment["tiles"] = "fixed" if tiles is None else tiles.name
        print(f"tiles: {environment['tiles']}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder)
        every = all_checks(args.part, found)
        checks = [check for check in every if check.name in args.only]
        name = part_name(args.part, checks, every)
        return show(run_checks(checks, found, TOTAL_SECONDS, lambda done: write_results(done, found, args.out, name, environment)))


if __name__ == "__main__":
    sys.exit(main())
