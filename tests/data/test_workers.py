"""Loader workers: shared memory that is too small is noticed before they start, and what goes wrong in them is a line and no hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mmlg_scale.cli import main
from mmlg_scale.data import workers
from mmlg_scale.data.workers import from_workers, require_shared_memory, worker_options
from mmlg_scale.errors import UserError
from tests.disks import mounted
from tests.forks import start
from tests.test_machine_errors import made, numbers, train

__all__ = ["made"]  # a fixture

CLONE_NEWNS = 0x20000


def forked(output: Path, work: Callable[..., int], *args: object) -> int:
    """Run `work` in a fork, its output in a file; returns the exit code."""
    with open(output, "w") as file:
        process = start(file.fileno(), work, *args)
        process.join(200)
    assert process.exitcode is not None
    return process.exitcode


def with_small_shared_memory(work: Callable[..., int], *args: object) -> int:
    """`work` where /dev/shm has 64 KiB: really, in mounts of this process's own, or where that is not permitted, as the system tells it."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    # Private: else the mount would be the machine's.
    private = libc.unshare(CLONE_NEWNS) == 0 and libc.mount(b"none", b"/", None, (1 << 14) | (1 << 18), None) == 0
    if private:
        with mounted(Path("/dev/shm"), "-t", "tmpfs", "-o", "size=64k", "tmpfs") as possible:
            if possible:
                return work(*args)
    workers.os = SimpleNamespace(statvfs=lambda _: SimpleNamespace(f_bavail=16, f_frsize=4096), environ=os.environ)  # type: ignore[attr-defined]
    return work(*args)


@pytest.mark.parametrize("command", ["train", "features"])
def test_64_kib_of_shared_memory_are_noticed_before_the_start(command: str, made: Path, tmp_path: Path) -> None:
    from tests.test_machine_errors import keep_features

    out = tmp_path / "out"
    words = {"train": train, "features": keep_features}[command](made, out)
    started = time.monotonic()
    code = forked(tmp_path / "said", with_small_shared_memory, main, [*words, "--runtime.num_workers=2"])
    lines = [line for line in (tmp_path / "said").read_text().splitlines() if "error" in line]
    assert code == 2, lines
    assert len(lines) == 1
    assert lines[0].startswith("mmlg: error: /dev/shm has 0.1 MiB free, 2 loader workers need ")
    assert lines[0].endswith("Start the container with docker run --shm-size=64m, or set runtime.num_workers 0.")
    assert time.monotonic() - started < 60
    assert main(words) == 0
    if command == "train":
        assert numbers(out) == numbers(made / "run")


def unchecked(words: list[str]) -> int:
    """The command without the check, and with a shorter wait."""
    workers.TIMEOUT_SECONDS = 90.0
    workers.require_shared_memory.__globals__["SHARED_MEMORY"] = Path("/nowhere")
    return main(words)


@pytest.mark.slow
def test_shared_memory_that_fills_up_later_is_no_hang(made: Path, tmp_path: Path) -> None:
    """The check finds enough, as where another program takes the rest afterwards."""
    words = [*train(made, tmp_path / "out"), "--runtime.num_workers=2", "--ancestor.batch_size=96"]
    with mounted(tmp_path / "probe", "-t", "tmpfs", "tmpfs") as possible:
        if not possible:
            pytest.skip("no mounts here")
    code = forked(tmp_path / "said", with_small_shared_memory, unchecked, words)
    lines = [line for line in (tmp_path / "said").read_text().splitlines() if line.startswith("mmlg: error: ")]
    assert code == 2, (tmp_path / "said").read_text()
    assert len(lines) == 1
    assert "use fewer runtime.num_workers" in lines[0]


def test_what_is_needed_is_what_workers_may_have_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    page = 4096
    # Two workers with two batches each, and one that is being read; each tensor takes whole pages.
    needed = 3 * (5 * (26 * page + page) + 2 * 2**17)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for free, refused in ((needed - page, True), (needed, False)):
        free_pages = free // page
        monkeypatch.setattr(os, "statvfs", lambda _, free=free_pages: SimpleNamespace(f_bavail=free, f_frsize=page))
        if refused:
            with pytest.raises(UserError, match=r"2 loader workers on each of 3 ranks need 2\.3 MiB"):
                require_shared_memory(2, [25 * page + 1, 17])
        else:
            require_shared_memory(2, [25 * page + 1, 17])
    monkeypatch.setattr(os, "statvfs", lambda _: pytest.fail("nothing is needed"))
    require_shared_memory(0, [10**12])


class Failing(Dataset[torch.Tensor]):
    """Items that fail in a worker."""

    def __getitem__(self, index: str) -> torch.Tensor:
        if index == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == "hangs":
            time.sleep(300)
        if index == "refused":
            open("/proc/1/mem/x").close()
        if index == "mistaken":
            raise UserError("the shards are empty. Give others.")
        return torch.zeros(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("killed", r"^a worker of the loader, process \d+, (was killed \(Killed\)|ended unexpectedly)\. Memory may have run out"),
        ("hangs", r"^the loader's workers gave no batch for 30 s\. Memory may have run out, also in /dev/shm"),
        ("refused", r"^\[Errno 20\] Not a directory: '/proc/1/mem/x'$"),
        ("mistaken", r"^the shards are empty\. Give others\.$"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_a_line(how: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "TIMEOUT_SECONDS", 30.0 if how == "hangs" else 300.0)
    loader: DataLoader[torch.Tensor] = DataLoader(Failing(), batch_size=None, sampler=["fine", how], **worker_options(1))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=said):
        list(from_workers(loader))
