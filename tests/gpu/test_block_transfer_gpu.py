"""Block transfer on a CUDA GPU against its fp64 definition. Needs only torch, triton and pytest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mmlg_kernels.block_transfer import block_transfer, transfer_blocks, transfer_layer
from mmlg_kernels.transfer_plan import Slice, Target, TransferPlan
from torch import Tensor

from tests.gpu import common
from tests.gpu.common import TOLERANCE, captured, relative_error

pytestmark = pytest.mark.gpu
NAMES = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
Case = tuple[TransferPlan, list[Tensor], list[Tensor], list[Tensor]]


def shapes(width: int) -> tuple[tuple[int, int], ...]:
    return ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))


def slices(full: int, part: int) -> tuple[Slice, ...]:
    found, offset = [], 0
    for name, whole, some in zip(NAMES, shapes(full), shapes(part), strict=True):
        found.append(Slice.leading(offset, whole, some, groups=3 if "in_proj" in name else 1))
        offset += whole[0] * whole[1]
    return tuple(found)


def case(multimodal: int, unimodal: int, widths: tuple[int, int], depths: tuple[int, int], dtype: torch.dtype) -> Case:
    """Two towers: plan, fp32 blocks, coefficients, and gradients of the layers in their dtype."""
    generator = torch.Generator(common.DEVICE).manual_seed(multimodal * 7 + unimodal)
    size = {width: 12 * width * width for width in widths}
    targets = [
        Target(depth, NAMES, shapes(width), (0, 1 + i), (slices(widths[0], width), slices(width, width)))
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True))
    ]
    counts = [(multimodal, size[widths[0]]), (unimodal, size[widths[0]]), (unimodal, size[widths[1]])]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=common.DEVICE)

    sources = [random(*shape).requires_grad_() for shape in counts]
    coefficients = [random(depth, 4, multimodal + unimodal).requires_grad_() for depth in depths]
    grads = [random(depth, size[width]).to(dtype) for width, depth in zip(widths, depths, strict=True)]
    return TransferPlan(counts, targets, common.DEVICE), sources, coefficients, grads


def run(given: Case, backend: str = "triton") -> list[Tensor]:
    """The layers, and the gradients of blocks that are there and of coefficients."""
    plan, sources, coefficients, grads = given
    layers = block_transfer(plan, sources, coefficients, out_dtype=grads[0].dtype, backend=backend)
    return [*layers, *torch.autograd.grad(layers, [*(x for x in sources if x.numel()), *coefficients], grads)]


def exact(given: Case) -> list[Tensor]:
    plan, sources, coefficients, grads = given
    wide = [[x.detach().double().requires_grad_() for x in part] for part in (sources, coefficients)]
    return run((plan, *wide, [x.double() for x in grads]), "reference")


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize(("multimodal", "unimodal"), [(1, 1), (2, 1), (1, 0), (0, 1), (4, 4)])
@pytest.mark.parametrize("widths", [(192, 128), (96, 40)])
def test_equals_fp64(dtype: torch.dtype, backend: str, multimodal: int, unimodal: int, widths: tuple[int, int]) -> None:
    """fp32 blocks; layers and their gradients in `dtype`, rounded once. The gradients of blocks and coefficients are sums in fp32."""
    given = case(multimodal, unimodal, widths, (5, 3), dtype)
    for i, (got, want) in enumerate(zip(run(given, backend), exact(given), strict=True)):
        assert want.norm() > 0
        # Chunked torch rounds nothing but the layers either: their gradients widen to fp32 first.
        assert relative_error(got, want) <= (TOLERANCE[dtype] if i < 2 else 1e-5), i


def test_vit_b_32_and_bitwise_repeat() -> None:
    """12 layers of 768 and 512, bf16."""
    given = case(1, 1, (768, 512), (12, 12), torch.bfloat16)
    first, second = run(given), run(given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for i, (got, want) in enumerate(zip(first, exact(given), strict=True)):
        assert relative_error(got, want) <= (TOLERANCE[torch.bfloat16] if i < 2 else 1e-5), i


def test_layers_are_rounded_once() -> None:
    given = case(1, 1, (192, 128), (4, 3), torch.bfloat16)
    single = block_transfer(*given[:3], backend="triton")
    with torch.autocast(common.DEVICE, torch.bfloat16):
        half = block_transfer(*given[:3], out_dtype=torch.bfloat16, backend="triton")
    assert all(torch.equal(a.to(torch.bfloat16), b) for a, b in zip(single, half, strict=True))


@pytest.mark.parametrize("widths", [(17, 5), (300, 12), (1, 1)])
def test_odd_sizes(widths: tuple[int, int]) -> None:
    """Rows of other lengths than tiles; nothing is aligned."""
    blocks = [{"a": torch.randn(*widths, device=common.DEVICE), "b": torch.randn(widths[0], device=common.DEVICE)} for _ in range(3)]
    coefficients = torch.randn(3, 2, 3, device=common.DEVICE)
    for layer, a in zip(transfer_blocks(blocks, coefficients, backend="triton"), coefficients, strict=True):
        for g, name in enumerate(("a", "b")):
            torch.testing.assert_close(layer[name], sum(a[g, k] * blocks[k][name] for k in range(3)))


def test_one_layer_is_that_layer_of_all() -> None:
    plan, sources, coefficients, _ = case(2, 1, (192, 128), (5, 3), torch.float32)
    for i, layers in enumerate(block_transfer(plan, sources, coefficients, backend="triton")):
        for layer, named in enumerate(plan.views(i, layers)):
            one = transfer_layer(plan, i, sources, coefficients[i][layer], backend="triton")
            for name in NAMES:
                torch.testing.assert_close(one[name], named[name])


def test_cuda_graph() -> None:
    """Forward and backward; the plan's tables are on the device before."""
    given = case(1, 1, (192, 128), (4, 3), torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(captured(lambda: run(given)), run(given), strict=True))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_torch_compile(backend: str) -> None:
    plan, sources, coefficients, _ = case(1, 1, (96, 64), (3, 2), torch.float32)
    leaves = [*sources, *coefficients]

    def total(*given: Tensor) -> Tensor:
        layers = block_transfer(plan, given[:3], given[3:], backend="triton")
        return layers[0].sin().sum() + layers[1].sin().sum()

    compiled: Callable[..., Tensor] = torch.compile(total, fullgraph=True, backend=backend)
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(total(*leaves), leaves), strict=True):
        assert relative_error(got, want.double()) <= 1e-5
