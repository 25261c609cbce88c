"""The chunked loss against the fp64 definition, open_clip's loss, hand-computed numbers and other world sizes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mmlg_kernels import contrastive_loss
from torch import Tensor

from tests.forks import run_ranks


def features(count: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))  # type: ignore[return-value]


def loss_and_gradients(image: Tensor, text: Tensor, scale: float, **options: object) -> list[Tensor]:
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    multiplier = torch.tensor([scale], dtype=image.dtype if image.dtype == torch.float64 else torch.float32, requires_grad=True)
    loss = contrastive_loss(image, text, multiplier, **options)  # type: ignore[arg-type]
    return [loss.detach(), *torch.autograd.grad(loss, (image, text, multiplier))]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@given(
    count=st.integers(2, 40),
    width=st.integers(1, 20),
    chunk_rows=st.integers(1, 50),
    scale=st.sampled_from([1.0, 14.3, 100.0]),
    normalize=st.booleans(),
)
@example(count=34, width=1, chunk_rows=1, scale=100.0, normalize=True)  # gradients are zero: unit vectors of one dimension cannot turn
@settings(max_examples=40, deadline=None)
def test_chunked_equals_definition_in_fp64(count: int, width: int, chunk_rows: int, scale: float, normalize: bool) -> None:
    image, text = features(count, width)
    expected = loss_and_gradients(image, text, scale, backend="reference", normalize=normalize)
    found = loss_and_gradients(image, text, scale, backend="chunked", normalize=normalize, chunk_bytes=chunk_rows * count * 8)
    for got, want in zip(found, expected, strict=True):
        # Where a gradient cancels, what is left is rounding, in proportion to the scale.
        assert (got - want).norm() <= 1e-10 * max(float(want.norm()), 1e-3 * scale)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_error_is_no_worse_than_plain_torch(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    """Per output and for the worst row: relative error <= 1.5 x that of the materialised loss in the same precision + a tolerance."""
    image, text = (torch.nn.functional.normalize(x, dim=-1).to(dtype) for x in features(257, 48))
    exact = loss_and_gradients(image.double(), text.double(), scale, backend="reference")
    plain = loss_and_gradients(image, text, scale, backend="reference")
    found = loss_and_gradients(image, text, scale, backend="chunked", chunk_bytes=100 * 257 * 4)
    for got, same_precision, want in zip(found, plain, exact, strict=True):
        assert want.norm() > 1e-4  # a zero gradient would pass any absolute tolerance
        assert relative_error(got, want) <= 1.5 * relative_error(same_precision, want) + tolerance
    for index in (1, 2):
        worst = ((found[index].double() - exact[index]).norm(dim=1) / exact[index].norm(dim=1)).max()
        worst_plain = ((plain[index].double() - exact[index]).norm(dim=1) / exact[index].norm(dim=1)).max()
        assert worst <= 1.5 * worst_plain + tolerance


def test_equals_open_clip() -> None:
    from mmlg_scale.towers import open_clip

    image, text = (torch.nn.functional.normalize(x, dim=-1) for x in features(33, 8, torch.float32))
    expected = open_clip.loss.ClipLoss()(image, text, torch.tensor(20.0))
    assert torch.allclose(contrastive_loss(image, text, torch.tensor(20.0)), expected, rtol=1e-6)


def test_two_pairs_by_hand() -> None:
    """Similarities [[1, 0], [0.6, 0.8]] at scale 2: each cross entropy is log(1 + exp(other - own))."""
    image = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    text = torch.eye(2, dtype=torch.float64)
    rows = [math.log1p(math.exp(0 - 2)), math.log1p(math.exp(1.2 - 1.6))]
    columns = [math.log1p(math.exp(1.2 - 2)), math.log1p(math.exp(0 - 1.6))]
    loss = contrastive_loss(image, text, torch.tensor(2.0, dtype=torch.float64))
    assert math.isclose(float(loss), (sum(rows) + sum(columns)) / 4, rel_tol=1e-12)


def test_ranks_count_greater_logits() -> None:
    image, text = features(60, 6)
    _, image_ranks, text_ranks = contrastive_loss(image, text, torch.tensor(5.0), return_ranks=True, chunk_bytes=7 * 60 * 8)
    logits = image @ text.T
    own = logits.diagonal()
    assert torch.equal(image_ranks, 1 + (logits > own[:, None]).sum(1))
    assert torch.equal(text_ranks, 1 + (logits > own[None, :]).sum(0))


def test_never_keeps_the_similarity_matrix() -> None:
    count, width = 512, 16
    image, text = (x.requires_grad_() for x in features(count, width, torch.float32))
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contrastive_loss(image, text, torch.tensor(10.0, requires_grad=True))
    assert 0 < kept <= 4 * (2 * count * width + 2 * count + 1)
    assert kept < 4 * count * count / 10


def test_not_a_number_shows() -> None:
    image, text = features(5, 4)
    image[3, 2] = torch.nan
    assert torch.isnan(contrastive_loss(image, text, torch.tensor(1.0)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": torch.zeros(3, 5)}, "share a shape"),
        ({"text": torch.zeros(4, 5, dtype=torch.float16)}, "floating dtype"),
        ({"scale": torch.ones(2)}, "one element"),
        ({"scale": torch.tensor(-1.0)}, "positive"),
        ({"backend": "fast"}, "auto, triton, chunked, reference"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], said: str) -> None:
    arguments = {"image": torch.ones(4, 5), "text": torch.ones(4, 5), "scale": torch.tensor(1.0), "backend": "auto", **change}
    with pytest.raises(ValueError, match=said):
        contrastive_loss(arguments["image"], arguments["text"], arguments["scale"], backend=arguments["backend"])  # type: ignore[arg-type]


def _rank(rank: int, world_size: int, store: str, backend: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    image, text = features(8, 6)
    weight = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(6, 6).requires_grad_()
    scale = torch.tensor([7.0], dtype=torch.float64, requires_grad=True)
    share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    loss = contrastive_loss(
        image[share] @ weight, text[share] @ weight, scale, group=dist.group.WORLD, normalize=True, backend=backend, chunk_bytes=3 * 8 * 8
    )
    loss.backward()
    results = [loss.detach(), weight.grad, scale.grad]
    for tensor in results:
        dist.all_reduce(tensor)
        tensor.div_(world_size)
    if rank == 0:
        torch.save(results, out)
    if world_size == 2 and backend == "chunked":
        with pytest.raises(ValueError, match=r"rank 0: \[2, 6\], rank 1: \[3, 6\]"):
            contrastive_loss(image[: 2 + rank], text[: 2 + rank], scale, group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize(("world_size", "backend"), [(2, "chunked"), (4, "chunked"), (2, "reference")])
def test_ranks_equal_one_process_after_averaging(world_size: int, backend: str, tmp_path: Path) -> None:
    """Loss, the gradient of a shared weight, and the scale's gradient, averaged over ranks as the engine does."""
    run_ranks(_rank, (world_size, str(tmp_path / "store"), backend, str(tmp_path / "out.pt")), world_size)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    image, text = features(8, 6)
    weight = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(6, 6).requires_grad_()
    scale = torch.tensor([7.0], dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(image @ weight, text @ weight, scale, normalize=True, backend="reference")
    loss.backward()
    for got, want in zip(found, [loss.detach(), weight.grad, scale.grad], strict=True):
        assert want is not None
        assert want.norm() > 1e-3
        assert relative_error(got, want) < 1e-12
