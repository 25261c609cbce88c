"""How long and how much memory does the contrastive loss take, next to open_clip's and to one that stores the similarities?

    python -m benchmarks.contrastive_loss                       # 1,024 and 8,192 pairs on the CPU, under two minutes
    python -m benchmarks.contrastive_loss --device cuda         # up to 65,536 pairs
    python -m benchmarks.contrastive_loss --pairs 4096 --width 768

All variants in turn (A B C A B C ...) on random unit rows at scale 100; p20 / p50 / p80 after one warm-up, forward, backward and both. Each
variant's error against fp64 is measured in the same run. Extra memory: on a GPU the allocator's peak above the inputs, on the CPU the peak
resident memory above the inputs of a fresh process that takes one step. The floor is 8 B^2 D floating-point operations (2 forward, 6
backward with one recomputation). Depends on torch and mmlg_kernels; open_clip and matplotlib are used where they are installed.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmlg_kernels import contrastive_loss
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def one_matrix(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The plainest way: the similarities once, stored."""
    logits = scale * (x @ y.T)
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def as_open_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """What open_clip's ClipLoss computes on one rank: the similarities twice."""
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(scale * x @ y.T, labels) + F.cross_entropy(scale * y @ x.T, labels)) / 2


def variants(device: str, compiled: bool) -> dict[str, Loss]:
    """Losses by name; the first is ours."""
    found: dict[str, Loss] = {"mmlg_kernels": contrastive_loss}
    if device == "cuda":
        found["mmlg_kernels, chunked"] = functools.partial(contrastive_loss, backend="chunked")
    try:
        from mmlg_scale.towers import open_clip

        found["open_clip"] = open_clip.loss.ClipLoss()
    except ImportError:
        found["as open_clip"] = as_open_clip
    if compiled:
        found["open_clip, compiled"] = torch.compile(as_open_clip)
    found["one matrix, stored"] = one_matrix
    return found


def inputs(count: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random unit rows, and the scale."""
    generator = torch.Generator(device).manual_seed(0)
    rows = [F.normalize(torch.randn(count, width, generator=generator, device=device), dim=-1).to(dtype) for _ in range(2)]
    return rows[0].requires_grad_(), rows[1].requires_grad_(), torch.tensor(100.0, device=device, requires_grad=True)


def error(loss: Loss, dtype: torch.dtype, device: str) -> float:
    """Largest relative L2 error of loss and gradients against fp64 at 1,000 x 512."""
    given = inputs(1000, 512, dtype, device)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in given)
    found, expected = loss(*given), one_matrix(*exact)
    pairs = zip((found, *torch.autograd.grad(found, given)), (expected, *torch.autograd.grad(expected, exact)), strict=True)
    return max(float((got.double() - want).norm() / want.norm()) for got, want in pairs)


def timed(loss: Loss, given: tuple[Tensor, Tensor, Tensor], device: str) -> tuple[float, float]:
    """Milliseconds of one forward and one backward pass."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    value = loss(*given)
    wait()
    middle = time.perf_counter()
    torch.autograd.grad(value, given)
    wait()
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def peak_bytes(name: str, count: int, width: int, dtype: torch.dtype, device: str) -> int:
    """Extra memory of one step, see the module's docstring."""
    if device == "cpu":
        command = [sys.executable, "-m", "benchmarks.contrastive_loss", "--peak-of", name, "--pairs", str(count), "--width", str(width)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    given, loss = inputs(count, width, dtype, device), variants(device, False).get(name, as_open_clip)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(loss(*given), given)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def print_peak(name: str, count: int, width: int) -> None:
    """In a fresh process on the CPU: a tiny step first, so that libraries have their memory, then the peak of the real one."""
    loss = variants("cpu", False)[name]
    small = inputs(64, width, torch.float32, "cpu")
    torch.autograd.grad(loss(*small), small)
    given = inputs(count, width, torch.float32, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    torch.autograd.grad(loss(*given), given)
    print(_status("VmHWM") - before)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def measure(count: int, width: int, dtype: torch.dtype, device: str, repeats: int, compiled: bool) -> list[dict[str, Any]]:
    """One row per variant that fits into memory."""
    given, losses = inputs(count, width, dtype, device), variants(device, compiled)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
    for repeat in range(repeats + 1):
        for name, loss in losses.items():
            try:
                spent = timed(loss, given, device)
            except torch.cuda.OutOfMemoryError:
                continue
            if repeat:
                times[name].append(spent)
    rows = []
    for name, spent in times.items():
        if not spent:
            rows.append({"variant": name, "pairs": count, "width": width, "note": "out of memory"})
            continue
        parts = {"forward": [f for f, _ in spent], "backward": [b for _, b in spent], "both": [f + b for f, b in spent]}
        quantiles = {
            f"{part}_ms_p{10 * q}": statistics.quantiles(values, n=10, method="inclusive")[q - 1]
            for part, values in parts.items()
            for q in (2, 5, 8)
        }
        rows.append(
            {
                "variant": name,
                "pairs": count,
                "width": width,
                "dtype": str(dtype).removeprefix("torch."),
                **quantiles,
                "extra_bytes": None if "compiled" in name and device == "cpu" else peak_bytes(name, count, width, dtype, device),
                "floor_tflops_per_second": 8 * count**2 * width / quantiles["both_ms_p50"] / 1e9,
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]], errors: dict[str, float]) -> None:
    print("| loss | pairs | width | forward ms | backward ms | both ms p20 / p50 / p80 | ÷ ours | extra MB | error against fp64 |")
    print("|---|---|---|---|---|---|---|---|---|")
    ours = {(row["pairs"], row["width"]): row for row in rows if row["variant"] == "mmlg_kernels"}
    for row in rows:
        if "note" in row:
            print(f"| {row['variant']} | {row['pairs']} | {row['width']} | {row['note']} | | | | | |")
            continue
        ratio = row["both_ms_p50"] / ours[row["pairs"], row["width"]]["both_ms_p50"]
        extra = "–" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.0f}"
        print(
            f"| {row['variant']} | {row['pairs']} | {row['width']} | {row['forward_ms_p50']:.2f} | {row['backward_ms_p50']:.2f} "
            f"| {row['both_ms_p20']:.2f} / {row['both_ms_p50']:.2f} / {row['both_ms_p80']:.2f} | {ratio:.2f} | {extra} "
            f"| {errors[row['variant']]:.1e} |"
        )


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """Time and memory against the number of pairs, both axes logarithmic; nothing where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name and row.get("extra_bytes") and row["width"] == rows[0]["width"]]
        axes[0].loglog([row["pairs"] for row in mine], [row["both_ms_p50"] for row in mine], "o-", label=name)
        axes[1].loglog([row["pairs"] for row in mine], [row["extra_bytes"] / 2**20 for row in mine], "o-", label=name)
    for axis, label in zip(axes, ("forward and backward, ms", "extra memory, MB"), strict=True):
        axis.set(xlabel="pairs", ylabel=label)
        axis.grid(visible=True, which="both", alpha=0.2)
    axes[0].legend(fontsize=8)
    figure.savefig(target)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--pairs", type=int, nargs="+", default=None)
    parser.add_argument("--width", type=int, nargs="+", default=None)
    parser.add_argument("--repeats", type=int, default=None, help="default: 3 on the CPU, 20 on a GPU")
    parser.add_argument("--compile", action="store_true", help="open_clip's loss through torch.compile too (a minute on a CPU)")
    parser.add_argument("--out", type=Path, default=None, help="folder for contrastive_loss_DEVICE.json and .svg")
    parser.add_argument("--peak-of", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of is not None:
        print_peak(args.peak_of, args.pairs[0], args.width[0])
        return
    cuda = args.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    pairs = args.pairs or ([4096, 16384, 32768, 65536] if cuda else [1024, 8192])
    widths = args.width or ([512, 768, 1024] if cuda else [512])
    repeats = args.repeats or (20 if cuda else 3)
    errors = {name: error(loss, dtype, args.device) for name, loss in variants(args.device, args.compile or cuda).items()}
    rows = [row for width in widths for count in pairs for row in measure(count, width, dtype, args.device, repeats, args.compile or cuda)]
    print_table(rows, errors)
    if args.out is None:
        return
    environment = {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "errors": errors, "rows": rows}
    (args.out / f"contrastive_loss_{args.device}.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(rows, args.out / f"contrastive_loss_{args.device}.svg")


if __name__ == "__main__":
    main()
