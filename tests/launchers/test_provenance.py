"""What is kept of a launch: in a checkout and without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mmlg_launchers.provenance import keep, snapshot


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in a git checkout with one change."""
    root = tmp_path / "checkout"
    (root / "thing").mkdir(parents=True)
    file = root / "thing" / "__init__.py"
    file.write_text("VALUE = 1\n")
    git = ["git", "-C", str(root), "-c", "user.name=me", "-c", "user.email=me@localhost"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    file.write_text("VALUE = 2\n")
    monkeypatch.syspath_prepend(str(root))
    return root


def test_command_versions_commit_and_changes(package: Path, tmp_path: Path) -> None:
    launch = tmp_path / "run.launch"
    for _ in range(2):  # a second launch replaces what the first one left
        keep(launch, ["mmlg", "train", "a b"], {"recipe.yaml": "seed: 3\n"}, ["thing"])
    found = {file.name: file.read_text() for file in (launch / "what-ran").iterdir()}
    head = subprocess.run(["git", "-C", str(package), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert set(found) == {"command.txt", "versions.txt", "commit.txt", "changes.diff", "recipe.yaml"}
    assert (found["command.txt"], found["recipe.yaml"]) == ("mmlg train 'a b'\n", "seed: 3\n")
    assert found["commit.txt"] == f"{package} {head}"
    assert "\n-VALUE = 1\n+VALUE = 2\n" in found["changes.diff"]
    assert f"pytest=={pytest.__version__}" in found["versions.txt"].splitlines()
    subprocess.run(["git", "-C", str(package), "checkout", "-q", "."], check=True)
    keep(launch, ["mmlg"], {}, ["thing"])
    assert (launch / "what-ran" / "changes.diff").read_text() == ""


def test_code_in_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    keep(tmp_path / "run.launch", ["mmlg"], {}, ["plain"])
    assert (tmp_path / "run.launch" / "what-ran" / "commit.txt").read_text() == "the code is in no git checkout\n"


def test_a_snapshot_outlives_a_change(package: Path, tmp_path: Path) -> None:
    first, second = (snapshot(tmp_path / "run.launch", ["thing"]) for _ in range(2))
    assert first != second
    (package / "thing" / "__init__.py").write_text("VALUE = 3\n")
    environment = os.environ | {"PYTHONPATH": f"{first}{os.pathsep}{package}"}
    shown = subprocess.run(
        [sys.executable, "-c", "import thing; print(thing.VALUE)"], env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout == "2\n"
