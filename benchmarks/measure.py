"""What the benchmarks share: times in turn, extra memory, ceilings of the device, tables, JSON and plots.

Times: all variants in turn (A B C A B C ...) after a warm-up each; p20 / p50 / p80 in milliseconds. On a GPU `device_*_ms` come from
events behind a queue that is kept busy while the host enqueues, so they hold no launch gaps, as in a CUDA graph; `*_ms` are wall clock.
Extra memory of one step: on a GPU the allocator's peak above the inputs; on the CPU the peak resident memory above the inputs, in a fresh
process, since libraries keep what they have had. Depends only on torch; matplotlib and nvidia-smi are used where they are.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlg_scale.hardware import device_name

PARTS = ("forward", "backward", "both")
DEVICE_TIMED_BELOW_MS = 20.0
"""A step that is longer in its warm-up is timed by the wall clock only, which then holds few launches; its rows have no `device_*`."""
BUSY_CYCLES = 60_000_000
"""How long the queue is kept busy before a step is timed by events: about 30 ms at 2 GHz, longer than what it enqueues takes the host."""
VARIANT_SECONDS = 8.0
"""On a GPU a variant that has taken so long at one size is not repeated any further, but at least once."""
L2_BYTES = 256 * 2**20
"""Written before a step is timed by events, so that no variant finds its inputs in the cache: more than any GPU's L2."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One variant on its inputs: `forward()` gives what `backward` takes."""

    forward: Callable[[], Any]
    backward: Callable[[Any], object]


def loss_step(loss: Callable[..., Tensor], given: Sequence[Any]) -> Step:
    """A loss of `given`; backward to those of them that require gradients."""
    leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    return Step(lambda: loss(*given), lambda value: torch.autograd.grad(value, leaves))


def times(steps: Mapping[str, Step], repeats: int, device: str) -> dict[str, Row]:
    """Per variant `forward_ms_p20` and so on; or {"note": why there are none}. A variant that fails does not stop the others."""
    spent: dict[str, list[list[float]]] = {name: [] for name in steps}
    notes: dict[str, str] = {}
    warm: dict[str, float] = {}
    flushed = torch.empty(L2_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            if name in notes or _is_long(spent[name], device):
                continue
            try:
                now = _wall_ms(step, device)  # at first it compiles
                if flushed is not None:
                    if repeat == 0:
                        warm[name] = sum(_wall_ms(step, device))
                    now += _device_ms(step, flushed) if warm[name] < DEVICE_TIMED_BELOW_MS else []
            except torch.OutOfMemoryError:
                notes[name] = "out of memory"
                torch.cuda.empty_cache()
            except Exception as fault:
                notes[name] = f"failed: {type(fault).__name__}: {str(fault).strip().splitlines()[-1:]}"
            else:
                if repeat:
                    spent[name].append(now)
    return {name: {"note": notes[name]} if name in notes else _quantiles(spent[name]) for name in steps}


def _is_long(spent: Sequence[Sequence[float]], device: str) -> bool:
    """Whether a variant has had its time on a GPU, where minutes are counted."""
    return device == "cuda" and len(spent) > 1 and sum(map(sum, spent)) > 1e3 * VARIANT_SECONDS


def device_ms(row: Row, part: str = "both") -> float:
    """The median on the device, or on the wall where that is all there is."""
    return float(row[f"device_{part}_ms_p50"] if f"device_{part}_ms_p50" in row else row[f"{part}_ms_p50"])


def _quantiles(spent: list[list[float]]) -> Row:
    """[forward, backward] or [forward, backward, the same on the device] per repetition -> named quantiles."""
    found: Row = {}
    for first, prefix in ((0, ""), (2, "device_")):
        if len(spent[0]) <= first:
            continue
        for part, values in zip(PARTS, _parts([row[first : first + 2] for row in spent]), strict=True):
            cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
            found |= {f"{prefix}{part}_ms_p{10 * q}": cuts[q - 1] for q in (2, 5, 8)}
    return found


def _parts(spent: list[list[float]]) -> tuple[list[float], list[float], list[float]]:
    return [f for f, _ in spent], [b for _, b in spent], [f + b for f, b in spent]


def _wall_ms(step: Step, device: str) -> list[float]:
    """Milliseconds of one forward and one backward pass, each waited for."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    value = step.forward()
    wait()
    middle = time.perf_counter()
    step.backward(value)
    wait()
    return [1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)]


def _device_ms(step: Step, flushed: Tensor) -> list[float]:
    """The same by events, behind a queue that is busy until all is enqueued, and with nothing in the cache but `flushed`."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    flushed.zero_()
    marks[0].record()
    value = step.forward()
    marks[1].record()
    step.backward(value)
    marks[2].record()
    torch.cuda.synchronize()
    return [marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])]


def extra_bytes(step: Step) -> int | None:
    """Peak of the GPU's allocator above what is there before one step; None where it does not fit."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        step.backward(step.forward())
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() - before


def extra_bytes_of_process(module: str, name: str, *arguments: object) -> int:
    """Run `python -m module --peak-of name ...`, which prints its peak by `print_extra_bytes`, in a fresh process."""
    command = [sys.executable, "-m", module, "--peak-of", name, *map(str, arguments)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def print_extra_bytes(small: Step, make: Callable[[], Step]) -> None:
    """A small step first, so that libraries have their memory, then the peak of the real one above its inputs. Linux only."""
    small.backward(small.forward())
    step = make()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    step.backward(step.forward())
    print(_status("VmHWM") - before)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest ||found - exact|| / ||exact|| of the outputs, in fp64."""
    return max(float((x.detach().double() - y.detach()).norm() / y.detach().norm()) for x, y in zip(found, exact, strict=True))


