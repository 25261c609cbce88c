"""Run folders: one process at a time, one run for good, and nothing lost by a start that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mmlg_scale.errors import UserError
from mmlg_scale.training import folder as folders
from mmlg_scale.training.folder import (
    IDENTITY_FILE,
    LOCK_FILE,
    RESULT_FILE,
    claim,
    differences,
    has_work,
    hold,
    read_json,
    result_of,
    set_aside,
)

HOLDER = """
import sys, time
from pathlib import Path
from mmlg_scale.training.folder import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def identity(**changes: object) -> dict[str, object]:
    return {"role": "ancestor", "recipe": {"seed": 0, "ancestor": {"steps": 6, **changes}}, "inputs": {"data_set": "a" * 64}}


def test_a_second_start_is_told_who_works_here_and_takes_over_from_a_dead_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = holder(folder)
    with pytest.raises(UserError, match=rf"is in use by process {process.pid} on \S+ since \d{{4}}-\d\d-\d\dT") as error, hold(folder):
        pass
    assert "\n" not in str(error.value)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with hold(folder):
        assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert (folder / LOCK_FILE).read_text() == ""


def test_a_holder_on_another_node_is_waited_for_while_its_lease_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that Slurm moves off a dead node starts while the file server still keeps that node's locks."""
    run = tmp_path / "run"
    process = holder(run)
    content = json.loads((run / LOCK_FILE).read_text())
    (run / LOCK_FILE).write_text(json.dumps(content | {"host": "gone"}))
    monkeypatch.setattr(folders, "LEASE_SECONDS", 1)
    with pytest.raises(UserError, match=f"in use by process {process.pid} on gone since"), hold(run):
        pass
    monkeypatch.setattr(folders, "LEASE_SECONDS", 120)
    threading.Timer(2.0, process.kill).start()
    with hold(run):
        assert json.loads((run / LOCK_FILE).read_text())["pid"] == os.getpid()
    process.wait()
    said = capsys.readouterr().err.splitlines()
    who = f"{run} is in use by process {process.pid} on gone since {content['since']}"
    assert said == [f"{who}: waiting up to {seconds} s, in case that node has gone." for seconds in (1, 120)]


def test_the_lock_is_let_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), hold(tmp_path / "run"):
        raise ValueError("x")
    with hold(tmp_path / "run"):
        pass


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "mine.txt")
    with pytest.raises(OSError, match="symbolic link"), hold(tmp_path / "run"):
        pass
    assert (tmp_path / "mine.txt").read_text() == "kept"
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file"), hold(tmp_path / "file"):
        pass


def test_claimed_once_recognised_after_and_complete_with_a_result(tmp_path: Path) -> None:
    for _ in range(2):
        with hold(tmp_path):
            assert claim(tmp_path, identity()) is None
    (tmp_path / RESULT_FILE).write_text('{"steps": 6}')
    with hold(tmp_path):
        assert claim(tmp_path, identity()) == {"steps": 6}
    assert result_of(tmp_path) == {"steps": 6}


@pytest.mark.parametrize("leftover", ["", LOCK_FILE, ".run.json.1234.tmp"])
def test_killed_while_it_was_claimed_the_folder_is_usable(leftover: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    if leftover:
        (folder / leftover).write_text('{"role": "anc')
    with hold(folder):
        assert claim(folder, identity()) is None


def test_a_start_that_came_to_nothing_gives_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A first start with a mistake in it leaves no checkpoint: the corrected one need not look for another folder."""
    with hold(tmp_path):
        claim(tmp_path, identity(batch_size=7))
        (tmp_path / "metrics.jsonl").write_text("{}\n")
        (tmp_path / "my-notes.txt").write_text("kept")
    with hold(tmp_path):
        assert claim(tmp_path, identity(batch_size=8)) is None
    assert differences(tmp_path, identity(batch_size=8)) == []
    assert "ancestor.batch_size was 7, now 8" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_FILE, "my-notes.txt", IDENTITY_FILE]


@pytest.mark.parametrize("work", [RESULT_FILE, "checkpoints/step-00000003"])
def test_another_run_is_refused_by_its_dotted_keys(work: str, tmp_path: Path) -> None:
    with hold(tmp_path):
        claim(tmp_path, identity())
    (tmp_path / work).mkdir(parents=True) if "step" in work else (tmp_path / work).write_text("{}")
    assert has_work(tmp_path)
    other = identity(steps=9) | {"inputs": {"data_set": "b" * 64}}
    with hold(tmp_path), pytest.raises(UserError) as error:
        claim(tmp_path, other)
    assert "another data set (sha256 aaaaaaaa, now bbbbbbbb); ancestor.steps was 6, now 9" in str(error.value)
    assert read_json(tmp_path / IDENTITY_FILE) == identity()


def test_files_that_are_no_runs_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with hold(tmp_path), pytest.raises(UserError, match=r"is not an mmlg run: it contains thesis\.tex"):
        claim(tmp_path, identity())


def test_a_damaged_run_says_so(tmp_path: Path) -> None:
    (tmp_path / IDENTITY_FILE).write_text('{"role": ')
    with hold(tmp_path), pytest.raises(UserError, match=r"run\.json is damaged"):
        claim(tmp_path, identity())


def test_superseded_runs_are_kept_whole_each_in_its_place(tmp_path: Path) -> None:
    for number in (1, 2):
        run = tmp_path / "descendants" / "i2-t2-mmlg"
        run.mkdir(parents=True)
        (run / "result.json").write_text(str(number))
        assert set_aside(run, tmp_path / "superseded") == tmp_path / "superseded" / f"i2-t2-mmlg-{number}"
        assert not run.exists()
    assert [(tmp_path / "superseded" / f"i2-t2-mmlg-{n}" / "result.json").read_text() for n in (1, 2)] == ["1", "2"]
