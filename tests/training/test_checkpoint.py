"""Checkpoints: written whole or not at all, passed over where they are damaged, kept as the settings say."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from mmlg_scale import files
from mmlg_scale.errors import SupersededError, UserError
from mmlg_scale.training import checkpoint
from mmlg_scale.training.checkpoint import MARKER, Checkpoints
from mmlg_scale.training.folder import Incarnation, has_work


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """Its state is one number."""

    checkpoint_bytes, zero_stage = 2**20, 1

    def __init__(self) -> None:
        self.number = 0.0

    def copies(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        yield "rank-00000.fp32.safetensors", {"number": torch.tensor([self.number])}

    def load(self, folder: Path) -> None:
        self.number = float(load_file(folder / "rank-00000.fp32.safetensors")["number"])


def fill(checkpoints: Checkpoints, *steps: int) -> None:
    engine: Any = Engine()
    for step in steps:
        engine.number = float(step)
        checkpoints.save(engine, step, {"step": step, "curve": [0.1, 1e-300]})
    checkpoints.wait()


def loaded(checkpoints: Checkpoints) -> tuple[float, Any]:
    engine: Any = Engine()
    state = checkpoints.load_latest(engine)
    return engine.number, state


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


def test_the_newest_is_loaded_with_its_state_to_the_last_digit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load_latest(Engine()) is None  # type: ignore[arg-type]
    fill(checkpoints, 10, 20, 30)
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    assert loaded(checkpoints) == (30.0, {"step": 30, "curve": [0.1, 1e-300]})
    marker = json.loads((checkpoints.folder / "step-00000030" / MARKER).read_text())
    assert (marker["step"], marker["world_size"], marker["zero_stage"]) == (30, 1, 1)
    last = json.loads((checkpoints.folder / "last-save.json").read_text())
    assert last["step"] == 30
    assert checkpoints.last_save_seconds() == last["seconds"] > 0
    assert last["bytes"] == sum(path.stat().st_size for path in (checkpoints.folder / "step-00000030").iterdir())


def test_what_is_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_every=20)
    fill(checkpoints, 10, 20, 30, 40, 50)
    assert names(tmp_path) == ["step-00000020", "step-00000040", "step-00000050"]
    checkpoints.remove()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000020", "step-00000040"]
    Checkpoints(tmp_path).remove()
    assert not checkpoints.folder.exists()


def cut(folder: Path) -> None:
    file = folder / "rank-00000.fp32.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def flip(folder: Path) -> None:
    file = folder / "rank-00000.fp32.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file that is cut": (cut, "rank-00000.fp32.safetensors is not the file that was written"),
    "one bit": (flip, "rank-00000.fp32.safetensors is not the file that was written"),
    "a file that is missing": (lambda folder: next(folder.glob("rank*")).unlink(), "is not the file that was written"),
    "no marker": (lambda folder: (folder / MARKER).unlink(), "It was not finished"),
    "half a marker": (lambda folder: os.truncate(folder / MARKER, 40), "is damaged"),
    "a marker that was edited": (
        lambda folder: (folder / MARKER).write_text((folder / MARKER).read_text().replace('"step": 30', '"step": 31')),
        "does not match its SHA-256",
    ),
    "another version": (lambda folder: (folder / MARKER).write_text('{"format": 0}'), "is of another version"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_one_is_passed_over_with_a_message(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, said = DAMAGE[how]
    checkpoints = Checkpoints(tmp_path)
    fill(checkpoints, 20, 30)
    damage(checkpoints.folder / "step-00000030")
    assert loaded(checkpoints) == (20.0, {"step": 20, "curve": [0.1, 1e-300]})
    told = capsys.readouterr().err
    assert f"{checkpoints.folder / 'step-00000030'} is passed over" in told
    assert said in told
    assert "resuming from step 20, the newest checkpoint that is whole." in told
    assert names(tmp_path) == ["damaged-step-00000030", "step-00000020"]
    fill(checkpoints, 30)
    assert loaded(checkpoints)[0] == 30.0


def test_where_none_is_whole_nothing_starts_over_by_itself(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    fill(checkpoints, 20, 30)
    for folder in checkpoints.folder.glob("step-*"):
        flip(folder)
    for _ in range(2):  # nor does the next start
        with pytest.raises(UserError, match=r"no checkpoint in .* is whole\. Remove that folder"):
            loaded(checkpoints)
        assert has_work(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_disk_that_does_not_answer_says_nothing_of_a_checkpoint(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path)
    fill(checkpoints, 20, 30)

    def refused(path: Path) -> str:
        raise OSError(number, "refused", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "content_digest", refused)
        with pytest.raises(OSError, match="refused") as raised:
            loaded(checkpoints)
    assert raised.value.errno == number
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    assert capsys.readouterr().err == ""
    assert loaded(checkpoints)[0] == 30.0


def test_an_old_one_that_cannot_be_dropped_ends_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where a network file system holds on to a file, or the disk is full once the checkpoint is published."""
    checkpoints, real = Checkpoints(tmp_path, keep_last=1), shutil.rmtree
    fill(checkpoints, 10)

    def held(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "held", str(path))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", held)
        written = checkpoint.write_record
        patched.setattr(checkpoint, "write_record", lambda path, *rest: (full if path.name == "last-save.json" else written)(path, *rest))
        fill(checkpoints, 20)
    assert shutil.rmtree is real
    assert names(tmp_path) == ["partial-dropped-00000010", "step-00000020"]
    assert loaded(checkpoints)[0] == 20.0
    fill(checkpoints, 30)
    assert names(tmp_path) == ["step-00000030"]


