"""How long and how much memory does the contrastive loss take, next to the one that stores the similarities?

    python -m benchmarks.contrastive_loss                    # small sizes, CPU
    python -m benchmarks.contrastive_loss --device cuda      # up to 32,768 pairs

Forward and backward of both backends in turn (A B A B ...) on random unit rows at scale 100; p20 / p50 / p80 over the repeats after
one warm-up. Every variant's gradients are first checked against fp64 at a small size. Extra memory is what autograd keeps between
forward and backward on the CPU, and the allocator's peak above the inputs on a GPU. Depends on torch and mmlg_kernels alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmlg_kernels import contrastive_loss
from torch import Tensor

BACKENDS = ("reference", "chunked")


def inputs(count: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random unit rows, and the scale."""
    generator = torch.Generator(device).manual_seed(0)
    rows = [F.normalize(torch.randn(count, width, generator=generator, device=device), dim=-1).to(dtype) for _ in range(2)]
    return rows[0].requires_grad_(), rows[1].requires_grad_(), torch.tensor(100.0, device=device, requires_grad=True)


def error(backend: str, dtype: torch.dtype, device: str) -> float:
    """Largest relative L2 error of loss and gradients against fp64 at 257 x 96."""
    given = inputs(257, 96, dtype, device)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in given)
    found = contrastive_loss(*given, backend=backend)
    expected = contrastive_loss(*exact, backend="reference")
    pairs = zip((found, *torch.autograd.grad(found, given)), (expected, *torch.autograd.grad(expected, exact)), strict=True)
    return max(float((got.double() - want).norm() / want.norm()) for got, want in pairs)


def one_step(backend: str, given: tuple[Tensor, Tensor, Tensor]) -> None:
    loss = contrastive_loss(*given, backend=backend)
    torch.autograd.grad(loss, given)


def extra_bytes(backend: str, given: tuple[Tensor, Tensor, Tensor], device: str) -> int:
    """See the module's docstring."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_step(backend, given)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contrastive_loss(*given, backend=backend)
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    return sum(size for pointer, size in kept.items() if pointer not in own)


def timed(step: Callable[[], None], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(count: int, width: int, dtype: torch.dtype, device: str, repeats: int) -> list[dict[str, Any]]:
    """One row per backend."""
    given = inputs(count, width, dtype, device)
    times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for repeat in range(repeats + 1):
        for backend in BACKENDS:
            spent = timed(lambda b=backend: one_step(b, given), device)
            if repeat:
                times[backend].append(spent)
    floor = 8 * count**2 * width  # 2 B^2 D forward, 6 B^2 D backward with one recomputation
    rows = []
    for backend in BACKENDS:
        p20, p50, p80 = (statistics.quantiles(times[backend], n=10, method="inclusive")[i] for i in (1, 4, 7))
        rows.append(
            {
                "backend": backend,
                "pairs": count,
                "width": width,
                "dtype": str(dtype).removeprefix("torch."),
                "ms_p20": p20,
                "ms_p50": p50,
                "ms_p80": p80,
                "extra_bytes": extra_bytes(backend, given, device),
                "floor_tflops_per_second": floor / p50 / 1e9,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None, help="folder for contrastive_loss_DEVICE.json")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    sizes = [(n, d) for n in ((4096, 16384, 32768) if cuda else (1024, 4096)) for d in ((512, 768, 1024) if cuda else (512,))]
    errors = {backend: error(backend, dtype, args.device) for backend in BACKENDS}
    rows = [row for count, width in sizes for row in measure(count, width, dtype, args.device, args.repeats)]
    print("| backend | pairs | width | ms p20 | ms p50 | ms p80 | extra MB | error against fp64 |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['backend']} | {row['pairs']} | {row['width']} | {row['ms_p20']:.2f} | {row['ms_p50']:.2f} | {row['ms_p80']:.2f} "
            f"| {row['extra_bytes'] / 2**20:.1f} | {errors[row['backend']]:.1e} |"
        )
    if args.out is not None:
        environment = {
            "device": torch.cuda.get_device_name() if cuda else platform.machine(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
        }
        args.out.mkdir(parents=True, exist_ok=True)
        target = args.out / f"contrastive_loss_{args.device}.json"
        target.write_text(json.dumps({"environment": environment, "errors": errors, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
