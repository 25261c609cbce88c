"""What does composing two towers' weights out of blocks cost: time, memory traffic, operators, memory?

    python -m benchmarks.block_transfer                        # towers of 192 and 128, then of 384 and 256, on the CPU, under two minutes
    python -m benchmarks.block_transfer --widths 768 512       # ViT-B-32's
    python -m benchmarks.block_transfer --device cuda          # up to ViT-L-14's; bf16 layers out of fp32 blocks

12 layers per tower out of two blocks, one that both towers share and one of each tower's own, as `block_transfer` mixes them. In turn:

- mmlg_kernels: all layers at once (Triton on a GPU, else a few batched products);
- mmlg_kernels, by layer: each composed and let go, and composed again in the backward pass, as inside checkpointed layers;
- loop: each tensor as the sum of coefficient x block, in Python; on a GPU also through torch.compile;
- product: coefficients @ the tensor's blocks, which are gathered first; and the same with the gathering left out of forward and backward,
  which training cannot do where towers share a block.

`measure` says how times and memory are taken; the backward pass gets the same random gradients in every variant and gives those of blocks
and coefficients. Operators: those of forward and backward that move numbers, by torch's profiler. Traffic: the bytes that must be moved
over the time, as a share of what a plain copy reaches in the same run; they are P (4 K + b L) forward and P (b L + 8 K) backward for every
tower of P numbers per layer, L layers of b bytes per number and K fp32 blocks. Errors are against fp64 at a small size. Depends on torch
and mmlg_kernels.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from mmlg_kernels.block_transfer import block_transfer, transfer_layer
from mmlg_kernels.transfer_plan import Slice, Target, TransferPlan
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure

NAMES = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
NUM_LAYERS, NUM_BLOCKS = 12, 2
SMALL = (64, 32)
# What moves no numbers: views, and the wrappers around operators that are listed themselves.
FREE = frozenset(
    [
        *("view", "as_strided", "transpose", "unflatten", "select", "slice", "unbind", "split", "split_with_sizes", "reshape", "expand"),
        *("unsqueeze", "squeeze", "narrow", "permute", "flatten", "detach", "t", "chunk", "alias", "_unsafe_view", "_reshape_alias"),
        *("empty", "empty_like", "empty_strided", "resize_", "resolve_conj", "resolve_neg", "result_type", "matmul", "to", "_to_copy"),
        *("clone", "contiguous", "_reshape_copy", "zero_", "zeros", "zeros_like", "ones_like"),
    ]
)


def shapes(width: int) -> tuple[tuple[int, int], ...]:
    """A block's matrices."""
    return ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))


@dataclass(frozen=True)
class Case:
    """A plan, its blocks [1, P] and coefficients [L, T, K] (all leaves), and gradients [L, P] of each tower's layers."""

    plan: TransferPlan
    sources: list[Tensor]
    coefficients: list[Tensor]
    grads: list[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.sources, *self.coefficients]

    @property
    def dtype(self) -> torch.dtype:
        """Of the layers."""
        return self.grads[0].dtype


def make(widths: tuple[int, int], device: str, dtype: torch.dtype) -> Case:
    """One multimodal block of the first width and one unimodal block per tower, random, in fp32."""
    size = {width: 12 * width * width for width in widths}
    targets = []
    for i, width in enumerate(widths):
        parts = []
        for full in (widths[0], width):
            found, offset = [], 0
            for name, whole, some in zip(NAMES, shapes(full), shapes(width), strict=True):
                found.append(Slice.leading(offset, whole, some, groups=3 if "in_proj" in name else 1))
                offset += whole[0] * whole[1]
            parts.append(tuple(found))
        targets.append(Target(NUM_LAYERS, NAMES, shapes(width), (0, 1 + i), tuple(parts)))
    counts = [(1, size[widths[0]]), (1, size[widths[0]]), (1, size[widths[1]])]
    generator = torch.Generator(device).manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, device=device)
    return Case(
        TransferPlan(counts, targets, device),
        [random(shape).requires_grad_() for shape in counts],
        [random(NUM_LAYERS, len(NAMES), NUM_BLOCKS).requires_grad_() for _ in widths],
        [random(NUM_LAYERS, size[width]).to(dtype) for width in widths],
    )


def exact(case: Case) -> Case:
    """The same numbers in fp64."""
    sources, coefficients = ([x.detach().double().requires_grad_() for x in part] for part in (case.sources, case.coefficients))
    return Case(case.plan, sources, coefficients, [x.double() for x in case.grads])


def read(case: Case, target: Target, tensor: int) -> list[Tensor]:
    """What one tensor reads in each block, flat [1, size] and by views where it can be."""
    found = []
    for source, slices in zip(target.sources, target.slices, strict=True):
        s = slices[tensor]
        whole = case.sources[source][:, s.offset : s.offset + s.groups * s.group_stride]
        found.append(whole.unflatten(1, (s.groups, -1, s.row_stride))[:, :, : s.rows, : s.columns].flatten(1))
    return found


