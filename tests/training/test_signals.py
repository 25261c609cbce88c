"""What asks a run to save or to end: every rank acts on it at the same step, and the run resumes to the same numbers."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mmlg_scale.cli import main
from mmlg_scale.errors import EXIT_REQUEUE, EXIT_STOPPED, RunStopped
from mmlg_scale.training import loop, signals
from mmlg_scale.training.signals import Request, Requests, requeue
from tests.forks import start
from tests.test_machine_errors import made, numbers, train

__all__ = ["made"]  # a fixture


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        ([signal.SIGUSR2], Request.REQUEUE),
        ([signal.SIGTERM], Request.TERMINATE),
        ([signal.SIGINT], Request.INTERRUPT),
        ([signal.SIGTERM, signal.SIGUSR2], Request.TERMINATE),  # else scancel would bring the job back
        ([signal.SIGUSR2, signal.SIGUSR2], Request.REQUEUE),
    ],
)
def test_signals_are_requests_and_handlers_are_put_back(sent: list[int], wanted: Request, tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    try:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # as a launcher leaves it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with Requests(tmp_path) as requests:
            assert requests.agree(0) == Request.NOTHING
            for number in sent:
                send(number)
            assert requests.agree(1) == wanted
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_second_interrupt_ends_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Requests(tmp_path):
            send(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == "mmlg: saving; Ctrl-C again ends at once.\n"


def test_files_do_what_they_say_once(tmp_path: Path) -> None:
    with Requests(tmp_path) as requests:
        for name, wanted in (("SAVE", Request.SAVE), ("STOP", Request.STOP)):
            (tmp_path / name).touch()
            assert requests.agree(0) == wanted
            assert requests.agree(1) == Request.NOTHING
            requests._next_step = 0
        assert list(tmp_path.iterdir()) == []


def test_the_clock_asks_for_a_save(tmp_path: Path) -> None:
    clock = Clock()
    with Requests(tmp_path, save_every=60.0, clock=clock) as requests:
        said = []
        for step in range(13):
            said.append(requests.agree(step))
            if said[-1] == Request.SAVE:
                requests.saved()
            clock.now += 10
    assert [step for step, request in enumerate(said) if request == Request.SAVE] == [6, 12]
    assert set(said) == {Request.SAVE, Request.NOTHING}


def test_ranks_speak_about_once_a_second(tmp_path: Path) -> None:
    clock, spoken = Clock(), []
    with Requests(tmp_path, clock=clock) as requests:
        original = requests._in_files
        requests._in_files = lambda: spoken.append(step) or original()  # type: ignore[method-assign, func-returns-value]
        for step in range(2000):
            requests.agree(step)
            clock.now += 1 / 128 if step < 1000 else 3.0
    assert spoken[:4] == [0, 1, 129, 257]
    assert [step for step in spoken if step > 1025] == list(range(1026, 2000))


def speaking_rank(rank: int, port: int, folder: Path) -> int:
    """A rank of two; the second is signalled before step 5."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    said = []
    with Requests(folder) as requests:
        for step in range(8):
            if (rank, step) == (1, 5):
                send(signal.SIGUSR2)
            requests._next_step = step  # at each
            said.append(int(requests.agree(step)))
    (folder / f"said-{rank}").write_text(json.dumps(said))
    dist.destroy_process_group()
    return 0


