"""Block transfer against its fp64 definition and against plain slicing, values and gradients."""

from __future__ import annotations

import pytest
import torch
from mmlg_kernels import transfer_tiles
from mmlg_kernels.block_transfer import block_transfer, transfer_blocks, transfer_layer
from mmlg_kernels.transfer_plan import Slice, Target, TransferPlan
from torch import Tensor

NAMES = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def shapes(width: int) -> tuple[tuple[int, int], ...]:
    return ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))


def slices(full: int, part: int) -> tuple[Slice, ...]:
    found, offset = [], 0
    for name, whole, some in zip(NAMES, shapes(full), shapes(part), strict=True):
        found.append(Slice.leading(offset, whole, some, groups=3 if "in_proj" in name else 1))
        offset += whole[0] * whole[1]
    return tuple(found)


def case(multimodal: int, unimodal: int, image: int, text: int, depths: tuple[int, int]) -> tuple[TransferPlan, list[Tensor], list[Tensor]]:
    """Both towers: shared blocks of the image tower's width and blocks of each tower's own; coefficients of both signs, some zero."""
    generator = torch.Generator().manual_seed(multimodal * 7 + unimodal)
    size = {width: sum(a * b for a, b in shapes(width)) for width in (image, text)}
    targets = [
        Target(depth, NAMES, shapes(width), (0, 1 + i), (slices(image, width), slices(width, width)))
        for i, (width, depth) in enumerate(zip((image, text), depths, strict=True))
    ]
    counts = [(multimodal, size[image]), (unimodal, size[image]), (unimodal, size[text])]
    sources = [torch.randn(shape, generator=generator) for shape in counts]
    coefficients = [torch.randn(depth, 4, multimodal + unimodal, generator=generator) for depth in depths]
    for a in coefficients:
        a[0, 1] = 0
    return TransferPlan(counts, targets), sources, coefficients


def run(plan: TransferPlan, sources: list[Tensor], coefficients: list[Tensor], backend: str, **options: object) -> list[Tensor]:
    """The layers and every gradient under a random weighting of the layers."""
    leaves = [x.clone().requires_grad_() for x in (*sources, *coefficients)]
    layers = block_transfer(plan, leaves[: len(sources)], leaves[len(sources) :], backend=backend, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in layers)
    return [*(x.detach() for x in layers), *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("multimodal", "unimodal"), [(1, 0), (0, 1), (1, 1), (2, 1), (3, 3)])
@pytest.mark.parametrize("depths", [(1, 2), (12, 7), (48, 1)])
def test_equals_fp64(multimodal: int, unimodal: int, depths: tuple[int, int]) -> None:
    plan, sources, coefficients = case(multimodal, unimodal, 24, 16, depths)
    exact = run(plan, [x.double() for x in sources], [x.double() for x in coefficients], "reference")
    for got, want in zip(run(plan, sources, coefficients, "chunked"), exact, strict=True):
        assert (got.double() - want).norm() <= 2e-6 * want.norm()


@pytest.mark.parametrize(("multimodal", "unimodal"), [(1, 0), (0, 1), (1, 1), (2, 1), (3, 3), (4, 4)])
@pytest.mark.parametrize("depths", [(1, 2), (5, 3)])
def test_triton_equals_fp64_and_repeats(multimodal: int, unimodal: int, depths: tuple[int, int]) -> None:
    plan, sources, coefficients = case(multimodal, unimodal, 24, 16, depths)
    exact = run(plan, [x.double() for x in sources], [x.double() for x in coefficients], "reference")
    found, again = (run(plan, sources, coefficients, "triton") for _ in range(2))
    for got, repeated, want in zip(found, again, exact, strict=True):
        assert (got.double() - want).norm() <= 1e-6 * want.norm()
        assert torch.equal(got, repeated)