def by_tensor(case: Case) -> list[Tensor]:
    """Gradients [L, size] of every tower's tensors."""
    return [g.contiguous() for x, target in zip(case.grads, case.plan.targets, strict=True) for g in x.split(target.sizes, dim=1)]


def loop(case: Case) -> list[Tensor]:
    """[L] tensors of each tensor, tower by tower, in Python."""
    made = []
    for target, a_LTK in zip(case.plan.targets, case.coefficients, strict=True):
        for g in range(len(target.names)):
            first, second = read(case, target, g)
            made += [(a_LTK[i, g, 0] * first[0] + a_LTK[i, g, 1] * second[0]).to(case.dtype) for i in range(target.num_layers)]
    return made


def gathered(case: Case) -> list[Tensor]:
    """[K, size] of every tower's tensors."""
    return [torch.cat(read(case, target, g)) for target in case.plan.targets for g in range(len(target.names))]


def product(case: Case, blocks: list[Tensor] | None = None) -> list[Tensor]:
    """[L, size] of every tower's tensors; `blocks`: as from `gathered`."""
    parts = [a_LTK[:, g] for a_LTK in case.coefficients for g in range(len(NAMES))]
    return [(a_LK @ blocks_KP).to(case.dtype) for a_LK, blocks_KP in zip(parts, blocks or gathered(case), strict=True)]


def step_of(made: Callable[[], list[Tensor]], leaves: list[Tensor], grads: list[Tensor]) -> measure.Step:
    return measure.Step(made, lambda layers: torch.autograd.grad(layers, leaves, grads))


def layer_step(case: Case, backend: str = "auto") -> measure.Step:
    """Layers one at a time: forward without keeping any, backward composes each again."""

    def forward() -> None:
        with torch.no_grad():
            for i, a_LTK in enumerate(case.coefficients):
                for a_TK in a_LTK.unbind(0):
                    transfer_layer(case.plan, i, case.sources, a_TK, out_dtype=case.dtype, backend=backend)

    def backward(_: None) -> list[Tensor]:
        totals, shares = [torch.zeros_like(x) for x in case.sources], []
        for i, a_LTK in enumerate(case.coefficients):
            target, mine = case.plan.targets[i], []
            for a_TK, grad_P in zip(a_LTK.detach().unbind(0), case.grads[i], strict=True):
                leaf = a_TK.requires_grad_()
                layer = transfer_layer(case.plan, i, case.sources, leaf, out_dtype=case.dtype, backend=backend)
                grads = [g.view(shape) for g, shape in zip(grad_P.split(target.sizes), target.shapes, strict=True)]
                found = torch.autograd.grad(list(layer.values()), [*(case.sources[s] for s in target.sources), leaf], grads)
                for source, grad in zip(target.sources, found[:-1], strict=True):
                    totals[source].add_(grad)
                mine.append(found[-1])
            shares.append(torch.stack(mine))
        return [*totals, *shares]

    return measure.Step(forward, backward)


def variants(case: Case, device: str, compiled: bool) -> dict[str, measure.Step]:
    """Steps by name; the first two are ours."""
    grads = by_tensor(case)
    by_layer = [g for tensor in grads for g in tensor.unbind(0)]
    ready = [x.detach().requires_grad_() for x in gathered(case)]

    def ours(backend: str) -> measure.Step:
        whole = functools.partial(block_transfer, case.plan, case.sources, case.coefficients, out_dtype=case.dtype, backend=backend)
        return step_of(whole, case.leaves, case.grads)

    found = {"mmlg_kernels": ours("auto"), "mmlg_kernels, by layer": layer_step(case)}
    if device == "cuda":
        found["mmlg_kernels, chunked"] = ours("chunked")
    found["loop"] = step_of(lambda: loop(case), case.leaves, by_layer)
    if compiled:
        fused = torch.compile(loop, dynamic=False)
        found["loop, compiled"] = step_of(lambda: fused(case), case.leaves, by_layer)
    found["product"] = step_of(lambda: product(case), case.leaves, grads)
    found["product, gathered before"] = step_of(lambda: product(case, ready), [*ready, *case.coefficients], grads)
    return found


def error(name: str, device: str, dtype: torch.dtype) -> float | None:
    """Largest relative L2 error of the layers (where all are kept) and the gradients against fp64 at a small size; None if it fails."""
    if name == "product, gathered before" or "compiled" in name:
        return None  # the same numbers as `product` and `loop`
    try:
        return _error(name, device, dtype)
    except Exception as fault:  # its rows will say so too
        print(f"{name} failed: {type(fault).__name__}: {fault}")
        return None


