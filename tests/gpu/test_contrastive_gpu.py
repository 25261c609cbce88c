"""The chunked loss on a CUDA GPU against the fp64 definition. Needs torch and pytest alone, so that it runs on a bare GPU machine."""

from __future__ import annotations

import pytest
import torch
from mmlg_kernels import contrastive_loss
from torch import Tensor

pytestmark = pytest.mark.gpu


def loss_and_gradients(image: Tensor, text: Tensor, scale: float, backend: str) -> list[Tensor]:
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    multiplier = torch.tensor(scale, device=image.device, dtype=torch.float64 if image.dtype == torch.float64 else torch.float32)
    multiplier.requires_grad_()
    loss = contrastive_loss(image, text, multiplier, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, (image, text, multiplier))]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize(("count", "width"), [(1000, 512), (4099, 640)])
def test_error_is_no_worse_than_plain_torch(count: int, width: int, scale: float, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(torch.randn(count, width, device="cuda", generator=generator), dim=-1).to(dtype) for _ in range(2)
    )
    exact = loss_and_gradients(image.double(), text.double(), scale, "reference")
    plain = loss_and_gradients(image, text, scale, "reference")
    found = loss_and_gradients(image, text, scale, "chunked")
    for got, same_precision, want in zip(found, plain, exact, strict=True):
        assert want.norm() > 0
        assert relative_error(got, want) <= 1.5 * relative_error(same_precision, want) + tolerance
