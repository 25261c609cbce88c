"""Checkpoints and the run folder.

    RUN/
      run.json                    whose run this is: written first, compared at every start
      metrics.jsonl, tensorboard/ the curves
      checkpoints/step-00000100/  DeepSpeed's files, one folder a checkpoint; at most `keep_last` stay
      result.json                 written last: with it the run is complete

A checkpoint is written under a temporary name and published by a rename once every rank has finished, so a kill at any instant leaves
whole checkpoints only. A temporary folder left by a kill is removed at the next save.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmlg_scale.errors import UserError
from mmlg_scale.files import write_json_atomic
from mmlg_scale.training.engine import Engine

PARTIAL = "partial-"


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_folder: Path, *, keep_last: int = 2) -> None:
        self.folder = run_folder / "checkpoints"
        self.keep_last = keep_last

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def save(self, engine: Engine, step: int, state: Mapping[str, Any]) -> None:
        """Write and publish the checkpoint of `step`, then drop the oldest beyond `keep_last`. Collective."""
        first = dist.get_rank() == 0
        temporary = self.folder / f"{PARTIAL}step-{step:08d}"
        final = self.folder / f"step-{step:08d}"
        if first:
            for stale in self.folder.glob(f"{PARTIAL}*"):
                shutil.rmtree(stale)
            self.folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        engine.save(temporary, {**state, "step": step})
        dist.barrier()
        if first and not final.exists():
            os.replace(temporary, final)
            for old in self.steps()[: -self.keep_last]:
                shutil.rmtree(self.folder / f"step-{old:08d}")
        dist.barrier()

    def load_latest(self, engine: Engine) -> dict[str, Any] | None:
        """Load the newest checkpoint into `engine` and return the state given to `save`, or None where there is none. Collective."""
        steps = self.steps()
        if not steps:
            return None
        return engine.load(self.folder / f"step-{steps[-1]:08d}")

    def remove(self) -> None:
        """Drop all checkpoints: the run is complete and its result stands apart."""
        if dist.get_rank() == 0 and self.folder.exists():
            shutil.rmtree(self.folder)


def claim_run_folder(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make `folder` the run described by `identity`, or recognise it.

    Returns:
        The content of result.json where the run is complete, else None.

    Raises:
        UserError: the folder holds another run, or files that are no run's.
    """
    marker = folder / "run.json"
    if marker.is_file():
        found = json.loads(marker.read_text())
        if found != identity:
            keys = sorted(key for key in {*found, *identity} if found.get(key) != identity.get(key))
            raise UserError(
                f"{folder} holds another recipe's run (differs in: {', '.join(keys)}). Give another --out, or remove that folder."
            )
        result = folder / "result.json"
        return json.loads(result.read_text()) if result.is_file() else None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and holds no run of mmlg. Give another --out, or remove it.")
    write_json_atomic(marker, dict(identity))
    return None
