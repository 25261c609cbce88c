"""What ranks send each other, in which type; and how long waiting for it is found to take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmlg_scale.recipe import Engine as EngineSettings
from mmlg_scale.recipe import Recipe
from mmlg_scale.runtime import Runtime
from mmlg_scale.training import communication
from mmlg_scale.training.communication import exposed_communication, uncovered
from mmlg_scale.training.engine import Engine, start_ranks, stop_ranks
from mmlg_scale.training.inputs import Inputs
from mmlg_scale.training.step import compute_gradients
from tests.training.tiny import BATCH, OPTIMIZER, batch, build_stage

CPU = torch.device("cpu")


def _counted(sent: Counter[torch.dtype], collective: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        tensor = args[2] if collective.__name__ == "_reduce_scatter_base" else args[1]
        while isinstance(tensor, list):
            tensor = tensor[0]
        sent[tensor.dtype] += tensor.numel()
        return collective(*args, **kwargs)

    return run


@pytest.mark.parametrize(
    ("precision", "sent_in", "zero_stage"),
    [("bf16", "fp32", 1), ("bf16", "bf16", 1), ("fp32", "bf16", 2), ("bf16", "fp32", 3), ("bf16", "bf16", 3)],
)
def test_gradients_travel_in_the_type_that_is_asked_for(
    precision: str, sent_in: str, zero_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them; but at stage 3 not those of what is gathered in fp32, because autocast does not round it."""
    sent: Counter[torch.dtype] = Counter()
    for name in ("allreduce", "reduce", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter"):
        if hasattr(dist.ProcessGroup, name):
            monkeypatch.setattr(dist.ProcessGroup, name, _counted(sent, getattr(dist.ProcessGroup, name)))
    stage = build_stage("extraction", start_ranks(Runtime()))
    count = sum(parameter.numel() for parameter in stage.model.parameters())
    whole = sum(
        parameter.numel()
        for name, parameter in stage.model.named_parameters()
        if parameter.ndim < 2 or any(word in name for word in ("embedding", "coefficients", "vectors"))
    )
    runtime = Runtime(zero_stage=zero_stage, persistence_threshold=0)
    engine = Engine(
        stage.model,
        stage.parameter_groups(),
        runtime=runtime,
        batch_size=BATCH,
        optimizer=OPTIMIZER,
        precision=precision,
        communication=sent_in,
        sgd=True,
    )
    sent.clear()
    compute_gradients(stage, engine, Inputs(*batch(0)), 0)
    engine.close()
    stop_ranks()
    if sent_in == "fp32":
        assert sent == {torch.float32: count}
    elif zero_stage < 3:
        assert sent == {torch.bfloat16: count}
    else:
        assert sent == {torch.bfloat16: count - whole, torch.float32: whole}
        assert 0 < whole < count / 4


def test_the_type_is_part_of_a_run_s_identity_where_it_is_not_fp32() -> None:
    """Runs from before there was a choice are recognised; those that round their gradients are others."""
    for role in ("ancestor", "extraction", "pretraining"):
        plain, rounded = (Recipe(engine=EngineSettings(communication=kind)).used_by(role, init="mmlg") for kind in ("fp32", "bf16"))  # type: ignore[arg-type]
        assert "communication" not in plain["engine"]
        assert rounded["engine"] == plain["engine"] | {"communication": "bf16"}


def test_uncovered_time_by_hand() -> None:
    """[0, 4] and [3, 6] are a union of 6; [1, 2], [5, 9] and [8, 10] cover 2 of it."""
    assert uncovered([(3, 6), (0, 4)], [(5, 9), (1, 2), (8, 10)]) == 4
    assert uncovered([(0, 1), (2, 3)], []) == 2
    assert uncovered([(0, 1)], [(0, 1)]) == 0
    assert uncovered([], [(0, 1)]) == 0


def test_waiting_is_counted_and_hidden_communication_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves where this test says so; torch's own waiting is back afterwards."""
    now = [10.0]
    start_ranks(Runtime())
    real = dist.Work.wait

    def wait(*args: Any, **kwargs: Any) -> Any:
        now[0] += 0.5
        return real(*args, **kwargs)

    monkeypatch.setattr(dist.Work, "wait", wait)
    monkeypatch.setattr(communication.time, "perf_counter", lambda: now[0])
    with exposed_communication(CPU) as found:
        dist.all_reduce(torch.ones(3))
        work = dist.all_reduce(torch.ones(3), async_op=True)
        now[0] += 7.0  # other work
        assert found.seconds == 0.5
        work.wait()
    assert found.seconds == 1.0
    assert dist.Work.wait is wait
    stop_ranks()