def _error(name: str, device: str, dtype: torch.dtype) -> float:
    case = make(SMALL, device, dtype)
    wide = exact(case)
    step = variants(case, device, False)[name]
    layers = step.forward()
    want = block_transfer(wide.plan, wide.sources, wide.coefficients, backend="reference")
    worst = measure.relative_error(list(step.backward(layers)), torch.autograd.grad(want, wide.leaves, wide.grads))  # type: ignore[call-overload]
    if layers is None:
        return worst
    flat = torch.cat([x.flatten() for x in layers])
    parts = want if "mmlg" in name else [g for x, t in zip(want, wide.plan.targets, strict=True) for g in x.split(t.sizes, dim=1)]
    return max(worst, measure.relative_error([flat], [torch.cat([x.flatten() for x in parts])]))


def num_operators(step: measure.Step) -> int:
    """Of one forward and one backward pass, those that move numbers."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step.backward(step.forward())
    counts = {e.key.split("::")[-1]: e.count for e in found.key_averages() if e.key.startswith(("aten::", "mmlg_kernels::"))}
    return sum(n for key, n in counts.items() if key not in FREE)


def bytes_moved(widths: tuple[int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Forward and backward: what must be read and written."""
    numbers, each = sum(12 * width * width for width in widths), dtype.itemsize
    return numbers * (4 * NUM_BLOCKS + each * NUM_LAYERS), numbers * (each * NUM_LAYERS + 8 * NUM_BLOCKS)


def rows_of(widths: tuple[int, int], dtype: torch.dtype, device: str, repeats: int, compiled: bool) -> list[measure.Row]:
    """One row per variant."""
    torch.compiler.reset()
    steps = variants(make(widths, device, dtype), device, compiled)
    found = measure.times(steps | {"copy": measure.copy_step(device)}, repeats, device)
    bandwidth = measure.copy_bytes(device) / measure.device_ms(found.pop("copy"), "forward")
    moved, rows = bytes_moved(widths, dtype), []
    for name, times in found.items():
        row: measure.Row = {"variant": name, "widths": "{} + {}".format(*widths), "layer dtype": str(dtype).removeprefix("torch.")}
        row |= {"numbers": NUM_LAYERS * sum(12 * w * w for w in widths), "copy_gb_per_second": bandwidth / 1e6, **times}
        if "note" not in row:
            for part, count in zip(("forward", "backward"), moved, strict=True):
                row[f"{part}_bytes"] = count
                row[f"{part}_share_of_copy"] = count / measure.device_ms(row, part) / bandwidth
            row["operators"] = None if "compiled" in name else num_operators(steps[name])
            if device == "cuda":
                row["extra_bytes"] = measure.extra_bytes(steps[name])
            else:
                row["extra_bytes"] = measure.extra_bytes_of_process("benchmarks.block_transfer", name, "--widths", *widths)
        rows.append(row)
    return rows


def main() -> int:
    parser = measure.arguments(__doc__)
    parser.add_argument("--widths", type=int, nargs=2, default=None, metavar=("IMAGE", "TEXT"), help="of the two towers, the wider first")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if args.peak_of is not None:
        small = variants(make(SMALL, "cpu", dtype), "cpu", False)[args.peak_of]
        measure.print_extra_bytes(small, lambda: variants(make(tuple(args.widths), "cpu", dtype), "cpu", False)[args.peak_of])
        return 0
    sizes = [(768, 512), (1024, 768), (384, 256)] if cuda else [(192, 128), (384, 256)]
    report = measure.Report("block_transfer", args.device, args.out, "mmlg_kernels", ("widths",))
    names = variants(make(SMALL, args.device, dtype), args.device, False)
    errors = {name: error(name, args.device, dtype) for name in names}
    report.facts = {"errors": errors}
    sizes = [tuple(args.widths)] if args.widths else sizes
    for widths in sizes:
        # Inductor takes long over 96 sums: only at the last size, when the other rows are written.
        compiled = cuda and widths == sizes[-1]
        report.add(rows_of(widths, dtype, args.device, args.repeats or (20 if cuda else 3), compiled))
    columns: dict[str, Callable[[measure.Row], str]] = {
        "of copy bandwidth, forward": lambda row: f"{row['forward_share_of_copy']:.0%}",
        "backward": lambda row: f"{row['backward_share_of_copy']:.0%}",
        "operators": lambda row: str(row["operators"] or "–"),
        "error against fp64": lambda row: measure.said(errors.get(row["variant"])),
    }
    print("copy: " + ", ".join(f"{x:.3g} GB/s" for x in dict.fromkeys(row["copy_gb_per_second"] for row in report.rows)))
    report.rows.sort(key=lambda row: row["numbers"])
    return report.finish(columns, "numbers")


if __name__ == "__main__":
    sys.exit(main())
