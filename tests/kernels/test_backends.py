"""Both losses in both backends that store no similarities, against fp64, on one rank and many, compiled and not.

Triton runs in its interpreter, in fp32 and fp16 (the interpreter's bf16 product is wrong).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlg_kernels import chunked, contrastive_loss, pairs, sigmoid_loss, tiled
from torch import Tensor

from tests.forks import run_ranks

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}
BACKENDS = ("chunked", "triton")
LOSSES = ("softmax", "sigmoid")


def features(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit rows, half of them near their pair, so that some probabilities are near one."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(2))
    y[::2] = x[::2] + 0.3 * y[::2]
    return tuple(torch.nn.functional.normalize(z, dim=-1).to(dtype) for z in (x, y))  # type: ignore[return-value]


def outputs(kind: str, x: Tensor, y: Tensor, scale: float, backend: str, **options: object) -> list[Tensor]:
    """Loss and gradients by both features, the scale and (sigmoid) the bias."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), torch.tensor(scale, dtype=wide, requires_grad=True)]
    if kind == "softmax":
        loss = contrastive_loss(*leaves, backend=backend, **options)  # type: ignore[arg-type]
    else:
        leaves.append(torch.tensor(-3.0, dtype=wide, requires_grad=True))
        loss = sigmoid_loss(*leaves, backend=backend, **options)  # type: ignore[arg-type]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def violations(kind: str, found: list[Tensor], x: Tensor, y: Tensor, scale: float) -> list[str]:
    """Outputs whose error, or whose worst row's, is above 1.5 times that of plain torch in the same precision + the tolerance."""
    exact = outputs(kind, x.double(), y.double(), scale, "reference")
    plain = outputs(kind, x, y, scale, "reference")
    wrong = []
    for name, got, same, want in zip(("loss", "dx", "dy", "dscale", "dbias"), found, plain, exact, strict=False):
        assert want.norm() > 0
        allowed = 1.5 * _error(same, want) + TOLERANCE[x.dtype]
        if not _error(got, want) <= allowed:
            wrong.append(name)
        if want.ndim == 2:
            # A row whose pair is certain has hardly any gradient: it is measured against the mean row.
            rows = want.norm(dim=1).clamp(min=0.1 * float(want.norm(dim=1).mean()))
            worst, worst_plain = (((z.double() - want).norm(dim=1) / rows).max() for z in (got, same))
            if not worst <= 1.5 * worst_plain + TOLERANCE[x.dtype]:
                wrong.append(f"{name}, worst row")
    return wrong


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("count", "width", "scale"), [(97, 48, 100.0), (130, 33, 14.3), (33, 70, 1.0)])
def test_error_is_no_worse_than_plain_torch(kind: str, backend: str, dtype: torch.dtype, count: int, width: int, scale: float) -> None:
    x, y = features(count, width, dtype)
    found = outputs(kind, x, y, scale, backend, chunk_bytes=40 * count * 4)
    assert violations(kind, found, x, y, scale) == []


