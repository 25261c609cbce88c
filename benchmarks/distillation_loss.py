"""How long and how much memory does the contrastive distillation loss take, next to open_clip's and to one that stores the similarities?

    python -m benchmarks.distillation_loss                       # 512 and 2,048 pairs on the CPU, under two minutes
    python -m benchmarks.distillation_loss --device cuda         # up to 32,768 pairs, bf16
    python -m benchmarks.distillation_loss --pairs 4096 --width 512 --teacher-width 1024 --kind kl

All variants in turn on random unit rows, the student's at scale 50 and the teacher's at 100; forward, backward and both; `measure` says how
times and memory are taken, and each variant's error against fp64 is measured in the same run. The floor is 4 B^2 (Ds + Dt) + 4 B^2 Ds
floating-point operations (both matrices of similarities in the forward pass and again in the backward pass, and two products for the
student's gradients) at the rate of torch's square matrix product in the same run. Ours forms the teacher's log-sum-exps inside the time:
they are not given.

open_clip's DistillClipLoss computes the same sum of contrastive loss and cross entropy as `kind="affinity"` with both weights one (its
training loop adds the two up, and so does this file). It differs in these: two products per direction and matrix, all of them
stored; the teacher's features would receive gradients (here they require none, as in its training); no weights and no KL form; logits and
softmax in the precision that autocast chooses. For `--kind kl` it is left out. On a GPU it runs under bf16 autocast, as training runs it.
Depends on torch and mmlg_kernels; open_clip and matplotlib are used where they are installed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmlg_kernels.distillation import contrastive_distillation_loss
from torch import Tensor

from benchmarks import measure
from benchmarks.contrastive_loss import under_autocast

Loss = Callable[..., Tensor]


def stored(x: Tensor, y: Tensor, s: Tensor, u: Tensor, v: Tensor, t: Tensor, *, kind: str) -> Tensor:
    """The definition, materialised: one product for each of the two matrices, both kept."""
    logits, theirs = s * (x @ y.T), t * (u @ v.T)
    labels = torch.arange(len(x), device=x.device)
    total = torch.zeros((), dtype=logits.dtype, device=x.device)
    for ours, other in ((logits, theirs), (logits.T, theirs.T)):
        log_p, log_q = ours.log_softmax(dim=1), other.log_softmax(dim=1)
        total = total + F.nll_loss(log_p, labels) / 2
        total = total - (log_q.exp() * (log_p if kind == "affinity" else log_p - log_q)).sum(dim=1).mean() / 2
    return total


def as_open_clip(x: Tensor, y: Tensor, s: Tensor, u: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """What open_clip's DistillClipLoss computes on one rank, its two terms added up: a product for each direction of each matrix."""
    labels = torch.arange(len(x), device=x.device)
    total = torch.zeros((), device=x.device)
    for ours, other in ((s * x @ y.T, t * u @ v.T), (s * y @ x.T, t * v @ u.T)):
        total = total + F.cross_entropy(ours, labels) / 2
        total = total - (other.softmax(dim=1) * ours.log_softmax(dim=1)).sum(dim=1).mean(dim=0) / 2
    return total


def variants(kind: str, device: str, compiled: bool) -> dict[str, Loss]:
    """Losses by name; the first is ours."""
    ours = functools.partial(contrastive_distillation_loss, contrastive_weight=1.0, distillation_weight=1.0, kind=kind)
    found: dict[str, Loss] = {"mmlg_kernels": ours}
    if device == "cuda":
        found["mmlg_kernels, chunked"] = functools.partial(ours, backend="chunked")
    mixed = under_autocast if device == "cuda" else lambda loss: loss
    if kind == "affinity":
        try:
            from mmlg_scale.towers import open_clip

            module = open_clip.loss.DistillClipLoss()
            found["open_clip"] = mixed(lambda *given: sum(module(*given)))
        except ImportError:
            found["as open_clip"] = mixed(as_open_clip)
        if compiled:
            found["as open_clip, compiled"] = torch.compile(mixed(as_open_clip), dynamic=False)
    found["two matrices, stored"] = functools.partial(stored, kind=kind)
    return found


