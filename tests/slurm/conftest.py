"""A Slurm for the tests of this folder: `slurm` is up while they run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.daemons import Daemons, Unavailable


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    """Two nodes, n1 and n2, of four CPUs each; commands of this process and its children find it.

    Skips where there can be none, and fails instead where MMLG_REQUIRE_SLURM is set.
    """
    try:
        daemons = Daemons(tmp_path_factory.mktemp("slurm"))
    except Unavailable as error:
        if os.environ.get("MMLG_REQUIRE_SLURM"):
            pytest.fail(f"no Slurm here: {error}")
        pytest.skip(f"no Slurm here: {error}")
    before = {name: os.environ.get(name) for name in daemons.environment}
    os.environ.update(daemons.environment)
    try:
        yield daemons
    finally:
        daemons.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder whose name a shell or Slurm would take apart."""
    folder = tmp_path / "it's 100% $HOME"
    folder.mkdir()
    return folder
