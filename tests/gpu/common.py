"""What the GPU tests share. Needs only torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def features(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Unit rows, half of them near their pair, so that some probabilities are near one."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x, y = (torch.randn(count, width, device=DEVICE, generator=generator) for _ in range(2))
    y[::2] = x[::2] + 0.5 * y[::2]
    return [torch.nn.functional.normalize(z, dim=-1).to(dtype) for z in (x, y)]


def number(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A scale or a bias, a leaf; fp32 beside features of less than fp64."""
    return torch.tensor(value, device=DEVICE, dtype=torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def errors(found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float) -> list[str]:
    """Outputs whose relative L2 error is above 1.5 times that of plain torch in the same precision plus the tolerance."""
    wrong = []
    for i, (got, same, want) in enumerate(zip(found, plain, exact, strict=True)):
        assert want.norm() > 0
        if not (e := relative_error(got, want)) <= (allowed := 1.5 * relative_error(same, want) + tolerance):
            wrong.append(f"output {i}: {e:.2e} > {allowed:.2e}")
    return wrong


def captured(function: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What a CUDA graph of `function` computes when replayed: captured after three runs on a side stream, as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()
    for x in found:
        x.detach().fill_(torch.nan)  # only a replay can make the numbers right
    graph.replay()
    torch.cuda.synchronize()
    return [x.detach() for x in found]
