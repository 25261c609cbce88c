"""Training steps on a CUDA GPU. Needs mmlg_scale with all its dependencies, where the other tests here need only the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from mmlg_scale import recipe, towers
from mmlg_scale.data.pipeline import Batch
from mmlg_scale.runtime import Runtime, TextMode
from mmlg_scale.towers.packing import backend_for
from mmlg_scale.training import loop
from mmlg_scale.training.engine import Engine, autocast_of, start_ranks, stop_ranks
from mmlg_scale.training.inputs import Inputs, inputs_of
from mmlg_scale.training.stages import ExtractionStage
from mmlg_scale.training.teacher import LiveTeacher
from mmlg_scale.training.teacher_pool import KeptTeacher, Layout, PooledTeacher, PoolFile
from tests.gpu.common import errors
from tests.training.tiny import BATCH, batch, build_stage

pytestmark = pytest.mark.gpu


@pytest.fixture
def ranks() -> Iterator[torch.device]:
    yield start_ranks(Runtime())
    torch.cuda.set_sync_debug_mode("default")
    stop_ranks()


@pytest.mark.parametrize("text", ["cut", "packed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["ancestor", "extraction", "students", "in_place", "siglip_extraction"])
def test_a_step_does_not_wait(kind: str, precision: str, text: TextMode, ranks: torch.device) -> None:
    """After the first steps, which compile kernels and fill caches."""
    stage = build_stage(kind, ranks)
    stage.training.optimizer = recipe.Optimizer()
    engine = Engine(
        stage.model,
        stage.parameter_groups(),
        runtime=Runtime(text=text),
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


@pytest.mark.parametrize("kept", [False, True])
def test_a_step_on_a_pool_does_not_wait(kept: bool, ranks: torch.device, tmp_path: Path) -> None:
    """Where the ancestor's outputs are read: from the second pass on, or always where a complete run has kept them."""
    stage = build_stage("extraction", ranks)
    assert isinstance(stage, ExtractionStage)
    live, identity = stage.teacher, {"role": "teacher pool"}
    assert isinstance(live, LiveTeacher)
    layout = Layout.of(live.spec.config, stage.settings.loss)
    stage.teacher = PooledTeacher(live, PoolFile(tmp_path, layout, BATCH, kept_as=identity))
    stage.training.optimizer = recipe.Optimizer()
    engine = Engine(stage.model, stage.parameter_groups(), runtime=Runtime(), batch_size=BATCH, optimizer=stage.training.optimizer)
    images, texts = batch(0)
    places = torch.arange(BATCH)
    samples = torch.stack([places, torch.zeros_like(places)], dim=1)
    pairs = Batch((images * 40 + 128).clamp(0, 255).to(torch.uint8), texts, samples, places).pin_memory()
    inputs = inputs_of(pairs, stage.spec.preprocess, ranks, text="cut")
    computed = [stage.targets(lambda: autocast_of("fp32", ranks), inputs) for _ in range(2)]
    if kept:
        stage.teacher = KeptTeacher(
            towers.Bundle(live.spec, live.model.clip.state_dict()), PoolFile(tmp_path, layout, BATCH, kept_as=identity, finished=True)
        )
    losses = []
    for step in range(12):
        torch.cuda.set_sync_debug_mode("error" if step >= 10 else "default")
        losses.append(loop.train_step(stage, engine, pairs, step)[0])
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
    found = stage.targets(lambda: autocast_of("fp32", ranks), inputs)
    for targets in (computed[1], found):
        assert computed[0] is not None
        assert targets is not None
        assert torch.equal(targets["image_features"], computed[0]["image_features"])
        assert torch.equal(targets["text_hidden"][0], computed[0]["text_hidden"][0])
    engine.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["ancestor", "extraction"])
def test_packed_captions_train_as_whole_ones(kind: str, precision: str, ranks: torch.device) -> None:
    """Loss and gradients against whole captions in fp32: bf16's kernels as near as bf16 on whole captions is."""
    stage = build_stage(kind, ranks, context_length=24)
    images, texts = (x.to(ranks) for x in batch(0, 24))
    lengths = towers.lengths_of(texts.cpu())

    def found(precision: str, packed: bool) -> list[torch.Tensor]:
        inputs = Inputs(images, texts, lengths=lengths, packed=packed)
        targets = stage.targets(lambda: autocast_of(precision, ranks), inputs)
        with autocast_of(precision, ranks):
            outputs = stage.model(inputs.image, inputs.text, packing=inputs.packing, **stage.students(0)[0])
            loss, _ = stage.objective(outputs, targets, inputs.text)
        used = [parameter for parameter in stage.model.parameters() if parameter.numel()]
        gradients = torch.autograd.grad(loss, used, allow_unused=True)
        return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]

    exact, plain = found("fp32", packed=False), found(precision, packed=False)
    query = torch.empty(1, 2, 8, device=ranks, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    assert backend_for(query) == ("padded" if precision == "fp32" else "varlen")
    wrong = errors(found(precision, packed=True), plain, exact, 1e-4 if precision == "fp32" else 2e-2)
    assert not wrong
