"""Both losses on a CUDA GPU against fp64, in blocks. Needs torch, triton and pytest alone, so that it runs on a bare GPU machine."""

from __future__ import annotations

import pytest
import torch
from mmlg_kernels import contrastive_loss, sigmoid_loss
from torch import Tensor

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def outputs(kind: str, x: Tensor, y: Tensor, scale: float, backend: str) -> list[Tensor]:
    """Loss and gradients by both features, the scale and (sigmoid) the bias."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), torch.tensor(scale, device=x.device, dtype=wide).requires_grad_()]
    if kind == "softmax":
        loss = contrastive_loss(*leaves, backend=backend)
    else:
        leaves.append(torch.tensor(-10.0, device=x.device, dtype=wide).requires_grad_())
        loss = sigmoid_loss(*leaves, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def features(count: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    x, y = (torch.randn(count, width, device="cuda", generator=generator) for _ in range(2))
    y[::2] = x[::2] + 0.5 * y[::2]
    return [torch.nn.functional.normalize(z, dim=-1).to(dtype) for z in (x, y)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("count", "width", "scale"), [(1000, 512, 100.0), (4099, 640, 14.3), (4096, 768, 50.0), (2048, 1024, 1.0)])
def test_error_is_no_worse_than_plain_torch(kind: str, backend: str, dtype: torch.dtype, count: int, width: int, scale: float) -> None:
    """The exact values are chunked fp64: tested against the materialised definition on the CPU."""
    x, y = features(count, width, dtype)
    exact = outputs(kind, x.double(), y.double(), scale, "chunked")
    plain = outputs(kind, x, y, scale, "reference")
    for got, same, want in zip(outputs(kind, x, y, scale, backend), plain, exact, strict=True):
        assert want.norm() > 0
        assert relative_error(got, want) <= 1.5 * relative_error(same, want) + TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_batch(kind: str, dtype: torch.dtype) -> None:
    """16,384 pairs: more than one wave of the backward pass; only chunked fp64 fits beside it."""
    x, y = features(16384, 512, dtype)
    exact = outputs(kind, x.double(), y.double(), 50.0, "chunked")
    for got, want in zip(outputs(kind, x, y, 50.0, "triton"), exact, strict=True):
        assert relative_error(got, want) <= 3 * TOLERANCE[dtype]


def test_bitwise_repeatable() -> None:
    x, y = features(4099, 512, torch.bfloat16)
    first, second = (outputs("softmax", x, y, 100.0, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_cuda_graph() -> None:
    """Forward and backward in a graph: no wait for the host, no allocation outside it, the same numbers."""
    x, y = (z.requires_grad_() for z in features(1024, 512, torch.bfloat16))
    scale = torch.tensor(50.0, device="cuda", requires_grad=True)
    expected = outputs("softmax", x.detach(), y.detach(), 50.0, "triton")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(contrastive_loss(x, y, scale), (x, y, scale))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = contrastive_loss(x, y, scale)
        found = [loss, *torch.autograd.grad(loss, (x, y, scale))]
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a.detach(), b) for a, b in zip(found, expected, strict=True))


def test_a_scale_that_is_not_positive_gives_nan() -> None:
    x, y = features(256, 64, torch.bfloat16)
    assert torch.isnan(contrastive_loss(x, y, torch.tensor(-1.0, device="cuda")))
