"""Checkpoints of a run: RUN/checkpoints/step-00000100/, DeepSpeed's files, at most `keep_last` of them.

A checkpoint is written under a temporary name and published by a rename once every rank has finished, so a kill at any instant leaves
whole checkpoints only. A temporary folder left by a kill is removed at the next start.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmlg_scale.digests import file_digest
from mmlg_scale.errors import UserError
from mmlg_scale.files import make_folder, require_space, writing
from mmlg_scale.ranks import on_first_rank, several_ranks
from mmlg_scale.records import read_record, write_record
from mmlg_scale.training.engine import Engine

PARTIAL = "partial-"
RANKS = "ranks.json"
"""How the checkpoint is divided (world_size, zero_stage), and the SHA-256 of its other files."""


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_folder: Path, *, keep_last: int = 2) -> None:
        self.folder = run_folder / "checkpoints"
        self.keep_last = keep_last

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def require_space(self, engine: Engine) -> None:
        """Raise UserError, on every rank, where the disk has no room for another checkpoint. Collective.

        What a kill or a full disk left of one goes first.
        """

        def check() -> None:
            for stale in self.folder.glob(f"{PARTIAL}*"):
                shutil.rmtree(stale)
            require_space(self.folder, engine.checkpoint_bytes, "a checkpoint")

        on_first_rank(check)

    def save(self, engine: Engine, step: int, state: Mapping[str, Any]) -> None:
        """Write and publish the checkpoint of `step`, then drop the oldest beyond `keep_last`. Collective.

        Raises:
            UserError: too little disk; nothing is written, and the checkpoints that are there stay.
            OSError: on the rank that cannot write its part, with the path; the same holds.
        """
        self.require_space(engine)
        first = dist.get_rank() == 0
        temporary = self.folder / f"{PARTIAL}step-{step:08d}"
        final = self.folder / f"step-{step:08d}"
        on_first_rank(lambda: make_folder(self.folder))
        try:
            with writing(final):
                engine.save(temporary, {**state, "step": step})
            dist.barrier()
            digests = _digests(temporary)
            if first:
                write_record(temporary / RANKS, {**_division(engine), "files": digests})
        except OSError:
            if not several_ranks():  # others may be writing to it
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        dist.barrier()
        if first and not final.exists():
            os.replace(temporary, final)
            for old in self.steps()[: -self.keep_last]:
                shutil.rmtree(self.folder / f"step-{old:08d}")
        dist.barrier()

    def load_latest(self, engine: Engine) -> dict[str, Any] | None:
        """Load the newest checkpoint into `engine` and return the state given to `save`, or None where there is none. Collective.

        Raises:
            UserError: it was written by another number of ranks or at another ZeRO stage: their parts of the optimiser's state do not fit.
        """
        steps = self.steps()
        if not steps:
            return None
        newest = self.folder / f"step-{steps[-1]:08d}"
        remedy = f"Remove {newest}; the run then resumes from the checkpoint before it, or starts again."
        found, here = read_record(newest / RANKS, "description of a checkpoint", remedy), _division(engine)
        for key, told in (("world_size", "{} ranks"), ("zero_stage", "ZeRO stage {}")):
            if found.get(key) != here[key]:
                written, now = told.format(found.get(key)), told.format(here[key])
                raise UserError(
                    f"{newest} was written with {written}, this run has {now}. Resume it with {written}, or use another folder."
                )
        self._check_files(newest, found.get("files"), remedy)
        return engine.load(newest)

    def _check_files(self, folder: Path, wanted: Any, remedy: str) -> None:
        """Raise UserError, on every rank, unless the files are those that were written: DeepSpeed unpickles them. Collective."""
        if wanted is None:
            return  # of an earlier version
        found = _digests(folder)
        for name in sorted({*wanted, *found}):
            if wanted.get(name) != found.get(name):
                raise UserError(f"{folder / name} is damaged: it is not the file that was written (SHA-256). {remedy}")

    def remove(self) -> None:
        """Drop all checkpoints: the run is complete and has its result."""
        if dist.get_rank() == 0 and self.folder.exists():
            shutil.rmtree(self.folder)


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's files by name, each hashed by one rank. Collective."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RANKS)
    files = files[dist.get_rank() :: dist.get_world_size()]
    with ThreadPoolExecutor(min(4, len(files) or 1)) as pool:  # hashlib lets other threads run
        own = dict(zip((str(path.relative_to(folder)) for path in files), pool.map(_digest, files), strict=True))
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {name: digest for part in parts for name, digest in part.items()}


def _digest(path: Path) -> str:
    try:
        return file_digest(path, "checkpoint")
    except UserError as error:
        return str(error)  # a rank that raised alone would leave the others waiting


def _division(engine: Engine) -> dict[str, int]:
    return {"world_size": dist.get_world_size(), "zero_stage": engine.zero_stage}
