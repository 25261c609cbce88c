"""A step does not make the host wait for the device: nothing in it reads a number, or asks how many there are, from a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mmlg_kernels.pairs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmlg_scale import recipe
from mmlg_scale.data.pipeline import Batch
from mmlg_scale.runtime import Runtime
from mmlg_scale.training import loop
from mmlg_scale.training.engine import Engine, start_ranks, stop_ranks
from mmlg_scale.training.health import Health
from mmlg_scale.training.meters import Meters
from tests.training.tiny import BATCH, batch, build_stage


class Waits(TorchDispatchMode):
    """Names of the operators whose results the host, on a GPU, could only have after waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indexes = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indexes)
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def ranks() -> Iterator[torch.device]:
    yield start_ranks(Runtime())
    stop_ranks()


def pairs_of(step: int) -> Batch:
    images, texts = batch(step)
    pixels = (images * 40 + 128).clamp(0, 255).to(torch.uint8)
    return Batch(pixels, texts, torch.stack([torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.int64)], dim=1))


def test_the_count_finds_waits() -> None:
    values = torch.arange(4.0)
    with Waits() as waits:
        values[values > 1].sum()
        values.sum().item()
        values[torch.tensor([0, 2])].sum()
    assert waits.found == ["index", "_local_scalar_dense"]


@pytest.mark.parametrize(
    ("kind", "accumulation", "patch_dropout", "optimizer", "text"),
    [
        ("ancestor", 1, 0.0, "muon", "cut"),
        ("students", 2, 0.5, "adamw", "packed"),
        ("siglip_extraction", 1, 0.0, "adamw", "cut"),
        ("affinity", 1, 0.0, "adamw", "cut"),
        ("in_place", 1, 0.0, "muon", "cut"),
    ],
)
def test_a_step_does_not_wait(
    kind: str, accumulation: int, patch_dropout: float, optimizer: str, text: Any, ranks: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a batch of the loader to its figures, where no line is due."""
    # Only for tensors on the CPU does this check read the scale.
    monkeypatch.setattr(mmlg_kernels.pairs, "check", lambda *tensors: None)
    stage = build_stage(kind, ranks, accumulation=accumulation, patch_dropout=patch_dropout)
    stage.training.optimizer = recipe.Optimizer(name=optimizer)  # type: ignore[arg-type]
    engine = Engine(stage.model, stage.parameter_groups(), runtime=Runtime(text=text), batch_size=BATCH, optimizer=stage.training.optimizer)
    health, meters = Health(engine, 3), Meters([], 100, name="x", device=ranks, log_every=2, peak_flops=1e9)
    meters.resume_from(0)
    for step in (1, 2, 3):
        with Waits() as waits:
            loss, terms = loop.train_step(stage, engine, pairs_of(step), step)
            health.note(step, pairs_of(step).indices_B)
            figures = {"loss": loss, **terms, "gradient_norm": engine.gradient_norm, "learning_rate": engine.learning_rate}
            meters.step(step, figures, num_samples=BATCH, flops=1)
        # When a line is due, each of its figures is read.
        assert waits.found == ["_local_scalar_dense"] * (len(figures) - 1) * meters.is_due(step), step
    engine.close()
    meters.close()
