"""What ranks exchange: shapes that differ, the branch for NCCL (over gloo, which can do the same), one graph with a group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mmlg_kernels import contrastive_distillation_loss, contrastive_loss, exchange, sigmoid_loss
from torch import Tensor

from tests.forks import run_ranks
from tests.kernels.test_backends import features

SCALE, BIAS = torch.tensor(7.0), torch.tensor(-2.0)
WEIGHTS = {"contrastive_weight": 1.0, "distillation_weight": 0.5}


def losses(x: Tensor, y: Tensor, group: Any, backend: str = "chunked") -> list[Tensor]:
    """Each loss, and both features' gradients by all of them."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    options: dict[str, Any] = {"group": group, "backend": backend}
    found = [contrastive_loss(x, y, SCALE, **options), sigmoid_loss(x, y, SCALE, BIAS, **options)]
    if backend != "reference":
        found.append(contrastive_distillation_loss(x, y, SCALE, y.detach(), x.detach(), SCALE, **WEIGHTS, **options))
    return [*(loss.detach() for loss in found), *torch.autograd.grad(torch.stack(found).sum(), (x, y))]


def _uneven(rank: int, folder: str) -> None:
    """The last batch of an epoch is smaller on one rank, after others of one shape: each loss says so on every rank, and all go on."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    x, y = (z[rank * 6 : rank * 6 + 6] for z in features(12, 5, torch.float32))
    for backend in ("chunked", "reference"):
        first = losses(x, y, group, backend)
        for call in (
            lambda a, b: contrastive_loss(a, b, SCALE, group=group, backend=backend),  # noqa: B023
            lambda a, b: sigmoid_loss(a, b, SCALE, BIAS, group=group, backend=backend),  # noqa: B023
            lambda a, b: contrastive_distillation_loss(a, b, SCALE, b, a, SCALE, group=group, **WEIGHTS),
        ):
            with pytest.raises(ValueError, match=r"rank 0: \[6, 5\], rank 1: \[5, 5\]"):
                call(x[: 6 - rank], y[: 6 - rank])
        for before, after in zip(first, losses(x, y, group, backend), strict=True):
            assert torch.equal(before, after)
    torch.save(losses(x[:4], y[:4], group), f"{folder}/{rank}.pt")  # a smaller batch on every rank
    dist.destroy_process_group()


def test_an_uneven_batch_is_an_error_on_every_rank_and_hangs_none(tmp_path: Path) -> None:
    run_ranks(_uneven, (str(tmp_path),), 2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    kept = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9])
    *expected, dx, dy = losses(*(z[kept] for z in features(12, 5, torch.float32)), None)
    for number, want in enumerate(expected):
        torch.testing.assert_close((found[0][number] + found[1][number]) / 2, want)
    for number, want in ((3, dx), (4, dy)):
        torch.testing.assert_close(torch.cat([part[number] for part in found]) / 2, want)


def _as_nccl(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    asked, scattered, scatter = [], [], exchange._reduce_scatter

    def backend(group: Any) -> str:
        asked.append(group)
        return "nccl"

    def counted(*args: Any, **kwargs: Any) -> Any:
        scattered.append(args)
        return scatter(*args, **kwargs)

    x, y = (z[rank * 5 : rank * 5 + 5] for z in features(15, 6, torch.float32))
    expected = losses(x, y, dist.group.WORLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend", backend)
        patch.setattr(exchange, "_reduce_scatter", counted)
        found = losses(x, y, dist.group.WORLD)
        with pytest.raises(ValueError, match=r"rank 2: \[4, 6\]"):
            contrastive_loss(x[: 5 - rank // 2], y[: 5 - rank // 2], SCALE, group=dist.group.WORLD)
    assert asked
    assert len(scattered) == 3
    assert len(exchange._over_gloo) == 1, "shapes are compared over gloo"
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
    _in_one_graph(x, y)
    dist.destroy_process_group()


def _in_one_graph(x: Tensor, y: Tensor) -> None:
    def whole(x: Tensor, y: Tensor, group: Any) -> Tensor:
        plain = contrastive_loss(x, y, SCALE, group=group, normalize=True) + sigmoid_loss(x, y, SCALE, BIAS, group=group)
        return plain + contrastive_distillation_loss(x, y, SCALE, y.detach(), x.detach(), SCALE, group=group, **WEIGHTS)

    found = []
    for function in (whole, torch.compile(whole, fullgraph=True, backend="aot_eager")):
        leaves = [z.clone().requires_grad_() for z in (x, y)]
        loss = function(*leaves, dist.group.WORLD)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_reduce_scatter_as_over_nccl_and_one_graph_with_a_group(tmp_path: Path) -> None:
    run_ranks(_as_nccl, (str(tmp_path),), 3)
