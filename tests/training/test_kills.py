"""SIGKILL at random instants, also inside a save and an export: every start resumes from the last checkpoint, to the same result."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import yaml

from mmlg_scale import files
from mmlg_scale.cli import main
from mmlg_scale.training import checkpoint, run, state
from mmlg_scale.training.meters import Meters
from tests.forks import start
from tests.test_machine_errors import RECIPE, made, numbers

__all__ = ["made"]  # a fixture

INSIDE: dict[str, tuple[Any, str, int]] = {
    # a function that is killed when it is called, at the latest for so many times
    "a file of a checkpoint": (state, "save_file", 8),
    "the marker of a checkpoint": (checkpoint, "write_record", 3),
    "flushing a checkpoint": (checkpoint, "flush", 12),
    "dropping an old checkpoint": (checkpoint.shutil, "rmtree", 3),
    "the file of the exported model": (safetensors.torch, "save_file", 1),
    "publishing the exported model": (files, "_take_place", 1),
    "the result": (run, "write_record", 1),
}


def train(folder: Path, words: list[str], inside: str | None, call: int) -> int:
    """The command, which notes from which step it resumes, and is killed in a call of a function."""
    resume_from = Meters.resume_from

    def noting(self: Meters, step: int) -> None:
        with open(folder / "resumed", "a") as file:
            file.write(f"{step}\n")
        resume_from(self, step)

    Meters.resume_from = noting  # type: ignore[method-assign]
    if inside in INSIDE:
        module, name, _ = INSIDE[inside]
        setattr(module, name, killed_in(getattr(module, name), call))
    return main(words)


def killed_in(work: Callable[..., Any], call: int) -> Callable[..., Any]:
    """Half done where it writes a file: what it has written is cut, then the process is killed."""
    calls = 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < call:
            return work(*args, **kwargs)
        if work.__name__ == "save_file":
            work(*args, **kwargs)
            os.truncate(args[1], os.stat(args[1]).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    return killed


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def check(root: Path, words: list[str], kills: Sequence[str | None], draw: random.Random, undisturbed: Path) -> None:
    """One start after the other, each killed inside a function, or at a random instant after its first step; the last one is left alone."""
    folder, log, starts = root / "run", root / "log.txt", 0
    for inside in [*kills, "nothing"]:
        before, size = saved(folder), (root / "resumed").stat().st_size if (root / "resumed").exists() else 0
        most = INSIDE[inside][2] if inside in INSIDE else 1
        with open(log, "ab") as output:
            process = start(output.fileno(), train, root, [*words, "--out", str(folder)], inside, draw.randint(1, most))
        if inside is None:
            while process.is_alive() and not ((root / "resumed").exists() and (root / "resumed").stat().st_size > size):
                time.sleep(0.01)
            time.sleep(0.5 * draw.random())
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        process.join(300)
        assert process.exitcode == (0 if inside == "nothing" else -signal.SIGKILL), (inside, log.read_text()[-2000:])
        steps = (root / "resumed").read_text().split() if (root / "resumed").exists() else []
        if len(steps) > starts:  # else it was killed before that, as it swept what the one before left
            assert int(steps[-1]) == (before[-1] if before else 0), inside
            starts = len(steps)
    assert starts >= len(kills) // 2
    assert numbers(folder) == numbers(undisturbed)
    assert not (folder / "checkpoints").exists()


def test_kills_inside_a_save_and_an_export(made: Path, tmp_path: Path) -> None:
    words = ["train", str(made / "recipe.yaml"), "--data.path", str(made / "data"), "--runtime.checkpoint_every=1"]
    kills = ["a file of a checkpoint", "flushing a checkpoint", "publishing the exported model"]
    check(tmp_path, words, kills, random.Random(0), made / "run")


@pytest.mark.slow
def test_twenty_kills(made: Path, tmp_path: Path) -> None:
    """The instants differ from one time to the next: the seed is printed."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}", file=sys.stderr)
    draw = random.Random(seed)
    recipe = tmp_path / "recipe.yaml"
    training = {"steps": 300, "batch_size": 16, "eval_every": 100}
    recipe.write_text(yaml.safe_dump({**RECIPE, "ancestor": training, "runtime": {"log_every": 1, "checkpoint_every": 3}}))
    words = ["train", str(recipe), "--data.path", str(made / "data")]
    assert main([*words, "--out", str(tmp_path / "undisturbed")]) == 0
    inside = [*(name for name in INSIDE if "export" not in name and "result" not in name), None, None]
    kills: list[str | None] = [draw.choice(inside) for _ in range(17)]
    # A kill in the export comes when the steps are done.
    kills += ["the file of the exported model", "publishing the exported model", "the result"]
    check(tmp_path, words, kills, draw, tmp_path / "undisturbed")
