"""The distillation loss on a CUDA GPU against fp64. Needs only torch, triton and pytest."""

from __future__ import annotations

import pytest
import torch
from mmlg_kernels.distillation import contrastive_distillation_loss, teacher_log_sum_exps
from torch import Tensor

from tests.gpu.common import TOLERANCE, captured, errors, features, number, relative_error

pytestmark = pytest.mark.gpu
KINDS = ("affinity", "kl")


def inputs(count: int, widths: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """The student's images and texts, the teacher's images and texts."""
    return [*features(count, widths[0], dtype), *features(count, widths[1], dtype, seed=1)]


def leaves_of(given: list[Tensor]) -> list[Tensor]:
    """The student's features and its scale."""
    return [given[0].clone().requires_grad_(), given[1].clone().requires_grad_(), number(20.0, given[0].dtype)]


def run(kind: str, leaves: list[Tensor], teacher: list[Tensor], backend: str = "triton", **options: object) -> list[Tensor]:
    """Loss and gradients."""
    weights = {"contrastive_weight": 0.3, "distillation_weight": 1.7, "kind": kind, "backend": backend} | options
    scale = number(50.0, leaves[0].dtype)
    loss = contrastive_distillation_loss(*leaves, *teacher, scale, **weights)  # type: ignore[arg-type]
    return [loss, *torch.autograd.grad(loss, leaves)]


def outputs(kind: str, given: list[Tensor], backend: str, **options: object) -> list[Tensor]:
    return [z.detach() for z in run(kind, leaves_of(given), given[2:], backend, **options)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("count", "widths"), [(1000, (512, 768)), (4099, (640, 520)), (2048, (512, 1024)), (1, (64, 32)), (129, (40, 72))])
def test_error_is_no_worse_than_plain_torch(kind: str, backend: str, dtype: torch.dtype, count: int, widths: tuple[int, int]) -> None:
    given = inputs(count, widths, dtype)
    found = outputs(kind, given, backend)
    if count == 1:  # a single pair has no loss
        assert all(torch.isfinite(x).all() and x.abs().max() <= 1e-2 for x in found)
        return
    exact = outputs(kind, [x.double() for x in given], "reference")
    assert errors(found, outputs(kind, given, "reference"), exact, TOLERANCE[dtype]) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_each_term_alone(kind: str, weights: tuple[float, float]) -> None:
    given = inputs(1000, (512, 768), torch.bfloat16)
    options = {"contrastive_weight": weights[0], "distillation_weight": weights[1]}
    exact = outputs(kind, [x.double() for x in given], "reference", **options)
    plain = outputs(kind, given, "reference", **options)
    assert errors(outputs(kind, given, "triton", **options), plain, exact, TOLERANCE[torch.bfloat16]) == []


def test_large_batch() -> None:
    """16,384 pairs: several waves of the backward pass; only chunked fp64 fits beside it."""
    given = inputs(16384, (512, 768), torch.bfloat16)
    exact = outputs("affinity", [x.double() for x in given], "chunked")
    for got, want in zip(outputs("affinity", given, "triton"), exact, strict=True):
        assert relative_error(got, want) <= 3 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("kind", KINDS)
def test_bitwise_repeatable_and_with_known_teacher_sums(kind: str) -> None:
    given = inputs(4099, (512, 768), torch.bfloat16)
    first, second = (outputs(kind, given, "triton") for _ in range(2))
    known = teacher_log_sum_exps(given[2], given[3], number(50.0).detach(), backend="triton")
    third = outputs(kind, given, "triton", teacher_lse=known)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_cuda_graph() -> None:
    given = inputs(1024, (512, 768), torch.bfloat16)
    leaves, teacher_scale = leaves_of(given), number(50.0).detach()

    def step() -> list[Tensor]:
        loss = contrastive_distillation_loss(*leaves, *given[2:], teacher_scale, contrastive_weight=0.3, distillation_weight=1.7)
        return [loss, *torch.autograd.grad(loss, leaves)]

    assert all(torch.equal(a, b) for a, b in zip(captured(step), outputs("affinity", given, "triton"), strict=True))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_torch_compile(backend: str) -> None:
    given = inputs(1000, (512, 768), torch.float32)
    leaves, teacher_scale = leaves_of(given), number(50.0).detach()

    def whole(*student: Tensor) -> Tensor:
        return contrastive_distillation_loss(
            *student, *given[2:], teacher_scale, contrastive_weight=1.0, distillation_weight=1.0, kind="kl"
        )

    expected = torch.autograd.grad(whole(*leaves), leaves)
    for got, want in zip(
        torch.autograd.grad(torch.compile(whole, fullgraph=True, backend=backend)(*leaves), leaves), expected, strict=True
    ):
        assert relative_error(got, want.double()) <= 1e-5