@pytest.mark.parametrize("kind", ["tied tensors", "tensors that overlap", "one source twice"])
def test_numbers_that_a_layer_reads_twice_get_both_gradients(kind: str) -> None:
    """Programs of a launch run side by side: they would overwrite each other's gradients. So the Triton kernel leaves such plans alone."""
    first, second = Slice(0, 1, 0, 1, 8, 0), Slice(0 if kind == "tied tensors" else 5, 1, 0, 1, 8, 0)
    if kind == "one source twice":
        target = Target(2, ("a",), ((8,),), (0, 0), ((first,), (first,)))
    else:
        target = Target(2, ("a", "b"), ((8,), (8,)), (0,), ((first, second),))
    plan = TransferPlan([(2, 16)], [target])
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(2, 16, generator=generator)]
    coefficients = [torch.randn(2, len(target.names), plan.num_blocks(target), generator=generator)]
    assert plan.mixes is None
    with pytest.raises(ValueError, match="reads a number once a layer"):
        block_transfer(plan, sources, coefficients, backend="triton")
    exact = run(plan, [x.double() for x in sources], [x.double() for x in coefficients], "reference")
    for got, want in zip(run(plan, sources, coefficients, "chunked"), exact, strict=True):
        assert (got.double() - want).norm() <= 2e-6 * want.norm()


def test_a_plan_lives_until_its_gradients_are_computed() -> None:
    """Each call makes a plan of its own, which nothing else keeps; the backward pass comes after all of them."""
    blocks = [{"w": torch.randn(4, 4, generator=torch.Generator().manual_seed(k)).requires_grad_()} for k in range(2)]
    layers = [transfer_blocks(blocks, torch.ones(1, 1, 2), backend="triton")[0]["w"] for _ in range(80)]
    grads = torch.autograd.grad(sum(layer.sum() for layer in layers), [block["w"] for block in blocks])  # type: ignore[arg-type]
    for grad in grads:
        assert torch.equal(grad, torch.full((4, 4), 80.0))


