"""How long and how much memory do the contrastive losses take, next to open_clip's and to one that stores the similarities?

    python -m benchmarks.contrastive_loss                       # 1,024 and 8,192 pairs on the CPU, under two minutes
    python -m benchmarks.contrastive_loss --kind sigmoid        # SigLIP's loss
    python -m benchmarks.contrastive_loss --device cuda         # up to 65,536 pairs
    python -m benchmarks.contrastive_loss --pairs 4096 --width 768

All variants in turn on random unit rows at scale 100; forward, backward and both; `measure` says how times and memory are taken. Each
variant's error against fp64 is measured in the same run. On a GPU features are bf16 and open_clip's losses run under bf16 autocast, as
training runs them. The floor is 8 B^2 D floating-point operations (2 forward, 6 backward with one recomputation) at the rate of torch's
square matrix product in the same run; the rate at inner dimension D is in the JSON. Depends on torch and mmlg_kernels; open_clip,
matplotlib and, with --rivals on a GPU, the published losses of `benchmarks.rivals` are used where they are installed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from mmlg_kernels import contrastive_loss, sigmoid_loss
from torch import Tensor

from benchmarks import measure, rivals

Loss = Callable[..., Tensor]
SCALES = {"softmax": 100.0, "sigmoid": 10.0}
"""Of the similarities, by kind of loss."""
MOST_CHUNKED = 16_384
"""Pairs for which the chunked backend, meant for where there is no Triton, is measured on a GPU: it takes thousands of small steps."""


def one_matrix(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The plainest way: the similarities once, stored."""
    logits = scale * (x @ y.T)
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def one_matrix_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss, the similarities stored."""
    logits = scale * (x @ y.T) + bias
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(x)


def as_open_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """What open_clip's ClipLoss computes on one rank: the similarities twice."""
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(scale * x @ y.T, labels) + F.cross_entropy(scale * y @ x.T, labels)) / 2