def inputs(count: int, widths: tuple[int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """The student's unit rows and scale, with gradient; the teacher's, without."""
    generator = torch.Generator(device).manual_seed(0)
    sides: list[Tensor] = []
    for width, scale, learns in ((widths[0], 50.0, True), (widths[1], 100.0, False)):
        rows = [F.normalize(torch.randn(count, width, generator=generator, device=device), dim=-1).to(dtype) for _ in range(2)]
        sides += [x.requires_grad_(learns) for x in (*rows, torch.tensor(scale, device=device))]
    return sides


def error(kind: str, loss: Loss, widths: tuple[int, int], dtype: torch.dtype, device: str) -> float | None:
    """Largest relative L2 error of loss and gradients against fp64 at 1,000 pairs; None for a loss that fails."""
    given = inputs(1000, widths, dtype, device)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in given]
    try:
        value = loss(*given)
        found = (value, *torch.autograd.grad(value, given[:3]))
    except Exception as fault:  # its rows will say so too
        print(f"a loss failed: {type(fault).__name__}: {fault}")
        return None
    expected = stored(*exact, kind=kind)
    return measure.relative_error(found, (expected, *torch.autograd.grad(expected, exact[:3])))


def rows_of(
    kind: str, count: int, widths: tuple[int, int], dtype: torch.dtype, device: str, repeats: int, compiled: bool, rate: float
) -> list[measure.Row]:
    """One row per variant."""
    torch.compiler.reset()
    given = inputs(count, widths, dtype, device)
    steps = {name: measure.loss_step(loss, given) for name, loss in variants(kind, device, compiled).items()}
    rows = []
    for name, found in measure.times(steps, repeats, device).items():
        row: measure.Row = {"variant": name, "pairs": count, "width": widths[0], "teacher width": widths[1]}
        row |= {"dtype": str(dtype).removeprefix("torch."), **found}
        if "note" not in row:
            floor_ms = 4 * count**2 * (2 * widths[0] + widths[1]) / rate / 1e9
            row["times_floor"] = measure.device_ms(row) / floor_ms
            if device == "cuda":
                row["extra_bytes"] = measure.extra_bytes(steps[name])
            elif "compiled" not in name:
                sizes = ("--kind", kind, "--pairs", count, "--width", widths[0], "--teacher-width", widths[1])
                row["extra_bytes"] = measure.extra_bytes_of_process("benchmarks.distillation_loss", name, *sizes)
        rows.append(row)
    return rows


def main() -> int:
    parser = measure.arguments(__doc__)
    parser.add_argument("--kind", choices=["affinity", "kl"], default="affinity")
    parser.add_argument("--pairs", type=int, nargs="+", default=None)
    parser.add_argument("--width", type=int, default=512, help="of the student's features")
    parser.add_argument("--teacher-width", type=int, default=768)
    parser.add_argument("--compile", action="store_true", help="what open_clip computes through torch.compile too (a minute on a CPU)")
    args = parser.parse_args()
    widths = (args.width, args.teacher_width)
    if args.peak_of is not None:
        loss = variants(args.kind, "cpu", False)[args.peak_of]
        small, real = ((count, widths, torch.float32, "cpu") for count in (64, args.pairs[0]))
        measure.print_extra_bytes(measure.loss_step(loss, inputs(*small)), lambda: measure.loss_step(loss, inputs(*real)))
        return 0
    cuda = args.device == "cuda"
    dtype, compiled = torch.bfloat16 if cuda else torch.float32, args.compile or cuda
    pairs = args.pairs or ([4096, 16384, 32768] if cuda else [512, 2048])
    report = measure.Report("distillation_loss", args.device, args.out, "mmlg_kernels", ("pairs", "width", "teacher width"))
    found = variants(args.kind, args.device, compiled)
    if "open_clip" not in found:
        said = "has no KL form" if args.kind == "kl" else "is not installed; `as open_clip` is a copy of what its loss computes"
        print(f"open_clip left out: it {said}")
    errors = {name: error(args.kind, loss, widths, dtype, args.device) for name, loss in found.items()}
    rate = measure.matmul_tflops(args.device, dtype)
    report.facts = {"kind": args.kind, "errors": errors, "matmul_tflops": rate}
    report.facts["matmul_tflops_at_width"] = {width: measure.matmul_tflops(args.device, dtype, width) for width in widths}
    for count in pairs:
        report.add(rows_of(args.kind, count, widths, dtype, args.device, args.repeats or (20 if cuda else 3), compiled, rate))
    columns = {"× floor": lambda row: f"{row['times_floor']:.2f}", "error against fp64": lambda row: measure.said(errors[row["variant"]])}
    print(f"matrix product: {rate:.3g} TFLOP/s")
    return report.finish(columns, "pairs")


if __name__ == "__main__":
    sys.exit(main())