def test_a_full_disk_leaves_the_older_checkpoint_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path)
    fill(checkpoints, 10)
    with monkeypatch.context() as patched:
        patched.setattr(files, "free_bytes", lambda folder: 2**19)
        with pytest.raises(UserError, match="a checkpoint needs"):
            fill(checkpoints, 20)
    assert names(tmp_path) == ["step-00000010"]
    assert "the checkpoint of step 20 could not be written; that of step 10 stays." in capsys.readouterr().err
    assert loaded(checkpoints)[0] == 10.0


@pytest.mark.parametrize("where", ["write_record", "flush"])
def test_what_a_kill_leaves_is_swept_and_never_loaded(where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Killed before the marker, and after it but before the rename."""
    checkpoints = Checkpoints(tmp_path)
    fill(checkpoints, 10)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, where, killed)
        with pytest.raises(KeyboardInterrupt):
            fill(checkpoints, 20)
    assert names(tmp_path) == ["partial-0-step-00000020", "step-00000010"]
    assert loaded(checkpoints)[0] == 10.0
    checkpoints.require_space(SimpleNamespace(checkpoint_bytes=1))  # type: ignore[arg-type]
    assert names(tmp_path) == ["step-00000010"]


def test_an_orphan_of_an_earlier_start_publishes_nothing(tmp_path: Path) -> None:
    """Its lock is gone, as after a lost node, but it still runs."""
    first = Incarnation.next(tmp_path)
    orphan = Checkpoints(tmp_path, incarnation=first.number, check_owner=first.check)
    fill(orphan, 10)
    second = Incarnation.next(tmp_path)
    assert (first.number, second.number) == (1, 2)
    with pytest.raises(
        SupersededError, match=rf"another start \(2, process {os.getpid()} on .* has taken this run over\. This one \(1\) ends"
    ):
        fill(orphan, 20)
    assert names(tmp_path) == ["step-00000010"]
    current = Checkpoints(tmp_path, incarnation=second.number, check_owner=second.check)
    fill(current, 20)
    assert loaded(current)[0] == 20.0


def test_an_orphan_that_is_taken_over_while_it_writes_publishes_nothing(tmp_path: Path) -> None:
    first = Incarnation.next(tmp_path)
    orphan = Checkpoints(tmp_path, incarnation=first.number, check_owner=first.check)

    class Slow(Engine):
        def copies(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
            yield from super().copies()
            Incarnation.next(tmp_path)

    with pytest.raises(SupersededError):
        orphan.save(Slow(), 10, {})  # type: ignore[arg-type]
    assert names(tmp_path) == []


class Held:
    """Keeps files from being written until it is told to let them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, write = threading.Event(), checkpoint.write_files

        def held(*args: Any) -> Iterator[Path]:
            assert self.go.wait(30)
            return write(*args)

        monkeypatch.setattr(checkpoint, "write_files", held)


def test_in_the_background_the_state_of_its_step_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever training does to weights and figures meanwhile."""
    checkpoints, engine, held = Checkpoints(tmp_path, background=True), Engine(), Held(monkeypatch)
    state = {"step": 10, "curve": [0.1]}
    checkpoints.save(engine, 10, state)  # type: ignore[arg-type]
    engine.number, state["curve"] = -1.0, [0.2]
    assert checkpoints.saving
    assert names(tmp_path) == ["partial-0-step-00000010"]
    held.go.set()
    checkpoints.wait()
    assert not checkpoints.saving
    assert loaded(checkpoints) == (0.0, {"step": 10, "curve": [0.1]})


def test_a_save_in_the_background_is_waited_for_by_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoints, engine, held = Checkpoints(tmp_path, background=True), Engine(), Held(monkeypatch)
    checkpoints.save(engine, 10, {})  # type: ignore[arg-type]
    threading.Timer(0.2, held.go.set).start()
    engine.number = 20.0
    checkpoints.save(engine, 20, {})  # type: ignore[arg-type]
    assert "step-00000010" in names(tmp_path)
    checkpoints.wait()
    assert loaded(checkpoints)[0] == 20.0


def test_a_save_that_fails_in_the_background_is_told_at_once_and_raised_at_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path, background=True)
    fill(checkpoints, 10)

    def full(*_: object) -> Iterator[Path]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_files", full)
        checkpoints.save(Engine(), 20, {})  # type: ignore[arg-type]
        checkpoints.settle()
        assert "the checkpoint of step 20 could not be written; that of step 10 stays." in capsys.readouterr().err
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(Engine(), 30, {})  # type: ignore[arg-type]
    assert names(tmp_path) == ["step-00000010"]
    assert loaded(checkpoints)[0] == 10.0
