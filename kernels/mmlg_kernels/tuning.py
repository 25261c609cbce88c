"""Measure which tiles are fastest on this GPU and keep them in the table that the kernels read.

    python -m mmlg_kernels.tuning                          # bf16, all kernels: minutes, most of them compiling
    python -m mmlg_kernels.tuning --dtype float32 --kernel softmax_forward softmax_gradient
    python -m mmlg_kernels.tuning --out DIR                # a table in DIR, which is read where MMLG_TILES=DIR is set

Each candidate computes the whole forward or backward pass of its loss and must give what the fixed tile gives; one that does not fit the
chip is left out. The fixed tile stays unless another is at least 2 % faster. The table is written after every kernel.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from mmlg_kernels import tiled, tiled_distillation, tiles
from mmlg_kernels.chunked import DistillationInputs
from mmlg_kernels.tiles import DEFAULTS, Tile

GAIN = 0.98
"""A measured tile replaces the fixed one when it takes at most this share of its time: less is noise."""
AGREEMENT = 2e-3
"""Largest relative L2 difference from what the fixed tile computes: sums in another order, no more."""
HALF = [(128, 64, 64, 8, 3), (128, 64, 64, 4, 3), (128, 64, 64, 8, 4), (128, 128, 64, 8, 2), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4)]
HALF += [(128, 128, 32, 8, 4), (128, 256, 64, 8, 3), (256, 64, 64, 8, 3), (256, 128, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 64, 4, 4)]
SINGLE = [(64, 64, 32, 4, 3), (64, 64, 32, 8, 3), (128, 64, 32, 8, 3), (64, 128, 32, 8, 3), (128, 128, 32, 8, 2), (64, 64, 16, 4, 4)]
CANDIDATES = {2: [Tile(*values) for values in HALF], 4: [Tile(*values) for values in SINGLE]}
"""By the bytes of a number."""
Run = Callable[[], Sequence[Tensor]]


def runs(pairs: int, width: int, teacher_width: int, dtype: torch.dtype, device: str) -> dict[str, Run]:
    """Per kernel, the pass that launches it, on random unit rows."""
    generator = torch.Generator(device).manual_seed(0)

    def rows(columns: int) -> Tensor:
        drawn = torch.randn(pairs, columns, device=device, generator=generator)
        return torch.nn.functional.normalize(drawn, dim=-1).to(dtype)

    x, y, u, v = rows(width), rows(width), rows(teacher_width), rows(teacher_width)
    scale, bias = torch.tensor(50.0, device=device), torch.tensor(-10.0, device=device)
    row_lse, column_lse = tiled.softmax_forward(x, y, scale, 0)
    u_lse, v_lse = tiled.softmax_forward(u, v, scale, 0)
    given = DistillationInputs(x, y, scale, u, v, scale, u_lse, v_lse)

    def backward(function: Callable[..., Any], *inputs: Any) -> Run:
        def run() -> Sequence[Tensor]:
            dx, dy = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(y, dtype=torch.float32)
            function(*inputs, 0, dx, dy)
            return dx, dy

        return run

    def ranked() -> Sequence[Tensor]:
        own = tiled.own_logits(x, y, scale)  # by the same tile, so that it rounds alike
        return tiled.ranked_softmax_forward(x, y, scale, 0, own, own)

    return {
        "softmax_forward": functools.partial(tiled.softmax_forward, x, y, scale, 0),
        "softmax_forward_ranks": ranked,
        "softmax_gradient": backward(tiled.softmax_backward, x, y, scale, 0, row_lse, column_lse),
        "sigmoid_forward": lambda: [tiled.sigmoid_forward(x, y, scale, bias, 0, 0)],
        "sigmoid_gradient": backward(tiled.sigmoid_backward, x, y, scale, bias, 0),
        "distillation_forward": functools.partial(tiled_distillation.distillation_forward, given, 0),
        "distillation_gradient": backward(tiled_distillation.distillation_backward, given, 0, row_lse, column_lse, (1.0, 1.0)),
    }


def tune(
    kernel: str, run: Run, default: Tile, candidates: Sequence[Tile], milliseconds: Callable[[Run], float]
) -> tuple[Tile, dict[str, float | str]]:
    """The fastest tile that gives the default's numbers, and each one's milliseconds or why it has none."""
    expected, times = run(), dict[Tile, float]()
    said: dict[str, float | str] = {}
    for tile in dict.fromkeys([default, *candidates]):
        name = " ".join(map(str, (tile.rows, tile.columns, tile.depth, tile.num_warps, tile.num_stages)))
        with tiles.forced(kernel, tile):
            try:
                found = run()
                if (apart := difference(found, expected)) <= AGREEMENT:
                    times[tile] = milliseconds(run)
                    said[name] = times[tile]
                else:
                    said[name] = f"{apart:.1e} from the fixed tile's numbers"
            except Exception as fault:  # Triton's, ptxas's and LLVM's passes all have errors of their own for what does not fit
                if tile == default:
                    raise
                said[name] = f"does not fit: {type(fault).__name__}: {' '.join(str(fault).split())[:100]}"
    best = min(times, key=lambda tile: times[tile])
    return (best if times[best] <= GAIN * times[default] else default), said


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest ||found - expected|| / ||expected|| of the outputs; infinite where one is not finite."""
    apart = [float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)) for a, b in zip(found, expected, strict=True)]
    return max(value if math.isfinite(value) else math.inf for value in apart)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=list(DEFAULTS), default=list(DEFAULTS), metavar="KERNEL", help=", ".join(DEFAULTS))
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--pairs", type=int, default=16384)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--teacher-width", type=int, default=768)
    parser.add_argument("--out", default=None, help="folder of the table (default: MMLG_TILES, or ~/.cache/mmlg_kernels)")
    args = parser.parse_args()
    if args.out is not None:
        os.environ["MMLG_TILES"] = args.out
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU here; tiles are measured on the GPU that they are for")
    gpu, dtype = torch.cuda.get_device_name(), getattr(torch, args.dtype)
    path = tiles.table_path(gpu)
    kept, measured = dict(tiles.read_table(path)), {}
    passes = runs(args.pairs, args.width, args.teacher_width, dtype, "cuda")
    clock: Callable[[Any], float] = functools.partial(triton.testing.do_bench, return_mode="median")
    for kernel in args.kernel:
        default = DEFAULTS[kernel][dtype.itemsize]
        best, said = tune(kernel, passes[kernel], default, CANDIDATES[dtype.itemsize], clock)
        kept[tiles.key_of(kernel, dtype)], measured[tiles.key_of(kernel, dtype)] = best, said
        tiles.write_table(path, gpu, kept, measured)
        print(f"{kernel} {args.dtype}: {best}{' (the fixed one)' if best == default else ''}", flush=True)
        for name, value in said.items():
            print(f"  {name:>20}: {value if isinstance(value, str) else f'{value:.3f} ms'}")
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
