"""Two ranks under ZeRO against one plain-torch process that sees the whole batch: the same updates, tensor by tensor."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from mmlg_launchers import LocalLauncher, Resources
from safetensors.torch import load_file
from torch import Tensor

from tests.training.tiny import KINDS, STEPS, batch, build_stage


def single_process_updates(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters before, and after three plain torch.optim.SGD steps on whole batches."""
    stage = build_stage(kind, torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    optimizer = torch.optim.SGD(stage.parameter_groups())
    for step in range(STEPS):
        loss, _ = stage.loss(stage.model, nullcontext, *batch(step), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, stage.model.state_dict()


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_two_ranks_equal_one_process(zero_stage: int, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.training.ranks_worker", str(zero_stage), str(tmp_path)]
    job = LocalLauncher().submit(argv, Resources(num_processes=2), tmp_path / "run")
    job.wait(timeout=180)
    assert job.exit_code == 0, job.log_paths()[0].read_text()[-3000:]
    for kind in KINDS:
        before, expected = single_process_updates(kind)
        after = load_file(tmp_path / f"{kind}.safetensors")
        assert any("logit_scale" in name for name in after)
        for name, start in before.items():
            wanted, got = expected[name] - start, after[name] - start
            size = wanted.norm()
            assert size > 1e-6 * start.norm().clamp_min(1.0), f"{kind} {name} hardly moves: the comparison would show nothing"
            assert (got - wanted).norm() <= 1e-4 * size, (kind, name)
