"""Cut and packed captions train as whole ones do, and cost what is computed, over ranks too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.data.pipeline import Batch
from mmlg_scale.runtime import TextMode
from mmlg_scale.training.inputs import inputs_of, text_length
from mmlg_scale.training.loop import Progress, _Spent
from tests.forks import run_ranks
from tests.training.tiny import BATCH, batch, build_stage

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["ancestor", "extraction", "factorised"])
def test_gradients_are_those_of_whole_captions(kind: str) -> None:
    """With the teacher's and the students' hidden states compared where they are."""
    stage = build_stage(kind, CPU, context_length=24)
    texts = batch(0, 24)[1]
    pairs = Batch(torch.randint(0, 256, (BATCH, 3, 16, 16), dtype=torch.uint8), texts, torch.zeros(BATCH, 2, dtype=torch.int64))
    lengths = [4 + row % 5 + 6 * (row >= BATCH // 2) for row in range(BATCH)]
    assert [text_length(pairs, mode) for mode in ("full", "cut", "packed")] == [24, 16, tuple(lengths)]

    def found(mode: TextMode, **options: Any) -> dict[str, Tensor]:
        inputs = inputs_of(pairs, towers.Preprocess(), CPU, text=mode)
        assert torch.equal(inputs.text, texts if mode == "full" else texts[:, :16])
        assert (inputs.packing is not None) == (mode == "packed")
        targets = stage.targets(torch.no_grad, inputs)
        outputs = stage.model(inputs.image, inputs.text, packing=inputs.packing, **stage.students(0)[0], **options)
        loss, _ = stage.objective(outputs, targets, inputs.text)
        named = {name: parameter for name, parameter in stage.model.named_parameters() if parameter.numel()}
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {"loss": loss.detach()} | {name: g for name, g in zip(named, gradients, strict=True) if g is not None}

    whole = found("full")
    less = [found("cut"), found("packed"), found("packed", checkpoint=True)]
    if kind != "ancestor":
        stage.compose_per_layer = True  # type: ignore[attr-defined]
        less.append(found("packed", checkpoint=True))
    for gradients in less:
        assert set(gradients) == set(whole)
        for name, wanted in whole.items():
            assert (gradients[name] - wanted).norm() <= 1e-5 * wanted.norm() + 1e-7, name
    assert stage.flops(0, 16)[0] < stage.flops(0)[0] == stage.flops(0, 24)[0]
    for packed, each in zip(stage.flops(0, lengths), zip(*(stage.flops(0, length) for length in lengths), strict=True), strict=True):
        assert packed == round(sum(each) / BATCH)


def _rank(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    progress = Progress(flops=5)
    spent = _Spent(progress, SimpleNamespace(device=CPU))  # type: ignore[arg-type]
    for _ in range(3):
        spent.add((2**61 + rank, 7), num_samples=4 + rank)
    assert (progress.flops, spent.unreported()) == (5, 0)
    spent.settle()
    students, teacher = 3 * (4 * 2**61 + 5 * (2**61 + 1)), 3 * 7 * (4 + 5)
    assert (progress.flops, progress.teacher_flops) == (5 + students, teacher)  # more than 64 bits hold
    assert (spent.unreported(), spent.unreported()) == (students + teacher, 0)
    spent.settle()
    assert progress.flops == 5 + students
    dist.destroy_process_group()


def test_costs_of_ranks_are_summed_exactly(tmp_path: Path) -> None:
    run_ranks(_rank, (str(tmp_path / "store"),), 2)
