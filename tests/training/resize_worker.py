"""Parts of runs, for test_resize.py: all cases in one process of each rank, because a process start costs more than the runs."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from mmlg_scale.cli import main
from mmlg_scale.errors import EXIT_STOPPED
from mmlg_scale.runtime import Runtime
from mmlg_scale.training import loop, signals
from mmlg_scale.training.engine import start_ranks, stop_ranks
from mmlg_scale.training.signals import Request


def run_parts(folder: Path, stop_at: int, stages: Mapping[str, int]) -> None:
    """Run each case from where it is to the step `stop_at`, or to its end where that is before, and note the samples of each step."""

    start_ranks(Runtime())  # the group is this function's: a run leaves it alone

    def agree(self: Any, step: int, *, now: bool = False) -> Request:
        return Request.STOP if step == stop_at and not now else Request.NOTHING

    for case, zero_stage in stages.items():
        step = loop.train_step

        def noting(
            stage: Any, engine: Any, batch: Any, number: int, step: Any = step, case: str = case, zero_stage: int = zero_stage
        ) -> Any:
            assert engine.zero_stage == zero_stage
            line = {"step": number, "rank": dist.get_rank(), "ranks": dist.get_world_size(), "samples": batch.samples_BS.tolist()}
            with open(folder / f"{case}.rank{dist.get_rank()}.samples", "a") as file:
                file.write(json.dumps(line) + "\n")
            return step(stage, engine, batch, number)

        words = ["train", str(folder / "recipe.yaml"), "--data.path", str(folder / "data"), "--out", str(folder / case)]
        words += [f"--runtime.zero_stage={zero_stage}", "--runtime.log_every=1", "--runtime.persistence_threshold=0"]
        words += ["--ancestor.optimizer.name=muon"] if case.startswith("muon") else []
        with (
            mock.patch.object(signals.Requests, "agree", agree),
            mock.patch.object(loop, "train_step", noting),
        ):
            code = main(words)
        assert code in (0, EXIT_STOPPED)
        assert (code == 0) == (folder / case / "result.json").exists()
    stop_ranks()


def as_rank(rank: int, num_ranks: int, port: int, folder: Path, stop_at: int, stages: Mapping[str, int]) -> int:
    """`run_parts` as one of several ranks, in a process of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    try:
        run_parts(folder, stop_at, stages)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
