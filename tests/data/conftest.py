"""Small data sets, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmlg_scale.data.scenes import write_scenes
from tests.data.sets import write_three_sets


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, num_train=150, num_val=20, num_test=30, seed=3, samples_per_shard=40)
    return root


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three sets of `sets.py`."""
    return write_three_sets(tmp_path_factory.mktemp("mixture"))
