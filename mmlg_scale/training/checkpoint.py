"""Checkpoints of a run, which resume on any number of ranks and at any ZeRO stage.

    RUN/checkpoints/
      step-00000100/
        checkpoint.json           the marker, written last: step, progress, who wrote it, SHA-256 of the other files
        rank-00000.fp32.safetensors ...      the training state, see `state`
      partial-3-step-00000200/    being written (by the run's third start)
      damaged-step-00000150/      found to be damaged at a start, and passed over
      last-save.json              step, seconds and bytes of the last save

A checkpoint is written under a temporary name, marked once every rank has finished, flushed to the disk and published by a rename: a kill
at any instant leaves whole checkpoints only. What is found to lack its marker, or a byte, is passed over with a message.

Training waits only while each rank copies its share to the CPU's memory. A thread of each rank then writes the copy, and the threads agree
over a process group of their own; the first rank's publishes. There is never more than one save at a time.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mmlg_scale.digests import content_digest
from mmlg_scale.errors import FollowingError, UserError, is_of_the_machine
from mmlg_scale.files import flush, make_folder, require_space, writing
from mmlg_scale.ranks import gloo_group, is_first_rank, on_first_rank, several_ranks
from mmlg_scale.records import read_record, write_record
from mmlg_scale.training.engine import Engine
from mmlg_scale.training.state import write_files

PARTIAL, DAMAGED, MARKER, LAST_SAVE = "partial-", "damaged-", "checkpoint.json", "last-save.json"
_FORMAT = 1


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        keep_last: how many of a run under way are kept.
        keep_every: those of multiples of this step are kept besides, also when the run is complete.
        incarnation: number of this start of the run.
        check_owner: raises where another start has taken the run over; asked before anything is published.
        background: write while training continues. A copy of each rank's share is in the CPU's memory meanwhile.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        incarnation: int = 0,
        check_owner: Callable[[], None] = lambda: None,
        background: bool = False,
    ) -> None:
        self.folder = run_folder / "checkpoints"
        self.keep_last, self.keep_every, self.incarnation, self.check_owner = keep_last, keep_every, incarnation, check_owner
        self.background = background
        self._pending: _Work | None = None
        self._group: dist.ProcessGroup | None = None  # of the threads that write

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def last_save_seconds(self) -> float | None:
        """How long the last save took; None where there was none. Collective."""

        def seconds() -> float | None:
            try:
                found = read_record(self.folder / LAST_SAVE, "record", "Remove it.").get("seconds")
            except UserError:
                return None
            return found if isinstance(found, float) else None

        return on_first_rank(seconds)

    def require_space(self, engine: Engine) -> None:
        """Raise UserError, on every rank, where the disk has no room for another checkpoint. Collective.

        What a kill or a full disk left of one goes first, also under the hands of an orphan of an earlier start.
        """

        def check() -> None:
            self.check_owner()
            for stale in self.folder.glob(f"{PARTIAL}*"):
                shutil.rmtree(stale, ignore_errors=True)
            require_space(self.folder, engine.checkpoint_bytes, "a checkpoint")

        on_first_rank(check)

    def save(self, engine: Engine, step: int, state: Mapping[str, Any]) -> float:
        """Write and publish the checkpoint of `step`, then drop what need not be kept. Collective.

        In the background, this returns once the state is copied; `wait` returns when it is published. An earlier save is waited for first.

        Args:
            state: what is to be known besides the engine's state; JSON.

        Returns:
            The seconds for which training was kept waiting.

        Raises:
            UserError: too little disk; nothing is published, and the checkpoints that are there stay, which the console is told.
            OSError: on the rank that cannot write its part, with the path; the same holds.
        """
        started = time.monotonic()
        self.wait()
        temporary, final = self.folder / f"{PARTIAL}{self.incarnation}-step-{step:08d}", self.folder / f"step-{step:08d}"
        content = {"format": _FORMAT, "step": step, **_division(engine), "state": copy.deepcopy(dict(state))}
        try:
            self.require_space(engine)
            on_first_rank(lambda: make_folder(temporary))
        except (OSError, UserError):
            self._give_up(temporary, step)
            raise
        if self.background and several_ranks() and self._group is None:
            self._group = gloo_group()
        files = list(engine.copies()) if self.background else engine.copies()
        self._pending = _Work(lambda: self._write_and_publish(files, temporary, final, content, started), self.background)
        if not self.background:
            self.wait()
        return time.monotonic() - started

    @property
    def saving(self) -> bool:
        """Whether a save is being written in the background. Collective."""
        pending = self._pending
        return pending is not None and on_first_rank(lambda: not pending.done)

    def wait(self) -> None:
        """Wait until the last save is published. Collective.

        Raises:
            As `save`; FollowingError on the other ranks.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            _together(pending.result)

    def settle(self, seconds: float = 120.0) -> None:
        """Give a save in the background so long to end, whatever its outcome: this rank ends for another reason."""
        if self._pending is not None:
            self._pending.join(seconds)

    def _write_and_publish(
        self, files: Iterable[tuple[str, Mapping[str, Tensor]]], temporary: Path, final: Path, content: Mapping[str, Any], started: float
    ) -> None:
        try:
            found = _together(lambda: self._write(files, temporary, final), self._group)
            if is_first_rank():
                digests = {name: digest for part in found for name, digest in part.items()}
                self._publish(temporary, final, {**content, "files": digests})
        except (OSError, UserError, FollowingError):
            self._give_up(temporary, content["step"])
            raise
        if is_first_rank():
            self._after(content["step"], started)

    def _give_up(self, temporary: Path, step: int) -> None:
        if is_first_rank():
            shutil.rmtree(temporary, ignore_errors=True)
            kept = self.steps()
            whole = f"that of step {kept[-1]} stays" if kept else "there is none yet"
            print(f"the checkpoint of step {step} could not be written; {whole}.", file=sys.stderr, flush=True)

    def _write(self, files: Iterable[tuple[str, Mapping[str, Tensor]]], temporary: Path, final: Path) -> dict[str, str]:
        """Write this rank's files; returns their SHA-256."""
        with writing(final), ThreadPoolExecutor(4) as pool:  # one file is flushed and hashed while the next is written
            work = [(path.name, pool.submit(content_digest, path), pool.submit(flush, path)) for path in write_files(files, temporary)]
            for _, _, flushed in work:
                flushed.result()
            return {name: digest.result() for name, digest, _ in work}

    def _publish(self, temporary: Path, final: Path, content: Mapping[str, Any]) -> None:
        with writing(final):
            write_record(temporary / MARKER, content)
            flush(temporary)
            self.check_owner()
            if final.exists():  # an orphan of an earlier start got as far as this one: its numbers are the same
                shutil.rmtree(temporary)
            else:
                os.replace(temporary, final)
                flush(self.folder)

    def _after(self, step: int, started: float) -> None:
        """Drop older checkpoints, and note how long this save took. Nothing here ends a run whose checkpoint is published."""
        for old in self.steps()[: -self.keep_last]:
            if self.keep_every is None or old % self.keep_every:
                # A network file system can hold on to a file. What is left under this name, the next save sweeps.
                dropped = self.folder / f"{PARTIAL}dropped-{old:08d}"
                with suppress(OSError):
                    os.replace(self.folder / f"step-{old:08d}", dropped)
                shutil.rmtree(dropped, ignore_errors=True)
        with suppress(OSError):
            seconds = time.monotonic() - started
            size = sum(path.stat().st_size for path in (self.folder / f"step-{step:08d}").iterdir())
            write_record(self.folder / LAST_SAVE, {"step": step, "seconds": round(seconds, 3), "bytes": size})

    def load_latest(self, engine: Engine) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into `engine`; returns the state given to `save`, or None where there is none. Collective.

        One that is not whole gets another name and is passed over, with a message.

        Raises:
            UserError: there are checkpoints, but none of them is whole; also at the starts after that one.
            OSError: the machine does not let them be read, which says nothing about them; FollowingError on the other ranks.
        """
        steps, damaged = on_first_rank(lambda: (self.steps(), list(self.folder.glob(f"{DAMAGED}*"))))
        for step in reversed(steps):
            folder = self.folder / f"step-{step:08d}"
            content = self._whole(folder)
            if content is not None:
                engine.load(folder)
                on_first_rank(lambda step=step: self._tell_of_others(step, steps))  # type: ignore[misc]
                return content["state"]
        if steps or damaged:
            raise UserError(f"no checkpoint in {self.folder} is whole. Remove that folder to start the run again from its first step.")
        return None

    def _whole(self, folder: Path) -> dict[str, Any] | None:
        """What the checkpoint's marker says, where all its files are those that were written. Collective."""

        def marked() -> tuple[dict[str, Any] | None, str | None]:
            try:
                content = read_record(folder / MARKER, "marker of a checkpoint", "It was not finished.")
                if content.get("format") != _FORMAT:
                    return None, f"{folder / MARKER} is of another version"
                return content, None
            except UserError as error:
                return None, str(error)

        content, problem = on_first_rank(marked)
        if content is not None:
            problem = self._problem(folder, content["files"])
        if problem is None:
            return content

        def pass_over() -> None:
            self.check_owner()
            aside = self.folder / f"{DAMAGED}{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            print(f"{folder} is passed over and is now {aside.name}: {problem.rstrip('.')}.", file=sys.stderr, flush=True)

        on_first_rank(pass_over)
        return None

    def _problem(self, folder: Path, wanted: Mapping[str, str]) -> str | None:
        """What is wrong with the files, each of which one rank reads. Collective."""

        def differing() -> list[str]:
            names = sorted(wanted)[dist.get_rank() :: dist.get_world_size()]
            with ThreadPoolExecutor(4) as pool:
                digests = pool.map(_digest, [folder / name for name in names])
            return [name for name, digest in zip(names, digests, strict=True) if digest != wanted[name]]

        found = [name for part in _together(differing) for name in part]
        return f"{min(found)} is not the file that was written (SHA-256)" if found else None

    def _tell_of_others(self, step: int, steps: list[int]) -> None:
        if step != steps[-1]:
            print(f"resuming from step {step}, the newest checkpoint that is whole.", file=sys.stderr, flush=True)

    def remove(self) -> None:
        """Drop all checkpoints but those that `keep_every` keeps: the run is complete and has its result. Collective."""

        def drop() -> None:
            kept = {f"step-{step:08d}" for step in self.steps() if self.keep_every is not None and step % self.keep_every == 0}
            if not kept:
                shutil.rmtree(self.folder, ignore_errors=True)
                return
            for path in self.folder.iterdir():
                if path.name not in kept:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

        on_first_rank(drop)


