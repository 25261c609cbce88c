"""Runs on a mixture for test_mixture_runs.py: one rank of one part of a run, in a process of its own, noting what it reads."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from mmlg_scale.cli import main
from mmlg_scale.errors import EXIT_STOPPED
from mmlg_scale.training import loop, signals
from mmlg_scale.training.signals import Request


def run_part(folder: Path, case: str, stop_at: int, num_workers: int) -> None:
    """`mmlg train` from where the run is to the step `stop_at`, or to its end where that is before."""

    def agree(self: Any, step: int, *, now: bool = False) -> Request:
        return Request.STOP if step == stop_at and not now else Request.NOTHING

    step = loop.train_step

    def noting(stage: Any, engine: Any, batch: Any, number: int) -> Any:
        line = {"step": number, "rank": dist.get_rank(), "ranks": dist.get_world_size(), "samples": batch.samples_BS.tolist()}
        with open(folder / f"{case}.rank{dist.get_rank()}.samples", "a") as file:
            file.write(json.dumps(line) + "\n")
        return step(stage, engine, batch, number)

    words = ["train", str(folder / "recipe.yaml"), "--out", str(folder / case), "--runtime.log_every=1"]
    words += [f"--runtime.num_workers={num_workers}"]
    with mock.patch.object(signals.Requests, "agree", agree), mock.patch.object(loop, "train_step", noting):
        code = main(words)
    assert code in (0, EXIT_STOPPED)
    assert (code == 0) == (folder / case / "result.json").exists()


def as_rank(rank: int, num_ranks: int, port: int, folder: Path, case: str, stop_at: int, num_workers: int) -> int:
    """`run_part` as one of several ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    try:
        run_part(folder, case, stop_at, num_workers)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
