"""A small set of scenes, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmlg_scale.data.scenes import write_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, num_train=150, num_val=20, num_test=30, seed=3, samples_per_shard=40)
    return root