class _Work:
    """Work that is done at once, or by a thread; its outcome is kept."""

    def __init__(self, work: Callable[[], None], background: bool) -> None:
        self._work = work
        self._error: Exception | None = None
        # Not waited for when the process ends: what is half written is swept at the next start.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        if background:
            self._thread.start()
        else:
            self._run()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._error = error

    @property
    def done(self) -> bool:
        """Whether it has ended, one way or the other."""
        return not self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        """Wait for its end, at most so long."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def result(self) -> None:
        """Wait for its end; raise what it raised."""
        self.join()
        if self._error is not None:
            raise self._error


def _together(work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """What `work` returns on each rank. Collective.

    Args:
        group: of all ranks; None: the default one.

    Raises:
        FollowingError: on the other ranks, where one raised.
    """
    answers: list[Any] = [None] * dist.get_world_size()
    failure: Exception | None = None
    answer: tuple[Any, str | None] = (None, None)
    try:
        answer = work(), None
    except Exception as error:
        failure, answer = error, (None, repr(error))
    dist.all_gather_object(answers, answer, group=group)
    if failure is not None:
        raise failure
    failed = [rank for rank, (_, problem) in enumerate(answers) if problem is not None]
    if failed:
        raise FollowingError(f"rank {failed[0]} failed: {answers[failed[0]][1]}")
    return [found for found, _ in answers]


def _digest(path: Path) -> str:
    try:
        return content_digest(path)
    except OSError as error:
        if is_of_the_machine(error):
            raise
        return str(error)  # it is missing


def _division(engine: Engine) -> dict[str, int]:
    return {"world_size": dist.get_world_size(), "zero_stage": engine.zero_stage}
