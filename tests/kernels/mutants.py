"""Edits of the kernels that some test must notice. `python -m tests.kernels.mutants FOLDER` tries each on a copy below FOLDER.

Each edit names the tests that have to fail. They run in a fork of a process that has torch and pytest behind it and no `mmlg_kernels`,
which it finds in the copy. Before the edits, the same tests are run on a copy without any, and must pass. With numbers behind FOLDER only
those edits are tried, without that.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 240
"""For one edit; ranks that wait for each other would wait for ever."""
BACKENDS, NUMERICS, DISTILLATION = "test_backends.py", "test_numerics.py", "test_distillation.py"
TRANSFER, EXCHANGE, TILES = "test_block_transfer.py", "test_exchange.py", "test_tiles.py"
SEVERAL = (BACKENDS, "programs_of_several_tiles")
EQUAL = (BACKENDS, "test_error_is_no_worse_than_plain_torch and triton and 130-33")
WAVES = (BACKENDS, "several_waves")
RANKS = (BACKENDS, "ranks_of_pairs and triton")
FP16 = (NUMERICS, "fp16")
WORLD = (BACKENDS, "ranks_equal_one_process")


@dataclass(frozen=True)
class Mutant:
    """The `nth` occurrence of `old` in a file of mmlg_kernels becomes `new`."""

    file: str
    old: str
    new: str
    tests: tuple[str, str]
    nth: int = 0

    def write(self, folder: Path) -> None:
        """A copy of the kernels with the edit. Raises ValueError where there is no such text any more."""
        shutil.copytree(ROOT / "kernels" / "mmlg_kernels", folder / "mmlg_kernels", ignore=shutil.ignore_patterns("__pycache__"))
        path = folder / "mmlg_kernels" / self.file
        parts = path.read_text().split(self.old)
        if len(parts) < self.nth + 2:
            raise ValueError(f"{self.file} has no {self.old!r} number {self.nth}")
        before, after = self.old.join(parts[: self.nth + 1]), self.old.join(parts[self.nth + 1 :])
        path.write_text(before + self.new + after)


MUTANTS = [
    Mutant("tiled.py", "        y_tile += BD", "        y_tile += 0", EQUAL),
    Mutant("tiled.py", "along < width - start", "along < width", EQUAL),
    Mutant("tiled.py", "        row_max = new_max", "        pass", SEVERAL),
    Mutant("tiled.py", "row_sum * tl.exp(row_max - shift)", "row_sum", SEVERAL),
    Mutant("tiled.py", "(split * tiles_per_split + index) * BN", "(split + index) * BN", SEVERAL),
    Mutant("tiled.py", "(split * tiles_per_split + index) * BN", "(split * tiles_per_split) * BN", SEVERAL, nth=1),
    Mutant("tiled.py", "        total += tl.sum(", "        total = tl.sum(", SEVERAL),
    Mutant("tiled.py", "tl.exp(logits - column_lse[None, :])) * 0.5", "tl.exp(logits - column_lse[None, :])) * 1.0", EQUAL),
    Mutant("tiled.py", "y.shape[1], first + start, factor", "y.shape[1], first, factor", WAVES),
    Mutant("tiled.py", "y.shape[1], first + start, factor", "y.shape[1], first, factor", WAVES, nth=1),
    Mutant("tiled.py", "dx_BD[start : start + rows]", "dx_BD[: part.shape[0]]", WAVES),
    Mutant("tiled.py", "row_above += tl.sum", "row_above = tl.sum", RANKS),
    Mutant("tiled.py", "logits > own_row[:, None]", "logits >= own_row[:, None]", RANKS),
    Mutant("tiled.py", "rows[:, None] + first != columns[None, :]", "rows[:, None] != columns[None, :]", WORLD),
    Mutant("tiled.py", "u < 0.125", "u < 0.0", (NUMERICS, "softplus")),
    Mutant("tiled.py", "1 / 5", "0.0", (NUMERICS, "softplus")),
    Mutant("tiled.py", "columns[None, :], -logits, logits)", "columns[None, :], logits, logits)", (NUMERICS, "certain_pairs")),
    Mutant("tiled.py", "if dtype == torch.float16 else 1.0", "if dtype == torch.float64 else 1.0", FP16),
    Mutant("tiled.py", "_product(weights.T, part), alpha=1 / factor", "_product(weights.T, part), alpha=1.0", FP16),
    Mutant("tiled.py", 'name == "tf32"', 'name == "ieee"', (NUMERICS, "tf32")),
    Mutant("tiled.py", "range((BM + BN - 1) // BN)", "range(1)", (TILES, "softmax_forward_ranks")),
    Mutant("tiled_distillation.py", "student_sum += tl.sum", "student_sum = tl.sum", (DISTILLATION, "several_tiles")),
    Mutant("tiled_distillation.py", "* (contrastive + distillation)", "* contrastive", (DISTILLATION, "triton_equals")),
    Mutant("tiled_distillation.py", "u[mine], v, given", "u[: part.shape[0]], v, given", (DISTILLATION, "waves")),
    Mutant("tiled_distillation.py", "(weight * factor for weight in weights)", "weights", FP16),
    Mutant("transfer_tiles.py", "ADD_B=add_second", "ADD_B=False", (TRANSFER, "first_or_second")),
    Mutant("transfer_tiles.py", "ADD_A=add_first", "ADD_A=False", (TRANSFER, "first_or_second")),
    Mutant("transfer_tiles.py", "range(first, end, BLOCK)", "range(first, first + BLOCK, BLOCK)", (TRANSFER, "more_tiles")),
    Mutant("transfer_tiles.py", "(totals[k] + weight * grad,)", "(weight * grad,)", (TRANSFER, "triton_equals")),
    Mutant("transfer_tiles.py", "with torch.cuda.device_of(out):", "if True:", (NUMERICS, "launch")),
    Mutant("exchange.py", "own, total_GD, group=group", "own, 2 * total_GD, group=group", (EXCHANGE, "nccl")),
    Mutant("exchange.py", "slice(first + num_rows, count)", "slice(first, count)", WORLD),
    Mutant("exchange.py", "if torch.equal(most[::2], -most[1::2]):", "if torch.equal(most, most):", (EXCHANGE, "uneven")),
    Mutant("pairs.py", "1 + row_above", "row_above", RANKS),
    Mutant("pairs.py", "grad.to(dx.dtype) / x.shape[0]", "grad.to(dx.dtype)", EQUAL),
    Mutant(
        "chunked.py",
        "torch.logaddexp(column_lse, total.log_().add_(peak))",
        "total.log_().add_(peak)",
        (BACKENDS, "plain_torch and chunked"),
    ),
]


def run(folder: Path, tests: list[tuple[str, str]]) -> int:
    """pytest on the kernels in `folder`, in a fork; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        os.setsid()
        sink = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(sink, stream)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])  # for ranks
        import pytest

        code = 0
        for file, expression in dict.fromkeys(tests):
            where = ["-n0", "-x", "-p", "no:cacheprovider", "-k", expression, str(ROOT / "tests" / "kernels" / file)]
            code = code or int(pytest.main(where))
        import mmlg_kernels

        os._exit(code if Path(mmlg_kernels.__file__).is_relative_to(folder) else 99)
    deadline = time.monotonic() + SECONDS * max(1, len(tests))
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.05)


def main() -> int:
    folder = Path(sys.argv[1])
    wanted = [MUTANTS[int(number)] for number in sys.argv[2:]] or MUTANTS
    os.environ["TRITON_INTERPRET"] = "1"
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import triton.language  # noqa: F401

    torch.set_num_threads(1)
    assert "mmlg_kernels" not in sys.modules
    report = {}
    if wanted is MUTANTS:
        shutil.copytree(ROOT / "kernels" / "mmlg_kernels", folder / "as-it-is" / "mmlg_kernels")
        report["as it is"] = run(folder / "as-it-is", [mutant.tests for mutant in wanted])
    for number, mutant in enumerate(wanted):
        mutant.write(folder / str(number))
        report[f"{mutant.file}: {mutant.old!r} -> {mutant.new!r}"] = code = run(folder / str(number), [mutant.tests])
        print(code, mutant, flush=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
