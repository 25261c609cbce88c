"""Where a formula that is right on paper loses its digits: certain pairs, a bias like SigLIP's, fp16's exponents; and what torch allows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmlg_kernels import block_transfer, contrastive_distillation_loss, contrastive_loss, sigmoid_loss, tiled, tiled_distillation
from mmlg_kernels.chunked import DistillationInputs
from torch import Tensor
from triton.runtime import interpreter

from tests.kernels.test_block_transfer import case

BACKENDS = ("chunked", "triton")


def matched(count: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pairs of equal unit rows, each nearly at right angles to all others; fp64."""
    x = F.normalize(
        torch.eye(count, width, dtype=torch.float64) + 0.02 * torch.randn(count, width, dtype=torch.float64, generator=seeded(seed))
    )
    return x, x.clone()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def apart(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def sigmoid_outputs(x: Tensor, y: Tensor, scale: float, bias: float, backend: str) -> list[Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    leaves = [z.clone().requires_grad_() for z in (x, y, torch.tensor(scale, dtype=wide), torch.tensor(bias, dtype=wide))]
    loss = sigmoid_loss(*leaves, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [-8.0, -16.0, -20.0, -30.0])
def test_sigmoid_loss_of_certain_pairs(backend: str, bias: float) -> None:
    """Nothing but softplus of numbers far below zero: log(1 + e^z) in fp32 is wrong by 1 % at -16 and by 100 % at -20."""
    x, y = (z.float() for z in matched(40, 48))
    exact = sigmoid_outputs(x.double(), y.double(), -2 * bias, bias, "reference")
    for got, want in zip(sigmoid_outputs(x, y, -2 * bias, bias, backend), exact, strict=True):
        assert apart(got, want) < 3e-5  # the logits' own rounding, 1e-6 of 30, is that of e^z


@pytest.mark.parametrize("z", [-90.0, -30.0, -16.0, -5.0, -2.1, -2.0, -0.5, 0.0, 0.5, 3.0, 40.0])
def test_softplus_at_every_magnitude(z: float) -> None:
    """One row and column apart from its pair, so that the sum is one softplus."""
    x, y = torch.tensor([[z]]), torch.tensor([[1.0]])
    found = tiled.sigmoid_forward(x, y, torch.tensor(1.0), torch.tensor(0.0), 1, 0)
    assert apart(found, F.softplus(x[0].double())) < 1e-6


@pytest.mark.parametrize("bias", [-13.0, -16.0])
def test_fp16_keeps_the_digits_of_small_gradients(bias: float) -> None:
    """Every weight, of own pairs and of others, is below fp16's smallest normal number: unscaled they keep a digit or none."""
    x, y = (z.half() for z in matched(40, 48))
    logits = -2 * bias * x.double() @ y.double().T + bias
    weights = torch.where(torch.eye(40) > 0, -torch.sigmoid(-logits), torch.sigmoid(logits))
    dx, dy = torch.zeros(40, 48), torch.zeros(40, 48)
    total = tiled.sigmoid_backward(x, y, torch.tensor(-2 * bias), torch.tensor(bias), 0, 0, dx, dy)
    for got, want in ((dx, weights @ y.double()), (dy, weights.T @ x.double()), (total, weights.sum())):
        assert apart(got, want) < 1e-3


@pytest.mark.parametrize("which", ["softmax", "distillation"])
def test_fp16_softmax_over_very_many(which: str) -> None:
    """Log-sum-exps as of a million rows and columns, of which these are a part without an own pair: every weight is about 1e-6."""
    x, y = (F.normalize(torch.randn(40, 24, generator=seeded(seed)), dim=1).half() for seed in (0, 1))
    scale, none = torch.tensor(2.0), 10**6
    logits = 2.0 * x.double() @ y.double().T
    lse = torch.full((40,), 14.0)
    weights = (logits - lse.double()).exp()
    dx, dy = torch.zeros(40, 24), torch.zeros(40, 24)
    if which == "softmax":
        tiled.softmax_backward(x, y, scale, none, lse, lse, 0, dx, dy)
    else:
        given = DistillationInputs(x, y, scale, x, y, scale, lse, lse)
        tiled_distillation.distillation_backward(given, none, lse, lse, (9.0, 2.0), 0, dx, dy)
        weights *= 9.0
    assert float(weights.max()) < 6e-5
    assert apart(dx, weights @ y.double()) < 1e-3
    assert apart(dy, weights.T @ x.double()) < 1e-3


@contextlib.contextmanager
def kept_precision() -> Iterator[Any]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        yield matmul
    finally:
        matmul.fp32_precision = before


def test_tf32_where_a_user_allows_it_by_either_name() -> None:
    with kept_precision() as matmul:
        assert tiled.precision_of(torch.float32) == "ieee"
        matmul.fp32_precision = "tf32"
        assert tiled.precision_of(torch.float32) == "tf32"
        assert tiled.precision_of(torch.bfloat16) == "ieee"
        matmul.fp32_precision = "ieee"
        assert tiled.precision_of(torch.float32) == "ieee"


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the guard of torch.cuda replaced by one that counts: Triton launches on the current device, whatever its arguments lie on."""
    inside: list[Tensor] = []
    launched: list[str] = []

    @contextlib.contextmanager
    def guard(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor)
        yield
        inside.pop()

    launch = interpreter.GridExecutor.__call__

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert inside, f"{self.fn.__name__} without a guard"
        launched.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", guard)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", checked)
    x, y = (z.float().requires_grad_() for z in matched(5, 8))
    scale, bias = torch.tensor(5.0), torch.tensor(-2.0)
    contrastive_loss(x, y, scale, backend="triton", return_ranks=True)[0].backward()
    contrastive_loss(x, y, scale, backend="triton").backward()
    sigmoid_loss(x, y, scale, bias, backend="triton").backward()
    weights = {"contrastive_weight": 1.0, "distillation_weight": 1.0}
    contrastive_distillation_loss(x, y, scale, y.detach(), x.detach(), scale, backend="triton", **weights).backward()  # type: ignore[arg-type]
    plan, sources, coefficients = case(1, 1, 8, 4, (2, 2))
    layers = block_transfer(plan, [s.requires_grad_() for s in sources], coefficients, backend="triton")
    sum(part.sum() for part in layers).backward()  # type: ignore[union-attr]
    names = {"own_logits", "softmax_forward", "softmax_gradient", "sigmoid_forward", "sigmoid_gradient", "distillation_forward"}
    names |= {"distillation_gradient", "transfer", "transfer_gradient", "add_shares"}
    assert set(launched) == {f"{name}_kernel" for name in names}
