"""Runs that change the number of ranks and the ZeRO stage on their way: the losses and the samples of one that did not."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from mmlg_scale.data.scenes import write_scenes
from tests.forks import start
from tests.test_machine_errors import RECIPE
from tests.training.resize_worker import as_rank, run_parts

STEPS, BATCH = 12, 12
PARTS = ((4, 2), (8, 1), (STEPS, 3))
"""Where each part ends, and on how many ranks it runs."""
CASES = {"zero1": (1, 1, 1), "muon-zero2": (2, 2, 2)}
SLOW_CASES = {"zero2": (2, 2, 2), "zero3": (3, 3, 3), "zero2-to-3": (2, 3, 3), "zero3-to-1": (3, 0, 1), "muon-zero2-to-1": (2, 0, 1)}
"""The ZeRO stage of each part."""


def run_all(root: Path, cases: Mapping[str, tuple[int, int, int]]) -> Path:
    """The cases, and what they are compared with: one rank from start to end."""
    write_scenes(root / "data", num_train=60, num_val=8, num_test=8, seed=0, image_size=32)
    # Warm-up and decay are part of what a resume has to get right.
    training = {"steps": STEPS, "batch_size": BATCH, "eval_every": STEPS}
    (root / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "ancestor": training}))
    run_parts(root, STEPS, {"muon-straight": 0, "adamw-straight": 0})
    for part, (stop_at, ranks) in enumerate(PARTS):
        stages = {case: stages[part] for case, stages in cases.items()}
        if ranks == 1:
            run_parts(root, stop_at, stages)
            continue
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))
            port = reserved.getsockname()[1]
        with open(root / f"log-{part}.txt", "w") as log:
            forks = [start(log.fileno(), as_rank, rank, ranks, port, root, stop_at, stages) for rank in range(ranks)]
        for fork in forks:
            fork.join(400)
        assert [fork.exitcode for fork in forks] == [0] * ranks, (root / f"log-{part}.txt").read_text()[-3000:]
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(tmp_path_factory.mktemp("resize"), CASES)


@pytest.fixture(scope="module")
def slow_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(tmp_path_factory.mktemp("resize-slow"), SLOW_CASES)


def losses(root: Path, case: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (root / case / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def samples(root: Path, case: str) -> list[tuple[int, list[list[int]]]]:
    """(step, samples of all ranks in their order), in the order of training."""
    lines = [json.loads(line) for file in sorted(root.glob(f"{case}.rank*.samples")) for line in file.read_text().splitlines()]
    lines.sort(key=lambda line: (line["step"], line["rank"]))
    found: dict[int, list[list[int]]] = {}
    for line in lines:
        assert len(line["samples"]) * line["ranks"] == BATCH
        found.setdefault(line["step"], []).extend(line["samples"])
    return sorted(found.items())


def check(root: Path, case: str) -> None:
    straight = "muon-straight" if case.startswith("muon") else "adamw-straight"
    expected, found = losses(root, straight), losses(root, case)
    assert [step for step, _ in found] == [step for step, _ in expected] == list(range(1, STEPS + 1))
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], abs=1e-4)
    assert max(loss for _, loss in expected) - min(loss for _, loss in expected) > 0.05  # something was learned
    read = samples(root, case)
    assert read == samples(root, straight)  # none is lost, none is read twice
    assert [len(of_step) for _, of_step in read] == [BATCH] * STEPS
    result = json.loads((root / case / "result.json").read_text())
    assert result["steps"] == STEPS
    assert not (root / case / "checkpoints").exists()


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_then_one_then_three(case: str, root: Path) -> None:
    check(root, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES)
def test_zero_3_and_changes_of_stage(case: str, slow_root: Path) -> None:
    check(slow_root, case)
