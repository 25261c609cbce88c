"""FusedClipLoss against open_clip's ClipLoss: values, gradients, ranks, and what it refuses."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmlg_kernels.integrations.open_clip import FusedClipLoss
from torch import Tensor, nn

from tests.forks import run_ranks


def features(count: int) -> list[Tensor]:
    """Unit rows in fp64."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(count, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [nn.functional.normalize(x, dim=-1) for x in made]


def outputs(loss: nn.Module, image: Tensor, text: Tensor, bias: float | None = None) -> list[Tensor]:
    """Value and gradients by a weight that both towers share, both features and the scale."""
    weight = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(6, 6).add_(torch.eye(6)).requires_grad_()
    leaves = [
        weight,
        image.clone().requires_grad_(),
        text.clone().requires_grad_(),
        torch.tensor(7.0, dtype=torch.float64).requires_grad_(),
    ]
    more = {} if bias is None else {"logit_bias": torch.tensor(bias, dtype=torch.float64)}
    value = loss(leaves[1] @ weight, leaves[2] @ weight, leaves[3], **more)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def clip_loss(**options: object) -> nn.Module:
    from mmlg_scale.towers import open_clip

    return open_clip.loss.ClipLoss(**options)


@pytest.mark.parametrize("bias", [None, -3.0])
def test_equals_open_clip_in_one_process(bias: float | None) -> None:
    for got, want in zip(outputs(FusedClipLoss(), *features(9), bias), outputs(clip_loss(), *features(9), bias), strict=True):
        assert want.norm() > 1e-3
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_the_same_signatures_and_output() -> None:
    theirs = clip_loss()
    for name in ("__init__", "forward"):
        ours, other = (inspect.signature(getattr(kind, name)).parameters for kind in (FusedClipLoss, type(theirs)))
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in other.values()]
    image, text = features(5)
    found = FusedClipLoss(True, True, True, 0, 1, False)(image_features=image, text_features=text, logit_scale=7.0, output_dict=True)
    torch.testing.assert_close(found, theirs(image, text, torch.tensor(7.0, dtype=torch.float64), output_dict=True))


def test_a_bias_receives_a_zero_gradient_and_dtypes_may_differ() -> None:
    """DDP stops at a parameter that receives none."""
    image, text = features(5)
    bias = torch.tensor(-2.0, requires_grad=True)
    FusedClipLoss()(image.float().requires_grad_(), text.bfloat16(), torch.tensor(7.0), bias).backward()
    assert bias.grad is not None
    assert float(bias.grad) == 0.0


def test_what_it_cannot_honour_is_refused() -> None:
    with pytest.raises(ValueError, match="horovod"):
        FusedClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="rank 2 in a world of 2"):
        FusedClipLoss(rank=2, world_size=2)
    with pytest.raises(ValueError, match="no process group"):
        FusedClipLoss(world_size=2)(*features(4), torch.tensor(1.0))


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    share = [x[rank * 4 : rank * 4 + 4] for x in features(8)]
    found = {}
    for local in (True, False):
        for grad in (True, False):
            options = {"local_loss": local, "gather_with_grad": grad, "rank": rank, "world_size": 2}
            found[local, grad] = [outputs(kind(**options), *share) for kind in (FusedClipLoss, clip_loss)]
    torch.save(found, f"{folder}/{rank}.pt")
    with pytest.raises(ValueError, match="made for rank"):
        FusedClipLoss(rank=1 - rank, world_size=2)(*share, torch.tensor(1.0))
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    """Against each of ClipLoss's options as the class's docstring says; the weight's and the scale's gradients averaged over ranks."""
    run_ranks(_rank, (str(tmp_path),), 2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    whole = outputs(clip_loss(), *features(8))
    for (local, grad), _ in ranks[0].items():
        for found in ranks:
            ours, theirs = found[local, grad]
            torch.testing.assert_close(ours[0], theirs[0])
            for got, want in zip(ours[2:4], theirs[2:4], strict=True):
                if grad:
                    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
                elif not local:
                    torch.testing.assert_close(got, 2 * want, rtol=1e-10, atol=1e-12)
                else:
                    assert (got - want).norm() > 0.05 * want.norm()
        for index in (1, 4):
            ours, theirs = (sum(found[local, grad][which][index] for found in ranks) / 2 for which in (0, 1))
            torch.testing.assert_close(ours, whole[index])
            factor = 1.0 if grad or index == 4 else 2.0
            if grad or not local or index == 4:
                torch.testing.assert_close(ours, factor * theirs)
