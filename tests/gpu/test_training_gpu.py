"""Training steps on a CUDA GPU. Needs mmlg_scale with all its dependencies, where the other tests here need only the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("deepspeed")

from mmlg_scale import recipe
from mmlg_scale.data.pipeline import Batch
from mmlg_scale.runtime import Runtime
from mmlg_scale.training import loop
from mmlg_scale.training.engine import Engine, start_ranks, stop_ranks
from tests.training.tiny import BATCH, batch, build_stage

pytestmark = pytest.mark.gpu


@pytest.fixture
def ranks() -> Iterator[torch.device]:
    yield start_ranks(Runtime())
    torch.cuda.set_sync_debug_mode("default")
    stop_ranks()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["ancestor", "extraction", "students", "siglip_extraction"])
def test_a_step_does_not_wait(kind: str, precision: str, ranks: torch.device) -> None:
    """After the first steps, which compile kernels and fill caches."""
    stage = build_stage(kind, ranks)
    stage.training.optimizer = recipe.Optimizer()
    engine = Engine(
        stage.model,
        stage.parameter_groups(),
        runtime=Runtime(),
        batch_size=BATCH,
        optimizer=stage.training.optimizer,
        precision=precision,
    )
    places = torch.stack([torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.int64)], dim=1)
    losses = []
    for step in range(12):
        images, texts = batch(step)
        pairs = Batch((images * 40 + 128).clamp(0, 255).to(torch.uint8), texts, places).pin_memory()
        torch.cuda.set_sync_debug_mode("error" if step >= 10 else "default")
        losses.append(loop.train_step(stage, engine, pairs, step)[0])
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
    engine.close()
