"""Two ranks under ZeRO against one plain-torch process that sees the whole batch: the same updates, tensor by tensor."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mmlg_launchers import LocalLauncher, Resources
from safetensors.torch import load_file
from torch import Tensor

from mmlg_scale import recipe
from mmlg_scale.training.muon import MuonAdamW
from tests.training.ranks_worker import BF16, CONTEXT, EXACT, MORE, MUON, RESUMED, WRONG, Case
from tests.training.tiny import STEPS, build_stage, plain_loss, plain_updates

Outs = Callable[[object], Path]


def written(group: str, folder: Path) -> Path:
    """What one pair of ranks wrote for the cases of a group."""
    argv = [sys.executable, "-m", "tests.training.ranks_worker", str(folder), group]
    job = LocalLauncher().submit(argv, Resources(num_processes=2), folder / "run")
    job.wait(timeout=400)
    assert job.exit_code == 0, job.log_paths()[0].read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written("usual", tmp_path_factory.mktemp("usual"))


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written("more", tmp_path_factory.mktemp("more"))


@pytest.fixture
def outs(request: pytest.FixtureRequest) -> Outs:
    """Case -> the folder of what was written for it."""
    return lambda case: request.getfixturevalue("more" if case in MORE else "usual")


def params(cases: Sequence[Any]) -> list[Any]:
    """The cases as pytest's parameters; those of `MORE` are slow."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.slow] * (case in MORE)) for case in cases]


@functools.cache
def expected_updates(kind: str, patch_dropout: float, captions: int) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    return plain_updates(build_stage(kind, torch.device("cpu"), patch_dropout=patch_dropout, context_length=CONTEXT), captions)


def errors(case: Case, outs: Outs) -> dict[str, float]:
    """Each tensor's relative error of the update of three steps."""
    before, after, _ = expected_updates(case.kind, case.patch_dropout, case.captions)
    got = load_file(outs(case) / f"{case.name}.safetensors")
    assert set(got) == set(before)
    assert any("logit_scale" in name for name in got)
    found = {}
    for name, start in before.items():
        size = (after[name] - start).norm()
        assert size > 1e-6 * start.norm().clamp_min(1.0), f"{name} hardly moves: the comparison would show nothing"
        found[name] = float((got[name] - after[name]).norm() / size)
    return found


@pytest.mark.parametrize("case", params(EXACT), ids=lambda case: case.name)
def test_two_ranks_equal_one_process(case: Case, outs: Outs) -> None:
    """ZeRO 0 to 3, micro-batches, patch dropout, activation checkpointing and cut captions change no number."""
    wrong = {name: error for name, error in errors(case, outs).items() if error > 1e-4}
    assert not wrong


@pytest.mark.parametrize("case", params(EXACT), ids=lambda case: case.name)
def test_the_gradient_norm_is_the_whole_batch_s(case: Case, outs: Outs) -> None:
    """What a run logs: of all ranks' gradients, on every rank, at every ZeRO stage."""
    wanted = expected_updates(case.kind, case.patch_dropout, case.captions)[2]
    norms = [float((outs(case) / f"{case.name}-rank{rank}.norm").read_text()) for rank in (0, 1)]
    assert norms == pytest.approx([wanted, wanted], rel=1e-3)


@pytest.mark.parametrize("case", params(WRONG), ids=lambda case: case.name)
def test_the_comparison_finds_wrong_gradients(case: Case, outs: Outs) -> None:
    """A factor of the world size, and a gather without gradient, are off by far more than the tolerance."""
    assert max(errors(case, outs).values()) > 0.05


@pytest.mark.parametrize("case", params(BF16), ids=lambda case: case.name)
def test_bf16_updates_point_the_same_way(case: Case, outs: Outs) -> None:
    found = errors(case, outs)
    assert max(found.values()) < 0.1
    assert min(found.values()) > 1e-4, "this was computed in fp32"


@pytest.mark.parametrize(("kind", "zero_stage"), MUON)
def test_muon_of_two_ranks_equals_one_process(kind: str, zero_stage: int, outs: Outs) -> None:
    """Shards of flat groups, cut through matrices, against whole matrices in one process."""
    stage = build_stage(kind, torch.device("cpu"), context_length=CONTEXT)
    settings = stage.training.optimizer = recipe.Optimizer(name="muon", learning_rate=1e-3)
    before = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    adamw = {"betas": (settings.beta1, settings.beta2), "eps": settings.epsilon}
    optimizer = MuonAdamW(stage.parameter_groups(), **adamw)
    for step in range(STEPS):
        optimizer.zero_grad()
        plain_loss(stage, step).backward()
        torch.nn.utils.clip_grad_norm_(stage.model.parameters(), settings.gradient_clipping)
        optimizer.step()
    got = load_file(outs((kind, zero_stage)) / f"muon-{Case(kind, zero_stage).name}.safetensors")
    for name, after in stage.model.state_dict().items():
        # AdamW turns rounding in tiny gradients into whole steps; Muon's own parameters are compared closely.
        tolerance = 1e-3 if name.endswith(("multimodal", "unimodal_image", "unimodal_text", "c_fc.weight", "in_proj_weight")) else 0.1
        assert (got[name] - after).norm() <= tolerance * (after - before[name]).norm(), name


@pytest.mark.parametrize(("kind", "zero_stage", "optimizer"), params(RESUMED))
def test_a_resumed_run_is_the_same_bit_for_bit(kind: str, zero_stage: int, optimizer: str, outs: Outs) -> None:
    name = f"{Case(kind, zero_stage).name}-{optimizer}"
    straight, resumed = (load_file(outs((kind, zero_stage, optimizer)) / f"{way}-{name}.safetensors") for way in ("straight", "resumed"))
    assert set(straight) == set(resumed)
    assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []
