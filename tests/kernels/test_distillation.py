"""The fused distillation loss against its definition in fp64: values, gradients, ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmlg_kernels import tiled
from mmlg_kernels.distillation import contrastive_distillation_loss, teacher_log_sum_exps
from torch import Tensor

from tests.forks import run_ranks


def features(count: int, seed: int = 0) -> list[Tensor]:
    """Unit rows: student's images and texts of width 24, teacher's of width 40; fp64."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(count, width, generator=generator, dtype=torch.float64) for width in (24, 24, 40, 40)]
    return [torch.nn.functional.normalize(x, dim=1) for x in made]


def outputs(inputs: list[Tensor], **options: object) -> list[Tensor]:
    """Loss and gradients by both features and the scale."""
    x, y, u, v = inputs
    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), torch.tensor(20.0, dtype=x.dtype, requires_grad=True)]
    weights = {"contrastive_weight": 0.3, "distillation_weight": 1.7} | options
    loss = contrastive_distillation_loss(*leaves, u, v, torch.tensor(50.0, dtype=x.dtype), **weights)  # type: ignore[arg-type]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("kind", ["affinity", "kl"])
@pytest.mark.parametrize("weights", [(0.3, 1.7), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("count", [1, 7, 130])
def test_equals_fp64(kind: str, weights: tuple[float, float], count: int) -> None:
    inputs = features(count)
    options = {"kind": kind, "contrastive_weight": weights[0], "distillation_weight": weights[1]}
    exact = outputs(inputs, backend="reference", **options)
    for got, want in zip(outputs(inputs, chunk_bytes=8 * count * 3, **options), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    single = [x.float() for x in inputs]
    for got, want in zip(outputs(single, **options), exact, strict=True):
        assert (got.double() - want).norm() <= 1e-5 * want.norm() + 2e-6


@pytest.mark.parametrize("kind", ["affinity", "kl"])
@pytest.mark.parametrize("count", [1, 33, 70])
def test_triton_equals_fp64_and_repeats(kind: str, count: int) -> None:
    """The error of each output is no larger than the same precision's in plain torch, plus a tolerance."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
        given = [x.to(dtype) for x in features(count)]
        exact = outputs([x.double() for x in given], backend="reference", kind=kind)
        plain = outputs(given, backend="reference", kind=kind)
        found, again = (outputs(given, backend="triton", kind=kind) for _ in range(2))
        for got, repeated, same, want in zip(found, again, plain, exact, strict=True):
            floor = float(want.norm()) if count > 1 else 1.0  # a single pair has no loss
            assert (got.double() - want).norm() / floor <= 1.5 * (same.double() - want).norm() / floor + tolerance
            assert torch.equal(got, repeated)


def test_triton_programs_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiles of columns in one split."""
    monkeypatch.setattr(tiled, "SPLITS", 1)
    given = [x.float() for x in features(70)]
    exact = outputs([x.double() for x in given], backend="reference", kind="kl")
    for got, want in zip(outputs(given, backend="triton", kind="kl"), exact, strict=True):
        assert (got.double() - want).norm() <= 3e-5 * want.norm()


def test_triton_in_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [x.float() for x in features(70)]
    whole = outputs(given, backend="triton")
    monkeypatch.setattr(tiled, "WORKSPACE_BYTES", 4 * 70 * 32)
    for got, want in zip(outputs(given, backend="triton"), whole, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_torch_compile_sees_one_operator(backend: str) -> None:
    given = [x.float() for x in features(20)]
    scale = torch.tensor(30.0, requires_grad=True)
    leaves = [x.requires_grad_() for x in given[:2]]

    def loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        options = {"contrastive_weight": 0.5, "distillation_weight": 1.0, "backend": backend}
        return contrastive_distillation_loss(x, y, s, given[2], given[3], torch.tensor(50.0), **options)  # type: ignore[arg-type]

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    inputs = [*leaves, scale]
    for got, want in zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_nothing_of_the_batch_squared_is_kept() -> None:
    count, kept = 256, []
    x, y, u, v = (x.float() for x in features(count))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        outputs([x, y, u, v])
    assert 0 < sum(kept) < count * count / 1.5
    assert max(kept) == v.numel()


def test_known_teacher_sums_give_the_same_bits() -> None:
    inputs = features(33)
    known = teacher_log_sum_exps(inputs[2], inputs[3], torch.tensor(50.0, dtype=torch.float64))
    for a, b in zip(outputs(inputs), outputs(inputs, teacher_lse=known), strict=True):
        assert torch.equal(a, b)


def test_a_student_like_its_teacher_has_no_divergence() -> None:
    x, y, _, _ = features(20)
    scale = torch.tensor(30.0, dtype=torch.float64)
    weights = {"contrastive_weight": 0.0, "distillation_weight": 1.0, "kind": "kl"}
    assert abs(float(contrastive_distillation_loss(x, y, scale, x, y, scale, **weights))) < 1e-12  # type: ignore[arg-type]


def test_faults_are_named() -> None:
    inputs = features(4)
    with pytest.raises(ValueError, match="kind"):
        outputs(inputs, kind="cosine")
    with pytest.raises(ValueError, match="pairs of the teacher"):
        outputs(inputs[:2] + features(5)[2:])


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    part = [x[rank * 6 : rank * 6 + 6] for x in features(18)]
    torch.save(outputs(part, group=dist.group.WORLD, kind="kl"), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_three_ranks_equal_one_process(tmp_path: Path) -> None:
    run_ranks(_rank, (str(tmp_path),), 3)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    loss, dx, dy, dscale = outputs(features(18), backend="reference", kind="kl")
    torch.testing.assert_close(sum(f[0] for f in found) / 3, loss)
    torch.testing.assert_close(torch.cat([f[1] for f in found]) / 3, dx)
    torch.testing.assert_close(torch.cat([f[2] for f in found]) / 3, dy)
    torch.testing.assert_close(sum(f[3] for f in found) / 3, dscale)
