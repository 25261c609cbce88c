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
from mmlg_scale.files import require_space, write_json_atomic
from mmlg_scale.training.engine import Engine

PARTIAL = "partial-"
RANKS = "ranks.json"


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_folder: Path, *, keep_last: int = 2) -> None:
        self.folder = run_folder / "checkpoints"
        self.keep_last = keep_last

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def require_space(self, engine: Engine) -> None:
        """Raise UserError, on every rank, where the disk has no room for another checkpoint. Collective."""
        shortage: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                require_space(self.folder, engine.checkpoint_bytes, "a checkpoint")
            except UserError as error:
                shortage = [str(error)]
        dist.broadcast_object_list(shortage, src=0)
        if shortage[0] is not None:
            raise UserError(shortage[0])

    def save(self, engine: Engine, step: int, state: Mapping[str, Any]) -> None:
        """Write and publish the checkpoint of `step`, then drop the oldest beyond `keep_last`. Collective.

        Raises:
            UserError: too little disk; nothing is written, and the checkpoints that are there stay.
        """
        self.require_space(engine)
        first = dist.get_rank() == 0
        temporary = self.folder / f"{PARTIAL}step-{step:08d}"
        final = self.folder / f"step-{step:08d}"
        if first:
            for stale in self.folder.glob(f"{PARTIAL}*"):
                shutil.rmtree(stale)
            self.folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        engine.save(temporary, {**state, "step": step})
        if first:
            write_json_atomic(temporary / RANKS, {"world_size": dist.get_world_size()})
        dist.barrier()
        if first and not final.exists():
            os.replace(temporary, final)
            for old in self.steps()[: -self.keep_last]:
                shutil.rmtree(self.folder / f"step-{old:08d}")
        dist.barrier()

    def load_latest(self, engine: Engine) -> dict[str, Any] | None:
        """Load the newest checkpoint into `engine` and return the state given to `save`, or None where there is none. Collective.

        Raises:
            UserError: it was written by another number of ranks, whose shares of the optimiser's state do not fit.
        """
        steps = self.steps()
        if not steps:
            return None
        newest = self.folder / f"step-{steps[-1]:08d}"
        written_by, here = json.loads((newest / RANKS).read_text())["world_size"], dist.get_world_size()
        if written_by != here:
            raise UserError(f"{newest} was written by {written_by} ranks, this run has {here}. Start it with {written_by}, or elsewhere.")
        return engine.load(newest)

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
