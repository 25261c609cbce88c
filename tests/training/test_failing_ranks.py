"""Errors of runs on two ranks: the user sees one line, that of the rank that failed, and the exit code that belongs to it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from mmlg_launchers import LocalLauncher, Resources
from mmlg_launchers.local import LocalJob

from mmlg_scale.errors import EXIT_REQUEUE, UserError
from mmlg_scale.recipe_file import load_recipe
from tests.launchers.test_supervise import marked, wait_until
from tests.test_machine_errors import RECIPE, made, numbers, train

__all__ = ["made"]  # a fixture

KILLED = "rank 1 was ended by SIGKILL (the kernel sends it when memory runs out)."


def launch(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "mmlg_scale", "launch", "local", "--num-processes=2", f"--run-folder={folder}", "--", *words]


def console(argv: Sequence[str]) -> tuple[int, list[str]]:
    """Exit code and what the user sees."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_a_mistake_of_the_users_is_one_line(tmp_path: Path) -> None:
    code, lines = console(launch(tmp_path, "train", "no-such-recipe", "--out", str(tmp_path / "run")))
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("mmlg: error: no recipe")


@pytest.mark.slow
def test_a_mistake_that_the_first_rank_finds_is_one_line(made: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    code, lines = console(launch(tmp_path / "launch", *train(made, tmp_path / "run")))
    assert code == 2
    assert [line for line in lines if "WARNING" not in line] == [
        f"mmlg: error: {tmp_path / 'run'} exists and is not an mmlg run: it contains notes.txt. Give another --out, or an empty folder."
    ]


def submit(how: str, words: Sequence[str], folder: Path) -> LocalJob:
    return LocalLauncher().submit([sys.executable, "-m", "tests.training.failing_rank", how, *words], Resources(num_processes=2), folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("full", 2, "rank 1: {run}/checkpoints/step-00000003: "),
        ("killed", 137, KILLED),
        ("internal", 1, "rank 1: ZeroDivisionError: of this test. Traceback: {folder}/traceback-rank-1.txt."),
    ],
)
def test_the_line_is_that_of_the_rank_that_failed(how: str, code: int, said: str, made: Path, tmp_path: Path) -> None:
    """And what was there before is, and the run resumes to the numbers of one that nothing happened to."""
    run, folder = tmp_path / "run", tmp_path / "launch"
    words = [*train(made, run), "--runtime.zero_stage=1", "--runtime.checkpoint_every=3"]
    job = submit(how, words, folder)
    job.wait(200)
    lines = job.log_paths()[0].read_text().splitlines()
    assert job.exit_code == code, lines
    assert [line for line in lines if "error" in line.lower()] == [lines[-1]]
    assert lines[-1].startswith(f"mmlg: error: {said.format(run=run, folder=folder)}")
    assert "Traceback (most" not in "".join(lines)
    if how == "internal":
        assert "failing_step" in (folder / "traceback-rank-1.txt").read_text()
    assert not [path for path in run.glob("checkpoints/*") if path.name.startswith("step-")]
    for name in ("run", "undisturbed"):
        job = submit("", [word.replace(str(run), str(tmp_path / name)) for word in words], tmp_path / f"{name}.launch")
        job.wait(200)
        assert job.exit_code == 0, job.log_paths()[0].read_text()
    assert numbers(run) == numbers(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(made: Path, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "launch"
    words = [*train(made, run), "--runtime.zero_stage=1"]
    job = submit("asked", words, folder)
    job.wait(200)
    lines = job.log_paths()[0].read_text().splitlines()
    assert job.exit_code == EXIT_REQUEUE, lines
    assert "stopped by SIGUSR2 after step 2, which is saved; start the same command again. Command: mmlg train " in lines[-1]
    assert [path.name for path in run.glob("checkpoints/step-*")] == ["step-00000002"]
    for name in ("run", "undisturbed"):
        job = submit("", [word.replace(str(run), str(tmp_path / name)) for word in words], tmp_path / f"{name}.launch")
        job.wait(200)
        assert job.exit_code == 0, job.log_paths()[0].read_text()
    assert numbers(run) == numbers(tmp_path / "undisturbed")


class FailingLauncher(LocalLauncher):
    """Runs steps of several ranks with a rank 1 that is killed."""

    def submit(self, argv: Sequence[str], resources: Resources, run_folder: Path, env: Mapping[str, str] | None = None) -> LocalJob:
        if resources.num_processes > 1:
            argv = [sys.executable, "-m", "tests.training.failing_rank", "killed", *argv[3:]]
        return super().submit(argv, resources, run_folder, env)


@pytest.mark.slow
def test_a_family_quotes_the_line(made: Path, tmp_path: Path) -> None:
    from mmlg_scale.family import run_family

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "family": {"sizes": [{"image_layers": 1, "text_layers": 1}]}}))
    settings, runtime = load_recipe(str(recipe), **{"data.path": str(made / "data"), "runtime.num_processes": 2})
    settings.extraction.training.batch_size = settings.adaptation.training.batch_size = 16
    with pytest.raises(UserError) as error:
        run_family(settings, runtime, tmp_path / "family", launcher=FailingLauncher())
    log = tmp_path / "family" / "ancestor.launch" / "log.txt"
    assert str(error.value) == f"step ancestor failed (exit code 137): {KILLED} Log: {log}. Start the same command to resume."


@pytest.mark.slow
def test_a_killed_launcher_of_training_leaves_no_process(made: Path, tmp_path: Path) -> None:
    """Ten instants of the start: imports, process group, loader workers, first steps."""
    draw = random.Random(0)
    words = [*train(made, tmp_path / "run"), "--ancestor.steps=100000", "--ancestor.eval_every=100000", "--runtime.num_workers=1"]
    seen = set()
    for instant in range(10):
        mark = uuid.uuid4().hex
        launcher = subprocess.Popen(launch(tmp_path / "launch", *words), env={**os.environ, "MARK": mark}, stderr=subprocess.DEVNULL)
        time.sleep(4 * (instant + draw.random()))
        seen.add(len(marked(mark)))
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
        wait_until(lambda mark=mark: not marked(mark), seconds=5)  # type: ignore[misc]
    assert max(seen) >= 6  # launcher, supervisor, two ranks and their loaders
