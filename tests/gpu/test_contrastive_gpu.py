"""Both losses on a CUDA GPU against fp64, in blocks. Needs only torch, triton and pytest, so that it runs on a bare GPU machine."""

from __future__ import annotations

import pytest
import torch
from mmlg_kernels import contrastive_loss, sigmoid_loss
from torch import Tensor

from tests.gpu.common import DEVICE, TOLERANCE, captured, errors, features, number, relative_error

pytestmark = pytest.mark.gpu


def leaves_of(kind: str, x: Tensor, y: Tensor, scale: float) -> list[Tensor]:
    """Both features, the scale and (sigmoid) the bias."""
    found = [x.clone().requires_grad_(), y.clone().requires_grad_(), number(scale, x.dtype)]
    return found if kind == "softmax" else [*found, number(-10.0, x.dtype)]


def run(kind: str, leaves: list[Tensor], backend: str = "triton") -> list[Tensor]:
    """Loss and gradients."""
    loss = (contrastive_loss if kind == "softmax" else sigmoid_loss)(*leaves, backend=backend)
    return [loss, *torch.autograd.grad(loss, leaves)]


def outputs(kind: str, x: Tensor, y: Tensor, scale: float, backend: str) -> list[Tensor]:
    return [z.detach() for z in run(kind, leaves_of(kind, x, y, scale), backend)]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("count", "width", "scale"), [(1000, 512, 100.0), (4099, 640, 14.3), (4096, 768, 50.0), (2048, 1024, 1.0)])
def test_error_is_no_worse_than_plain_torch(kind: str, backend: str, dtype: torch.dtype, count: int, width: int, scale: float) -> None:
    """The exact values are chunked fp64: tested against the materialised definition on the CPU."""
    x, y = features(count, width, dtype)
    exact = outputs(kind, x.double(), y.double(), scale, "chunked")
    plain = outputs(kind, x, y, scale, "reference")
    assert errors(outputs(kind, x, y, scale, backend), plain, exact, TOLERANCE[dtype]) == []


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_batch(kind: str, dtype: torch.dtype) -> None:
    """16,384 pairs: more than one wave of the backward pass; only chunked fp64 fits beside it."""
    x, y = features(16384, 512, dtype)
    exact = outputs(kind, x.double(), y.double(), 50.0, "chunked")
    for got, want in zip(outputs(kind, x, y, 50.0, "triton"), exact, strict=True):
        assert relative_error(got, want) <= 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_bitwise_repeatable(kind: str) -> None:
    x, y = features(4099, 512, torch.bfloat16)
    first, second = (outputs(kind, x, y, 100.0, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_cuda_graph(kind: str) -> None:
    """Forward and backward in a graph: no wait for the host, no allocation outside it, the same numbers."""
    x, y = features(1024, 512, torch.bfloat16)
    leaves = leaves_of(kind, x, y, 50.0)
    found = captured(lambda: run(kind, leaves))
    assert all(torch.equal(a, b) for a, b in zip(found, outputs(kind, x, y, 50.0, "triton"), strict=True))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_torch_compile(kind: str, backend: str) -> None:
    """One graph without breaks, autocast and normalisation around the loss, the same numbers."""
    x, y = features(1000, 512, torch.float32)
    leaves = leaves_of(kind, x, y, 20.0)

    def whole(*given: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return (contrastive_loss if kind == "softmax" else sigmoid_loss)(*given, normalize=True)

    expected = torch.autograd.grad(whole(*leaves), leaves)
    for got, want in zip(
        torch.autograd.grad(torch.compile(whole, fullgraph=True, backend=backend)(*leaves), leaves), expected, strict=True
    ):
        assert relative_error(got, want.double()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1000, 4099])
def test_ranks(dtype: torch.dtype, count: int) -> None:
    """Against fp64; ties and near-ties within the rounding of a product may fall either way, so a few may differ by a few places."""
    x, y = features(count, 512, dtype)
    loss, image_ranks, text_ranks = contrastive_loss(x, y, number(50.0), return_ranks=True)
    torch.testing.assert_close(loss, contrastive_loss(x, y, number(50.0)), rtol=1e-6, atol=0.0)  # its tile may differ
    logits = x.double() @ y.double().T
    own = logits.diagonal()
    for got, want in ((image_ranks, 1 + (logits > own[:, None]).sum(1)), (text_ranks, 1 + (logits > own[None, :]).sum(0))):
        assert got.shape == (count,)
        assert (got != want).double().mean() <= 0.01
        assert (got - want).abs().max() <= 2
        assert (want == 1).any()
        assert (want > 10).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_of_equal_rows(dtype: torch.dtype) -> None:
    """Texts that several images share: none of the equal ones is above another. Products of small integers are exact."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-8, 9, (1000, 256), generator=generator).to(DEVICE, dtype) for _ in range(2))
    y = y[torch.arange(1000) // 3]
    _, *found = contrastive_loss(x, y, number(1 / 128), return_ranks=True)
    logits = x.double() @ y.double().T
    own = logits.diagonal()
    for got, want in zip(found, (1 + (logits > own[:, None]).sum(1), 1 + (logits > own[None, :]).sum(0)), strict=True):
        assert torch.equal(got, want)


def test_a_scale_that_is_not_positive_gives_nan() -> None:
    x, y = features(256, 64, torch.bfloat16)
    assert torch.isnan(contrastive_loss(x, y, number(-1.0)))