def as_open_clip_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """What open_clip's SigLipLoss computes on one rank."""
    logits = scale * x @ y.T + bias
    labels = 2 * torch.eye(len(x), device=x.device, dtype=x.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(x)


def under_autocast(loss: Loss) -> Loss:
    """The loss as training in bf16 runs it on a GPU."""

    def run(*given: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return loss(*given)

    return run


def variants(kind: str, device: str, compiled: bool, others: bool = False) -> dict[str, Loss]:
    """Losses by name; the first is ours. With `others`, on a GPU, next to those of other packages only (`rivals`)."""
    ours, plain, copy = (contrastive_loss, one_matrix, as_open_clip) if kind == "softmax" else _sigmoid_losses()
    found: dict[str, Loss] = {"mmlg_kernels": ours}
    if others:
        return found | rivals.installed(kind, SCALES[kind])
    if device == "cuda":
        found["mmlg_kernels, chunked"] = functools.partial(ours, backend="chunked")
    mixed = under_autocast if device == "cuda" else lambda loss: loss
    try:
        from mmlg_scale.towers import open_clip

        found["open_clip"] = mixed(open_clip.loss.ClipLoss() if kind == "softmax" else open_clip.loss.SigLipLoss())
    except ImportError:
        found["as open_clip"] = mixed(copy)
    if compiled:
        # Per size: shapes that change would give the rival slower kernels.
        found["as open_clip, compiled"] = torch.compile(mixed(copy), dynamic=False)
    found["one matrix, stored"] = plain
    return found


def _sigmoid_losses() -> tuple[Loss, Loss, Loss]:
    return sigmoid_loss, one_matrix_sigmoid, as_open_clip_sigmoid


def inputs(kind: str, count: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Random unit rows, the scale, and SigLIP's bias, which begins at -10 (Zhai et al. 2023, section 3.2)."""
    generator = torch.Generator(device).manual_seed(0)
    rows = [F.normalize(torch.randn(count, width, generator=generator, device=device), dim=-1).to(dtype) for _ in range(2)]
    numbers = [SCALES[kind]] if kind == "softmax" else [SCALES[kind], -10.0]
    return [*(x.requires_grad_() for x in rows), *(torch.tensor(x, device=device, requires_grad=True) for x in numbers)]


def error(kind: str, loss: Loss, dtype: torch.dtype, device: str) -> float | None:
    """Largest relative L2 error of loss and gradients against fp64 at 1,000 x 512; None for a loss that fails."""
    given = inputs(kind, 1000, 512, dtype, device)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    try:
        value = loss(*given)
        found = (value, *torch.autograd.grad(value, given))
    except Exception as fault:  # of a rival that does not run here; its rows will say so too
        print(f"a loss failed: {type(fault).__name__}: {fault}")
        return None
    expected = (one_matrix if kind == "softmax" else one_matrix_sigmoid)(*exact)
    return measure.relative_error(found, (expected, *torch.autograd.grad(expected, exact)))


def rows_of(
    kind: str, count: int, width: int, losses: Mapping[str, Loss], dtype: torch.dtype, device: str, repeats: int, rate: float
) -> list[measure.Row]:
    """One row for each of `losses`."""
    torch.compiler.reset()
    given = inputs(kind, count, width, dtype, device)
    steps = {name: measure.loss_step(loss, given) for name, loss in losses.items() if "chunked" not in name or count <= MOST_CHUNKED}
    rows = []
    for name, found in measure.times(steps, repeats, device).items():
        row: measure.Row = {"variant": name, "pairs": count, "width": width, "dtype": str(dtype).removeprefix("torch."), **found}
        if "note" not in row:
            floor_ms = 8 * count**2 * width / rate / 1e9
            row["times_floor"] = measure.device_ms(row) / floor_ms
            if device == "cuda":
                row["extra_bytes"] = measure.extra_bytes(steps[name])
            elif "compiled" not in name:
                sizes = ("--kind", kind, "--pairs", count, "--width", width)
                row["extra_bytes"] = measure.extra_bytes_of_process("benchmarks.contrastive_loss", name, *sizes)
        rows.append(row)
    return rows


def main() -> int:
    parser = measure.arguments(__doc__)
    parser.add_argument("--kind", choices=list(SCALES), default="softmax")
    parser.add_argument("--pairs", type=int, nargs="+", default=None)
    parser.add_argument("--width", type=int, nargs="+", default=None)
    parser.add_argument("--rivals", action="store_true", help="on a GPU: ours next to the losses of other packages that are installed")
    parser.add_argument("--compile", action="store_true", help="what open_clip computes through torch.compile too (a minute on a CPU)")
    args = parser.parse_args()
    if args.peak_of is not None:
        loss, width = variants(args.kind, "cpu", False)[args.peak_of], args.width[0]
        small, real = ((args.kind, count, width, torch.float32, "cpu") for count in (64, args.pairs[0]))
        measure.print_extra_bytes(measure.loss_step(loss, inputs(*small)), lambda: measure.loss_step(loss, inputs(*real)))
        return 0
    cuda = args.device == "cuda"
    dtype, compiled = torch.bfloat16 if cuda else torch.float32, args.compile or cuda
    if args.rivals and not cuda:
        parser.error("--rivals needs --device cuda: the other packages have kernels for GPUs only")
    pairs = args.pairs or ([4096, 16384, 32768, 65536] if cuda else [1024, 8192])
    widths = args.width or ([512, 768, 1024] if cuda else [512])
    repeats = args.repeats or (20 if cuda else 3)
    name = ("contrastive_loss" if args.kind == "softmax" else "sigmoid_loss") + ("_rivals" if args.rivals else "")
    report = measure.Report(name, args.device, args.out, "mmlg_kernels", ("pairs", "width"))
    found = variants(args.kind, args.device, compiled, args.rivals)
    if "open_clip" not in found and not args.rivals:
        print("open_clip is not installed: left out; `as open_clip` is a copy of what its loss computes")
    errors = {variant: error(args.kind, loss, dtype, args.device) for variant, loss in found.items()}
    rate = measure.matmul_tflops(args.device, dtype)
    by_width = {width: measure.matmul_tflops(args.device, dtype, width) for width in widths}
    report.facts = {"errors": errors, "matmul_tflops": rate, "matmul_tflops_at_width": by_width}
    for width in widths:
        for count in pairs:
            rows = rows_of(args.kind, count, width, found, dtype, args.device, repeats, rate)
            report.add([row | {"drawn": width == widths[0]} for row in rows])
    columns = {"× floor": lambda row: f"{row['times_floor']:.2f}", "error against fp64": lambda row: measure.said(errors[row["variant"]])}
    print(f"matrix product: {rate:.3g} TFLOP/s")
    return report.finish(columns, "pairs")


if __name__ == "__main__":
    sys.exit(main())