def test_triton_adds_up_more_tiles_than_it_reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As beyond 1,024 tiles of a tensor: here 2, of up to 27."""
    monkeypatch.setattr(transfer_tiles, "SHARES", 2)
    plan, sources, coefficients = case(1, 1, 24, 16, (3, 2))
    exact = run(plan, [x.double() for x in sources], [x.double() for x in coefficients], "reference")
    for got, want in zip(run(plan, sources, coefficients, "triton"), exact, strict=True):
        assert (got.double() - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_targets_that_share_their_first_or_second_source(order: tuple[int, int], backend: str) -> None:
    """Both targets' gradients add up in the shared source, wherever it stands among a layer's blocks."""
    plan, sources, coefficients = case(2, 1, 24, 16, (3, 2))
    targets = []
    for target in plan.targets:
        pairs = [(target.sources[i], target.slices[i]) for i in order]
        targets.append(Target(target.num_layers, NAMES, target.shapes, tuple(s for s, _ in pairs), tuple(pieces for _, pieces in pairs)))
    plan = TransferPlan(plan.source_shapes, targets)
    exact = run(plan, [x.double() for x in sources], [x.double() for x in coefficients], "reference")
    for got, want in zip(run(plan, sources, coefficients, backend), exact, strict=True):
        assert (got.double() - want).norm() <= 2e-6 * want.norm()


@pytest.mark.parametrize("widths", [(17, 5), (300, 12)])
def test_triton_with_odd_sizes(widths: tuple[int, int]) -> None:
    """Rows of other lengths than tiles, sliced and whole."""
    blocks = [{"a": torch.randn(*widths), "b": torch.randn(widths[0])} for _ in range(2)]
    coefficients = torch.randn(3, 2, 2)
    wide, narrow = transfer_blocks(blocks, coefficients, backend="triton"), transfer_blocks(blocks, coefficients, backend="chunked")
    for first, second in zip(wide, narrow, strict=True):
        for name in ("a", "b"):
            torch.testing.assert_close(first[name], second[name])


def test_a_plan_that_one_launch_cannot_run_is_refused() -> None:
    plan, sources, coefficients = case(5, 4, 4, 4, (2, 2))
    with pytest.raises(ValueError, match="at most 8 blocks"):
        block_transfer(plan, sources, coefficients, backend="triton")


def test_torch_compile_sees_one_operator() -> None:
    plan, sources, coefficients = case(1, 1, 24, 16, (3, 2))
    leaves = [x.clone().requires_grad_() for x in (*sources, *coefficients)]

    def total(*x: Tensor) -> Tensor:
        return sum((layers.sin()).sum() for layers in block_transfer(plan, x[:3], x[3:], backend="triton"))  # type: ignore[return-value]

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(total(*leaves), leaves), strict=True):
        torch.testing.assert_close(got, want)


def test_slices_are_the_leading_heads_of_queries_keys_and_values() -> None:
    plan, sources, coefficients = case(1, 1, 24, 16, (2, 3))
    layer = plan.views(1, block_transfer(plan, sources, coefficients)[1])[2]
    in_proj = sources[0][0, : 3 * 24 * 24].view(3, 24, 24)[:, :16, :16].reshape(48, 16)
    own = sources[2][0, : 3 * 16 * 16].view(48, 16)
    a = coefficients[1][2, 0]
    torch.testing.assert_close(layer["attn.in_proj_weight"], a[0] * in_proj + a[1] * own)


def test_one_layer_is_that_layer_of_all_and_runs_repeat() -> None:
    plan, sources, coefficients = case(2, 1, 24, 16, (5, 3))
    for first, second in zip(run(plan, sources, coefficients, "chunked"), run(plan, sources, coefficients, "chunked"), strict=True):
        assert torch.equal(first, second)
    whole = plan.views(1, block_transfer(plan, sources, coefficients)[1])
    for index, layer in enumerate(whole):
        one = transfer_layer(plan, 1, sources, coefficients[1][index])
        for name in NAMES:
            torch.testing.assert_close(one[name], layer[name])


def test_gradcheck() -> None:
    plan, sources, coefficients = case(1, 1, 4, 2, (2, 2))
    leaves = [x.double().requires_grad_() for x in (*sources, *coefficients)]
    assert torch.autograd.gradcheck(lambda *x: tuple(block_transfer(plan, x[:3], x[3:])), leaves, fast_mode=True)


@pytest.mark.parametrize(("backend", "dtype"), [("chunked", torch.bfloat16), ("triton", torch.float16)])
def test_half_precision_layers_are_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """Triton in fp16, since its interpreter cuts bf16 off instead of rounding."""
    plan, sources, coefficients = case(1, 1, 24, 16, (4, 3))
    exact = block_transfer(plan, sources, coefficients, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        half = block_transfer(plan, sources, coefficients, out_dtype=dtype, backend=backend)
    for a, b in zip(exact, half, strict=True):
        assert torch.equal(a.to(dtype), b)


def test_blocks_by_name() -> None:
    blocks = [{"a": torch.randn(3, 5), "b": torch.randn(4)} for _ in range(3)]
    coefficients = torch.randn(6, 2, 3)
    for layer, a in zip(transfer_blocks(blocks, coefficients), coefficients, strict=True):
        for g, name in enumerate(("a", "b")):
            torch.testing.assert_close(layer[name], sum(a[g, k] * blocks[k][name] for k in range(3)))


def test_wrong_shapes_are_named() -> None:
    plan, sources, coefficients = case(1, 1, 24, 16, (2, 2))
    with pytest.raises(ValueError, match="coefficients"):
        block_transfer(plan, sources, coefficients[::-1][:1])
    with pytest.raises(ValueError, match="sources"):
        block_transfer(plan, sources[:2], coefficients)
    with pytest.raises(ValueError, match="backend"):
        block_transfer(plan, sources, coefficients, backend="fast")
    twice = Target(1, ("a",), ((2, 4),), (0,), ((Slice(0, 1, 0, 2, 4, 3),),))
    with pytest.raises(ValueError, match="twice"):
        TransferPlan([(1, 16)], [twice])
    with pytest.raises(ValueError, match="leading part"):
        Slice.leading(0, (4, 4), (8, 4))
