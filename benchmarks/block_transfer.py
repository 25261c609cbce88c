"""What does composing ViT-B-32's weights cost in torch: operators and memory of one extraction step?

    python -m benchmarks.block_transfer

On the CPU, of the chunked backend, all at once and layer by layer, and of one product per matrix. Each in a process of its own, since a
process's peak memory only rises. Operators that only view or allocate are not counted. Not run on a GPU.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from mmlg_kernels.block_transfer import block_transfer, transfer_layer
from mmlg_kernels.transfer_plan import Slice, Target, TransferPlan
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

NAMES = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
WIDTHS = (768, 512)
NUM_LAYERS = 12
# What moves no numbers: views, and the wrappers around operators that are listed themselves.
FREE = (
    "view",
    "as_strided",
    "transpose",
    "unflatten",
    "select",
    "slice",
    "unbind",
    "split",
    "reshape",
    "expand",
    "unsqueeze",
    "_unsafe_view",
    "empty_like",
    "split_with_sizes",
)
FREE += (
    "empty",
    "matmul",
    "to",
    "_to_copy",
    "narrow",
    "permute",
    "clone",
    "flatten",
    "detach",
    "t",
    "chunk",
    "contiguous",
    "alias",
    "resize_",
)
FREE += ("result_type", "resolve_conj", "resolve_neg", "_reshape_alias", "_reshape_copy", "zero_", "fill_")


def shapes(width: int) -> tuple[tuple[int, int], ...]:
    """A block's matrices."""
    return ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))


def make() -> tuple[TransferPlan, list[Tensor], list[Tensor]]:
    """One multimodal block of width 768 and one unimodal block per tower, random."""
    size = {width: 12 * width * width for width in WIDTHS}
    targets = []
    for i, width in enumerate(WIDTHS):
        parts = []
        for full in (WIDTHS[0], width):
            found, offset = [], 0
            for name, whole, some in zip(NAMES, shapes(full), shapes(width), strict=True):
                found.append(Slice.leading(offset, whole, some, groups=3 if "in_proj" in name else 1))
                offset += whole[0] * whole[1]
            parts.append(tuple(found))
        targets.append(Target(NUM_LAYERS, NAMES, shapes(width), (0, 1 + i), tuple(parts)))
    counts = [(1, size[768]), (1, size[768]), (1, size[512])]
    torch.manual_seed(0)
    sources = [torch.randn(shape, requires_grad=True) for shape in counts]
    return TransferPlan(counts, targets), sources, [torch.randn(NUM_LAYERS, 4, 2, requires_grad=True) for _ in WIDTHS]


def per_matrix(plan: TransferPlan, sources: list[Tensor], coefficients: list[Tensor]) -> list[Tensor]:
    """One product per matrix and tower over concatenated blocks."""
    layers = []
    for target, a_LTK in zip(plan.targets, coefficients, strict=True):
        for g in range(len(target.names)):
            blocks = []
            for source, slices in zip(target.sources, target.slices, strict=True):
                s = slices[g]
                strides = (sources[source].stride(0), s.group_stride, s.row_stride, 1)
                read = sources[source].as_strided((1, s.groups, s.rows, s.columns), strides, s.offset)
                blocks.append(read.flatten(1))
            layers.append(a_LTK[:, g] @ torch.cat(blocks))
    return layers


def count(function: Callable[[], object]) -> tuple[int, dict[str, int]]:
    """Operators that move numbers, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        function()
    ops = {e.key.removeprefix("aten::"): e.count for e in found.key_averages() if e.key.startswith("aten::")}
    ops = {key: n for key, n in ops.items() if key not in FREE}
    return sum(ops.values()), ops


def one_by_one(plan: TransferPlan, sources: list[Tensor], coefficients: list[Tensor]) -> None:
    """Every layer composed and let go, as inside checkpointed layers."""
    for i, a_LTK in enumerate(coefficients):
        for a_TK in a_LTK.unbind(0):
            transfer_layer(plan, i, sources, a_TK)


MODES: dict[str, Callable[[TransferPlan, list[Tensor], list[Tensor]], object]] = {
    "layer": one_by_one,
    "matrix": per_matrix,
    "all": block_transfer,
}


def measure(mode: str) -> None:
    """Print one mode's row."""
    plan, sources, coefficients = make()
    function = MODES[mode]
    with torch.no_grad():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        function(plan, sources, coefficients)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        times = []
        for _ in range(5):
            start = time.perf_counter()
            function(plan, sources, coefficients)
            times.append(time.perf_counter() - start)
        total, ops = count(lambda: function(plan, sources, coefficients))
    print(f"{mode}: {total} operators {ops}, peak +{peak / 1024:.0f} MiB, median of 5: {1000 * sorted(times)[2]:.0f} ms", flush=True)


def main() -> None:
    """Print a row per mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=list(MODES), default=None, help="only this one, in this process")
    args = parser.parse_args()
    if args.mode:
        measure(args.mode)
        return
    for mode in MODES:
        subprocess.run([sys.executable, "-m", "benchmarks.block_transfer", "--mode", mode], check=True)


if __name__ == "__main__":
    main()