@given(
    kind=st.sampled_from(LOSSES),
    backend=st.sampled_from(BACKENDS),
    count=st.integers(1, 70),
    width=st.integers(1, 40),
    scale=st.sampled_from([1.0, 50.0]),
    splits=st.sampled_from([1, 2, 8]),
)
@settings(max_examples=25, deadline=None)
def test_any_shape(kind: str, backend: str, count: int, width: int, scale: float, splits: int) -> None:
    """Of so few columns every split would be one tile, and no program's loop would come round, were there not fewer splits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "SPLITS", splits)
        _check_shape(kind, backend, count, width, scale)


def _check_shape(kind: str, backend: str, count: int, width: int, scale: float) -> None:
    x, y = features(count, width, torch.float32)
    exact = outputs(kind, x.double(), y.double(), scale, "reference")
    for got, want in zip(outputs(kind, x, y, scale, backend), exact, strict=True):
        # A gradient that cancels to nothing keeps the rounding of its terms, which grow with the scale.
        assert (got.double() - want).norm() <= 3e-5 * max(float(want.norm()), 0.1, scale / 25)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("splits", [1, 2])
def test_programs_of_several_tiles_equal_fp64(kind: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tiles of columns in one split, or in two."""
    monkeypatch.setattr(tiled, "SPLITS", splits)
    x, y = features(100, 40, torch.float32)
    assert violations(kind, outputs(kind, x, y, 30.0, "triton"), x, y, 30.0) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_cases(backend: str) -> None:
    """Random unit rows at scale 100 and D = 1,024; duplicated rows; a perfect match."""
    for x, y in (
        features(40, 1024, torch.float32),
        tuple(z[torch.arange(36) // 3] for z in features(12, 24, torch.float32)),
        (torch.eye(32), torch.eye(32) * 0.5),
    ):
        for kind in LOSSES:
            exact = outputs(kind, x.double(), y.double(), 100.0, "reference")
            for got, want in zip(outputs(kind, x, y, 100.0, backend), exact, strict=True):
                assert (got.double() - want).norm() <= 2e-5 * max(float(want.norm()), 1e-6)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable_and_non_contiguous(kind: str, backend: str) -> None:
    x, y = features(75, 40, torch.float32)
    first = outputs(kind, x, y, 20.0, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, outputs(kind, x, y, 20.0, backend), strict=True))
    turned = outputs(kind, x.T.contiguous().T, y.repeat(1, 2)[:, :40], 20.0, backend)
    assert all((a - b).norm() <= 1e-6 * a.norm() for a, b in zip(first, turned, strict=True))


@pytest.mark.parametrize("kind", LOSSES)
def test_several_waves_equal_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace for 32 of 75 rows: three waves, the last one of 11 rows."""
    x, y = features(75, 40, torch.float32)
    once = outputs(kind, x, y, 20.0, "triton")
    monkeypatch.setattr(tiled, "WORKSPACE_BYTES", 40 * 75 * 4)
    for a, b in zip(once, outputs(kind, x, y, 20.0, "triton"), strict=True):
        assert (a - b).norm() <= 2e-6 * a.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_a_number_gives_a_nan_loss(backend: str, bad: float) -> None:
    for kind in LOSSES:
        x, y = features(40, 8, torch.float32)
        x[37, 2] = bad
        assert torch.isnan(outputs(kind, x, y, 10.0, backend)[0]) or kind == "sigmoid"
        if kind == "sigmoid":
            assert not torch.isfinite(outputs(kind, x, y, 10.0, backend)[0])


def _ranks(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = x.double() @ y.double().T
    own = logits.diagonal()
    return 1 + (logits > own[:, None]).sum(1), 1 + (logits > own[None, :]).sum(0)


@pytest.mark.parametrize(("backend", "splits"), [("chunked", 8), ("triton", 8), ("triton", 1), ("reference", 8)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_ranks_of_pairs(backend: str, dtype: torch.dtype, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that need several tiles; and where texts, or images, are the same, none of which is above another; Triton splits columns."""
    monkeypatch.setattr(tiled, "SPLITS", splits)
    x, y = (z.round(decimals=2) for z in features(75, 33, torch.float64))
    x, y = (x * 64).round().to(dtype), (y * 64).round().to(dtype)  # integers: their products are exact in every order
    for image, text in ((x, y), (x, y[torch.arange(75) // 3]), (x[torch.arange(75) % 10], y)):
        loss, *found = contrastive_loss(image, text, torch.tensor(1 / 128), backend=backend, return_ranks=True, chunk_bytes=40 * 75 * 4)
        assert torch.equal(loss, contrastive_loss(image, text, torch.tensor(1 / 128), backend=backend, chunk_bytes=40 * 75 * 4))
        expected = _ranks(image, text)
        assert all(int(ranks.max()) > 10 for ranks in expected)
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got, want)


Mutation = Callable[..., object]


def _dropped_column_term(module: object) -> Mutation:
    original = module.softmax_backward  # type: ignore[attr-defined]

    def mutated(x: Tensor, y: Tensor, scale: Tensor, first: int, rows: Tensor, columns: Tensor, *rest: object) -> None:
        original(x, y, scale, first, rows, torch.full_like(columns, 1e4), *rest)

    return mutated


def _transposed_operand(module: object) -> Mutation:
    original = module.softmax_backward  # type: ignore[attr-defined]

    def mutated(*arguments: object) -> None:
        *given, dx, dy = arguments
        original(*given, dy, dx)

    return mutated


def _missing_own_pair(module: object) -> Mutation:
    original = module.softmax_backward  # type: ignore[attr-defined]

    def mutated(x: Tensor, y: Tensor, *rest: object) -> None:
        *_, dx, dy = rest
        original(x, y, *rest)
        dx += y  # type: ignore[misc]
        dy += x  # type: ignore[misc]

    return mutated


@pytest.mark.parametrize("module", [chunked, tiled], ids=["chunked", "triton"])
@pytest.mark.parametrize("mutate", [_dropped_column_term, _transposed_operand, _missing_own_pair])
def test_mutations_are_caught(module: object, mutate: Callable[[object], Mutation], monkeypatch: pytest.MonkeyPatch) -> None:
    """The criterion must fail when a term is dropped, an operand exchanged, or the own pair forgotten."""
    monkeypatch.setattr(module, "softmax_backward", mutate(module))
    x, y = features(60, 20, torch.float32)
    backend = "triton" if module is tiled else "chunked"
    assert violations("softmax", outputs("softmax", x, y, 14.3, backend), x, y, 14.3)


@pytest.mark.parametrize("kind", LOSSES)
def test_no_graph_break_and_registered_operators(kind: str) -> None:
    """torch.compile in one graph gives the same numbers; torch's own checks of a custom operator pass."""
    x, y = features(20, 12, torch.float32)

    def whole(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if kind == "softmax":
                return contrastive_loss(x, y, scale.exp(), normalize=True)
            return sigmoid_loss(x, y, scale.exp(), bias, normalize=True)

    leaves = [z.requires_grad_() for z in (x, y, torch.tensor(2.0), torch.tensor(-1.0))]
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for function in (whole, compiled):
        loss = function(*leaves)
        found = [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)]
        if function is whole:
            expected = found
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-6, atol=1e-8)
    arguments = (x.detach().requires_grad_(), y.detach().requires_grad_(), torch.tensor(5.0))
    if kind == "softmax":
        torch.library.opcheck(pairs.softmax_loss, (*arguments, "", "chunked", 1000, False), test_utils=("test_schema", "test_faketensor"))
    else:
        bias = torch.tensor(-1.0)
        torch.library.opcheck(pairs.sigmoid_loss, (*arguments, bias, "", "chunked", 1000), test_utils=("test_schema", "test_faketensor"))


def test_sigmoid_equals_open_clip_and_mistakes_are_named() -> None:
    from mmlg_scale.towers import open_clip

    x, y = features(33, 8, torch.float32)
    expected = open_clip.loss.SigLipLoss()(x, y, torch.tensor(20.0), torch.tensor(-5.0))
    assert torch.allclose(sigmoid_loss(x, y, torch.tensor(20.0), torch.tensor(-5.0)), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="logit_bias must have one element"):
        sigmoid_loss(x, y, torch.tensor(20.0), torch.zeros(2))


def _rank(rank: int, world_size: int, store: str, kind: str, backend: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    leaves, loss = _shared_model(kind, backend, slice(rank * 12 // world_size, (rank + 1) * 12 // world_size), dist.group.WORLD)
    results = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    for tensor in results:
        dist.all_reduce(tensor)
        tensor.div_(world_size)
    if rank == 0:
        torch.save(results, out)
    if kind == "softmax":
        x, y = (z.chunk(world_size)[rank] for z in features(36, 6, torch.float32))
        torch.save(
            contrastive_loss(x, y, torch.tensor(7.0), group=dist.group.WORLD, backend=backend, return_ranks=True)[1:], f"{out}.{rank}"
        )
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    assert group() is None, "a group that lives on can abort its process"


def _shared_model(kind: str, backend: str, rows: slice, group: object) -> tuple[list[Tensor], Tensor]:
    """A weight that both features go through, the scale and the bias; the loss of some rows."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    x, y = features(12, 6, dtype)
    weight = torch.linspace(-1, 1, 36, dtype=dtype).reshape(6, 6).requires_grad_()
    scale, bias = torch.tensor(7.0, dtype=dtype, requires_grad=True), torch.tensor(-2.0, dtype=dtype, requires_grad=True)
    if kind == "softmax":
        return [weight, scale], contrastive_loss(x[rows] @ weight, y[rows] @ weight, scale, group=group, normalize=True, backend=backend)
    return [weight, scale, bias], sigmoid_loss(
        x[rows] @ weight, y[rows] @ weight, scale, bias, group=group, normalize=True, backend=backend
    )


@pytest.mark.parametrize(
    ("kind", "world_size", "backend"),
    [("softmax", 3, "triton"), ("softmax", 2, "chunked"), ("sigmoid", 2, "chunked"), ("sigmoid", 4, "triton"), ("sigmoid", 2, "reference")],
)
def test_ranks_equal_one_process_after_averaging(kind: str, world_size: int, backend: str, tmp_path: Path) -> None:
    run_ranks(_rank, (world_size, str(tmp_path / "store"), kind, backend, str(tmp_path / "out.pt")), world_size)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    leaves, loss = _shared_model(kind, "reference", slice(None), None)
    tolerance = 1e-5 if backend == "triton" else 1e-12
    for got, want in zip(found, [loss.detach(), *torch.autograd.grad(loss, leaves)], strict=True):
        assert want.norm() > 1e-3
        assert _error(got, want) < tolerance
    if kind == "softmax":
        parts = [torch.load(tmp_path / f"out.pt.{rank}", weights_only=True) for rank in range(world_size)]
        for got, want in zip(zip(*parts, strict=True), _ranks(*features(36, 6, torch.float32)), strict=True):
            assert torch.equal(torch.cat(got), want)