def test_one_rank_is_signalled_and_all_know_at_the_same_step(tmp_path: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    with open(tmp_path / "log.txt", "w") as log:
        forks = [start(log.fileno(), speaking_rank, rank, port, tmp_path) for rank in (0, 1)]
    for fork in forks:
        fork.join(120)
    assert [fork.exitcode for fork in forks] == [0, 0], (tmp_path / "log.txt").read_text()
    assert [json.loads((tmp_path / f"said-{rank}").read_text()) for rank in (0, 1)] == [[0] * 5 + [int(Request.REQUEUE)] * 3] * 2


@pytest.mark.parametrize("code", [0, 1])
def test_the_job_is_requeued(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By a program in place of scontrol, which notes its arguments; against a real Slurm is tests/slurm."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert requeue() == "start the same command again"
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert requeue() == "scontrol was not found, so Slurm job 77 was not requeued: submit it again"
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/said\necho Access denied >&2\nexit {code}\n")
    program.chmod(0o755)
    assert requeue() == ("Slurm job 77 is requeued" if code == 0 else "scontrol requeue 77 failed (Access denied): submit the job again")
    assert (tmp_path / "said").read_text() == "requeue 77\n"


def asked_at(monkeypatch: pytest.MonkeyPatch, step: int, ask: Any) -> None:
    """Have something done in a step (from 0), before its gradients."""
    original = loop.train_step

    def asking(stage: Any, engine: Any, batch: Any, number: int) -> Any:
        if number == step:
            ask()
        return original(stage, engine, batch, number)

    monkeypatch.setattr(loop, "train_step", asking)


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_a_run_that_is_stopped_in_every_way_has_the_numbers_of_one_that_is_not(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [*train(made, run), "--runtime.keep_last=9"]
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("PATH", str(tmp_path))
    command = f"Command: {shlex.join(['mmlg', *words])}"
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    then = "start the same command again to resume"
    cases = [
        ((run / "STOP").touch, EXIT_STOPPED, f"the file STOP after step 1, which is saved; {then}"),
        (lambda: send(signal.SIGINT), 130, f"Ctrl-C after step 2, which is saved; {then}"),
        (lambda: send(signal.SIGTERM), 143, f"SIGTERM after step 3, which is saved; {then}"),
        (
            lambda: send(signal.SIGUSR2),
            EXIT_REQUEUE,
            "SIGUSR2 after step 4, which is saved; scontrol was not found, so Slurm job 77 was not requeued: submit it again",
        ),
    ]
    try:
        for step, (ask, code, said) in enumerate(cases):
            with monkeypatch.context() as patched:
                asked_at(patched, step, ask)
                assert main(words) == code
            assert f"mmlg: stopped by {said}. {command}" in capsys.readouterr().err.splitlines()
            assert saved(run)[-1] == f"step-{step + 1:08d}"
            assert not (run / "result.json").exists()
        with monkeypatch.context() as patched:
            asked_at(patched, 4, (run / "SAVE").touch)
            patched.setattr(loop.Checkpoints, "remove", lambda self: None)
            assert main(words) == 0
        assert saved(run) == [f"step-{step:08d}" for step in range(1, 7)]
        assert not (run / "SAVE").exists()
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert numbers(run) == numbers(made / "run")
    assert json.loads((run / "incarnation.json").read_text())["number"] == 5


def test_a_save_that_would_not_fit_before_sigkill_is_not_begun(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    # How long the first save took is known only once it is complete: in the background, two steps may be too few for that.
    words = [*train(made, run), "--runtime.kill_wait=1e-6", "--runtime.background_saves=false"]
    with monkeypatch.context() as patched:
        patched.setattr(signals, "SECONDS_BETWEEN", 0.0)
        asked_at(patched, 4, lambda: send(signal.SIGTERM))
        assert main(words) == 143
    said = capsys.readouterr().err
    assert "stopped by SIGTERM after step 5; the last checkpoint is of step 3, since one takes" in said
    assert saved(run) == ["step-00000003"]
    assert main(words) == 0
    assert numbers(run) == numbers(made / "run")


def test_a_request_before_an_evaluation_does_not_wait_for_it(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start evaluates: no point of the curve is missing, none is there twice."""
    run = tmp_path / "run"
    words = train(made, run)
    for step in (2, 5):
        with monkeypatch.context() as patched:
            asked_at(patched, step, lambda: send(signal.SIGTERM))
            patched.setattr(loop, "_evaluate", lambda *_: pytest.fail("an evaluation"))
            assert main(words) == 143
        assert saved(run)[-1] == f"step-{step + 1:08d}"
        if step == 2:
            with monkeypatch.context() as patched:
                asked_at(patched, 3, lambda: send(signal.SIGTERM))
                assert main(words) == 143  # it has evaluated the weights of step 3
    assert main(words) == 0
    assert numbers(run) == numbers(made / "run")


def test_work_that_needs_no_save_ends_on_each_rank_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with Requests(tmp_path) as requests:
        requests.end_if_asked()
        send(signal.SIGUSR2)
        with pytest.raises(RunStopped, match=r"^stopped by SIGUSR2; start the same command again\.$") as stopped:
            requests.end_if_asked()
    assert stopped.value.exit_code == EXIT_REQUEUE
    with Requests(tmp_path) as requests:
        (tmp_path / "SAVE").touch()
        requests.end_if_asked()  # it saves as it goes
        (tmp_path / "STOP").touch()
        with pytest.raises(RunStopped, match=r"^stopped by the file STOP; start the same command again to resume\.$") as stopped:
            requests.end_if_asked()
        assert stopped.value.exit_code == EXIT_STOPPED
        requests.end_if_asked()  # the file is gone: the next start does not find it