def said(error: float | None) -> str:
    """An error for a table."""
    return "–" if error is None else f"{error:.1e}"


def matmul_tflops(device: str, dtype: torch.dtype, inner: int | None = None) -> float:
    """10^12 floating-point operations per second of torch's product of [n, inner] with [inner, n], n = 8,192 (CPU: 1,024), inner = n unless
    given; the median of 10 on random numbers."""
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(n, inner or n, device=device).to(dtype), torch.randn(inner or n, n, device=device).to(dtype)
    step = Step(lambda: a @ b, lambda _: None)
    return 2 * n * n * (inner or n) / device_ms(times({"matmul": step}, 10, device)["matmul"], "forward") / 1e9


def copy_step(device: str) -> Step:
    """A copy within the device, forward only, of 1 GiB (CPU: 256 MiB), to be run in turn with what it is compared with."""
    source = torch.randint(255, (2**30 if device == "cuda" else 2**28,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Step(lambda: target.copy_(source), lambda _: None)


def copy_bytes(device: str) -> int:
    """Read and written by `copy_step`."""
    return 2**31 if device == "cuda" else 2**29


def environment(device: str) -> Row:
    """The machine and the versions that times belong to."""
    found: Row = {
        "device": device_name(device),
        "driver": _driver() if device == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }
    for package in ("triton", "open_clip_torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=None, help="default: 3 on the CPU, 20 on a GPU")
    parser.add_argument("--out", type=Path, default=None, help="folder for NAME_DEVICE.json and .svg")
    parser.add_argument("--peak-of", default=None, help=argparse.SUPPRESS)
    return parser


Columns = Mapping[str, Callable[[Row], str]]


@dataclass
class Report:
    """Rows of one run. JSON is written after every size, so that a run that is stopped leaves what it has measured.

    Attributes:
        name: of the files, without the device.
        ours: the variant that others are divided by.
        sizes: keys of a row that say what was measured; rows that agree in them are compared.
        facts: what holds for the whole run (ceilings, errors).
    """

    name: str
    device: str
    out: Path | None
    ours: str
    sizes: tuple[str, ...]
    facts: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            content = {"environment": environment(self.device), **self.facts, "rows": self.rows}
            (self.out / f"{self.name}_{self.device}.json").write_text(json.dumps(content, indent=1) + "\n")

    def finish(self, columns: Columns, x: str) -> int:
        """Print the table, draw times and memory against the key `x`; the exit status: 1 where a variant of ours failed."""
        print(table(self.rows, self.ours, self.sizes, columns))
        if self.out is not None:
            draw(self.rows, x, self.out / f"{self.name}_{self.device}.svg")
        failed = [row for row in self.rows if "failed" in row.get("note", "")]
        for row in failed:
            print(f"{row['variant']}: {row['note']}", file=sys.stderr)
        return int(any(row["variant"].startswith("mmlg_kernels") for row in failed))


def table(rows: Sequence[Row], ours: str, sizes: Sequence[str], columns: Columns) -> str:
    """Markdown: the variant, its sizes, times, their ratio to ours, extra memory, then `columns`."""
    heads = ["variant", *sizes, "forward ms", "backward ms", "both ms p20 / p50 / p80", "÷ ours", "extra MB", *columns]
    lines = [heads, ["---"] * len(heads)]
    base = {tuple(row[key] for key in sizes): row.get("both_ms_p50") for row in rows if row["variant"] == ours}
    for row in rows:
        size = tuple(row[key] for key in sizes)
        if "note" in row:
            said = row["note"] if len(row["note"]) < 60 else row["note"][:57] + "..."
            lines.append([row["variant"], *map(str, size), said, *[""] * (len(heads) - 2 - len(size))])
            continue
        ratio = f"{row['both_ms_p50'] / base[size]:.2f}" if base.get(size) else "–"
        extra = "–" if row.get("extra_bytes") is None else f"{row['extra_bytes'] / 2**20:.0f}"
        both = " / ".join(f"{row[f'both_ms_p{q}']:.2f}" for q in (20, 50, 80))
        parts = [f"{row['forward_ms_p50']:.2f}", f"{row['backward_ms_p50']:.2f}"]
        lines.append([row["variant"], *map(str, size), *parts, both, ratio, extra, *(show(row) for show in columns.values())])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def draw(rows: Sequence[Row], x: str, target: Path) -> None:
    """Time and memory against `x`, both axes logarithmic, at the first value of the other sizes; nothing without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name and "note" not in row and row.get("drawn", True)]
        timed, sized = mine, [row for row in mine if row.get("extra_bytes")]
        axes[0].loglog([row[x] for row in timed], [row["both_ms_p50"] for row in timed], "o-", label=name)
        axes[1].loglog([row[x] for row in sized], [row["extra_bytes"] / 2**20 for row in sized], "o-", label=name)
    for axis, label in zip(axes, ("forward and backward, ms", "extra memory, MB"), strict=True):
        axis.set(xlabel=x, ylabel=label)
        axis.grid(visible=True, which="both", alpha=0.2)
    axes[0].legend(fontsize=8)
    figure.savefig(target)
    plt.close(figure)
